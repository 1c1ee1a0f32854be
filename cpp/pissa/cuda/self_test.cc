#include "pissa/cuda/self_test.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pissa/core/gguf.h"
#include "pissa/core/grouped_linear.h"
#include "pissa/core/merge_codes.h"
#include "pissa/cuda/backend.h"
#include "pissa/cuda/elementwise.h"
#include "pissa/cuda/few_rows.h"
#include "pissa/cuda/gemm.h"
#include "pissa/cuda/products.h"
#include "pissa/cuda/routes.h"

namespace pissa::cuda {
namespace {

constexpr std::int64_t kCols = 160;     // of a weight: five lines of codes, a chunk and a part of one
constexpr std::int64_t kRows = 64;      // of x: as many as few_rows takes
constexpr std::int64_t kNarrow = 16;    // rows of a weight for which few_rows takes its narrow blocks
constexpr std::int64_t kDecoded = 512;  // elements of each format that the host compares, in whole rows
constexpr std::int64_t kSumRows = 24, kSumCols = 40, kSumInner = 96;  // of the integers' product

std::vector<std::uint8_t> code_bytes_of(std::int64_t count) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::uint8_t>(167 * i + 13 * (i >> 8) + 5);
    if ((bytes[i] & 0x7f) == 0x7f) bytes[i] ^= 0x40;  // FP8's NaN
  }
  return bytes;
}

// Powers of two, so that an element is rounded once however it is computed.
std::vector<float> scales_of(std::int64_t count) {
  std::vector<float> scales(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < scales.size(); ++i) scales[i] = std::ldexp(1.0f, static_cast<int>(5 * i % 7) - 3);
  return scales;
}

std::vector<std::uint8_t> scale_bytes_of(std::int64_t count) {  // of E8M0 and of E4M3
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::uint8_t>(120 + 3 * i % 7);
  return bytes;
}

std::vector<float> e4m3_values() {
  std::vector<float> values(256);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = e4m3_value(static_cast<std::uint8_t>(i));
  return values;
}

std::vector<float> integers(std::int64_t count, std::uint32_t seed) {  // from -2 to 2
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) {
    seed = 1664525 * seed + 1013904223;  // Numerical Recipes' generator, whose high bits are good
    value = std::floor(static_cast<float>(seed >> 24) / 52.0f) - 2.0f;
  }
  return values;
}

// Row i is a row of the identity, in an order that reaches all of a weight's columns.
std::vector<float> identity_rows() {
  std::vector<float> values(kRows * kCols);
  for (std::int64_t i = 0; i < kRows; ++i) values[static_cast<std::size_t>(i * kCols + 37 * i % kCols)] = 1.0f;
  return values;
}

// Elements of a row of a format's decoded matrix.
constexpr std::int64_t row_of(Format format) { return is_read_only(format) ? info(format).blocks.usual : kCols; }

bool is_same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

template <Format first = Format::nf4, class F>
void for_each_format(F f) {
  f.template operator()<first>();
  if constexpr (first != Format::mxfp4_gguf) for_each_format<static_cast<Format>(static_cast<int>(first) + 1)>(f);
}

// A copy on the device of what the host keeps until it has waited.
template <class T>
class Uploaded {
 public:
  Uploaded(const Context& context, std::vector<T> values)
      : host(std::move(values)), device_(context, static_cast<std::int64_t>(host.size())) {
    const std::size_t bytes = host.size() * sizeof(T);
    check(cudaMemcpyAsync(device_.data(), host.data(), bytes, cudaMemcpyHostToDevice, context.stream), context,
          "cudaMemcpyAsync", "bytes", bytes);
  }
  T* data() const { return device_.data(); }

  const std::vector<T> host;

 private:
  Array<T> device_;
};

class SelfTest {
 public:
  explicit SelfTest(const Context& context)
      : context_(context),
        backend_(context),
        wide_(kNarrow * 2 * multiprocessors(context.device)),
        codes_(context, code_bytes_of(std::max(2 * wide_ * kCols, 2 * kDecoded))),
        scales_(context, scales_of(2 * wide_ * kCols / 16)),
        scale_bytes_(context, scale_bytes_of(2 * wide_ * kCols / 16)),
        levels_(context, e4m3_values()),
        identity_(context, identity_rows()),
        factors_(context, integers(std::max(wide_, kCols), 3)),
        squares_(context, kMostChecks) {}

  std::vector<std::string> run() {
    try {
      return run_from_open();
    } catch (...) {
      open_all();
      throw;
    }
  }

 private:
  static constexpr std::int64_t kMostChecks = 256;

  void open_all() const {
    for (const Route route : kRoutes) set_open(context_.device, route, true);
  }

  std::vector<std::string> run_from_open() {
    const int device = context_.device;
    open_all();
    set_open(device, Route::lt, false);  // the handle's products are the reference
    test_foundation();
    std::array<bool, std::size(kRoutes)> right{};
    const auto is_right = [&](Route route) -> bool& { return right[static_cast<std::size_t>(route)]; };
    is_right(Route::lt) = test_lt();
    compare_rows(is_right(Route::few_rows), is_right(Route::group));
    is_right(Route::early_launch) = true;
    if (!(is_right(Route::few_rows) && is_right(Route::group)) && may_launch_early(context_)) {
      set_open(device, Route::early_launch, false);
      bool few_rows = false, group = false;
      compare_rows(few_rows, group);
      is_right(Route::early_launch) = few_rows == is_right(Route::few_rows) && group == is_right(Route::group);
      is_right(Route::few_rows) = few_rows;
      is_right(Route::group) = group;
    }
    std::vector<std::string> closed;
    for (const Route route : kRoutes) {
      set_open(device, route, is_right(route));
      if (is_right(route)) continue;
      closed.push_back(message(name(route), " computes wrongly on CUDA device ", device, " (compute capability ",
                               capability(device) / 10, ".", capability(device) % 10, "), so ", instead(route),
                               " [P005]"));
    }
    set_tested(device, true);
    return closed;
  }

  Scales scales_for(Format format) const {
    const auto blocks = [&](std::int64_t size) { return Scales{.blocksize = size, .absmax = scales_.data()}; };
    if (format == Format::mxfp4) return {.blocksize = 32, .absmax8 = scale_bytes_.data()};
    if (format == Format::nvfp4) {
      return {.blocksize = 16, .absmax8 = scale_bytes_.data(), .levels = levels_.data()};
    }
    return blocks(info(format).bits == 8 ? kCols : 32);
  }
  Matrix weight(Format format, std::int64_t rows, std::int64_t first_byte = 0) const {
    return {codes_.data() + first_byte, rows, kCols, kCols, format, scales_for(format)};
  }

  // ---- What the host compares

  template <Format format>
  float element(std::int64_t i) const {
    const std::uint8_t* codes = codes_.host.data();
    if constexpr (is_read_only(format)) {
      const std::int64_t cols = info(format).blocks.usual;
      return gguf_element<format>(codes + i / cols * info(format).block_bytes, i % cols);
    } else {
      const float level = level_of_code<format>(code_at<format>(codes, i));
      const Scales scales = scales_for(format);
      const auto block = static_cast<std::size_t>(i / scales.blocksize);
      if (scales.levels) return level * levels_.host[scale_bytes_.host[block]];
      if (scales.absmax8) return level * e8m0_value(scale_bytes_.host[block]);
      if constexpr (format == Format::int8) return int8_element(level, scales_.host[block]);
      else return level * scales_.host[block];
    }
  }

  void test_foundation() const {
    std::int64_t formats = 0;
    for_each_format([&]<Format format>() { ++formats; });
    const Buffer decoded(context_, formats, kDecoded, Format::f32), sums(context_, kSumRows, kSumCols, Format::f32);
    std::int64_t row = 0;
    for_each_format([&]<Format format>() {
      constexpr std::int64_t of_row = row_of(format);
      const Scales scales = is_read_only(format) ? Scales{.blocksize = of_row} : scales_for(format);
      const Matrix codes{codes_.data(), kDecoded / of_row, of_row, of_row, format, scales};
      convert_any(context_, codes,
                  {decoded.data<float>() + row++ * kDecoded, kDecoded / of_row, of_row, of_row, Format::f32});
    });
    const Integers integers(*this);
    matmul(context_, integers.product(sums.view()));
    const std::vector<float> elements = backend_.read(decoded.data<float>(), formats * kDecoded);
    const std::vector<float> found = backend_.read(sums.data<float>(), kSumRows * kSumCols);
    row = 0;
    for_each_format([&]<Format format>() {
      for (std::int64_t i = 0; i < kDecoded / row_of(format) * row_of(format); ++i) {
        if (!is_same(elements[static_cast<std::size_t>(row * kDecoded + i)], element<format>(i))) {
          fail(message("codes of ", info(format).name, " are decoded wrongly"));
        }
      }
      ++row;
    });
    if (found != integers.sums(0.0f)) fail("cuBLAS multiplies wrongly");
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(message("the self-test of CUDA device ", context_.device, " failed: ", what,
                                     "; set PISSA_COMPOSITE=1, with which PyTorch's operations compute, and report it "
                                     "with what `pissa env` prints [P006]"));
  }

  // a [rows, inner] and b [cols, inner]. Sums are at most 4 * 96: a bias of 3 beside them is exact in f16.
  struct Integers {
    explicit Integers(const SelfTest& test)
        : a(test.context_, integers(kSumRows * kSumInner, 1)),
          b(test.context_, integers(kSumCols * kSumInner, 2)),
          half_a(test.context_, kSumRows, kSumInner, Format::f16),
          half_b(test.context_, kSumCols, kSumInner, Format::f16) {
      convert(test.context_, {a.data(), kSumRows, kSumInner, kSumInner, Format::f32}, 1.0f, half_a.view());
      convert(test.context_, {b.data(), kSumCols, kSumInner, kSumInner, Format::f32}, 1.0f, half_b.view());
    }
    Matmul product(const MutableMatrix& out) const {
      return {.a = half_a.view(), .b = half_b.view(), .op_b = Op::t, .out = out};
    }
    std::vector<float> sums(float bias) const {
      std::vector<float> result;
      for (std::int64_t i = 0; i < kSumRows * kSumCols; ++i) {
        const float* left = a.host.data() + i / kSumCols * kSumInner;
        const float* right = b.host.data() + i % kSumCols * kSumInner;
        float sum = bias;
        for (std::int64_t k = 0; k < kSumInner; ++k) sum += left[k] * right[k];
        result.push_back(sum);
      }
      return result;
    }

    Uploaded<float> a, b;
    Buffer half_a, half_b;
  };

  bool test_lt() const {
    const Integers integers(*this);
    const Uploaded<float> threes(context_, std::vector<float>(static_cast<std::size_t>(kSumCols), 3.0f));
    const Buffer bias(context_, 1, kSumCols, Format::f16), out(context_, kSumRows, kSumCols, Format::f16),
        wide(context_, kSumRows, kSumCols, Format::f32);
    convert(context_, {threes.data(), 1, kSumCols, kSumCols, Format::f32}, 1.0f, bias.view());
    set_open(context_.device, Route::lt, true);
    bool has_bias = false;
    try {
      Matmul product = integers.product(out.view());
      has_bias = takes_bias(context_, product, bias.view());
      if (has_bias) product.bias = bias.view();
      matmul(context_, product);
    } catch (const OutOfMemory&) {
      throw;
    } catch (const std::runtime_error&) {
      set_open(context_.device, Route::lt, false);
      return false;
    }
    set_open(context_.device, Route::lt, false);
    convert(context_, out.view(), 1.0f, wide.view());
    return backend_.read(wide.data<float>(), kSumRows * kSumCols) == integers.sums(has_bias ? 3.0f : 0.0f);
  }

  // ---- What the device compares

  // Queues a comparison: the difference's sum of squares.
  void compare(const Matrix& found, const Matrix& expected) {
    const Buffer difference(context_, found.rows, found.cols, Format::f32);
    if (checks_ == kMostChecks) throw std::logic_error("self-test: too many checks");
    backend_.subtract(found, expected, difference.view(), squares_.data() + checks_++);
  }

  // Runs `queue`; false if it throws, or if a comparison that it has queued fails.
  template <class F>
  bool all_equal(F queue) {
    checks_ = 0;
    try {
      queue();
    } catch (const OutOfMemory&) {
      throw;
    } catch (const std::runtime_error&) {
      return false;
    }
    std::vector<double> squares(static_cast<std::size_t>(checks_));
    read_back(context_, squares_.data(), squares.data(), checks_ * static_cast<std::int64_t>(sizeof(double)));
    return std::ranges::all_of(squares, [](double square) { return square == 0.0; });
  }

  void compare_rows(bool& few_rows, bool& group) {
    few_rows = all_equal([&] { queue_rows(false); });
    group = all_equal([&] { queue_rows(true); });
  }

  void queue_rows(bool groups) {
    for (const Format half : {Format::f16, Format::bf16}) {
      if (half == Format::bf16 && capability(context_.device) < 80) continue;  // Turing has no tensor cores for it
      const Buffer identity(context_, kRows, kCols, half);
      convert(context_, {identity_.data(), kRows, kCols, kCols, Format::f32}, 1.0f, identity.view());
      for_each_format([&]<Format format>() {
        if constexpr (!is_read_only(format)) {
          if (groups) return queue_group(identity.view(), format);
          for (const std::int64_t rows : {kNarrow, wide_}) queue_few_rows(identity.view(), weight(format, rows));
        }
      });
    }
  }

  // The adapter: A [1, kCols] and B [rows, 1] of small integers.
  Matrix factor_a() const { return {factors_.data(), 1, kCols, kCols, Format::f32}; }
  Matrix factor_b(std::int64_t rows) const { return {factors_.data(), rows, 1, 1, Format::f32}; }

  Buffer in(Format format, const Matrix& a) const {
    Buffer converted(context_, a.rows, a.cols, format);
    convert(context_, a, 1.0f, converted.view());
    return converted;
  }

  // x W^T + (x A^T) B^T by the handle, of the decoded weight, in x's format. An element of each term, and their sum in
  // f32, are exact.
  Buffer reference(const Matrix& x, const Matrix& w) const {
    const Buffer decoded(context_, w.rows, w.cols, x.format);
    convert_any(context_, w, decoded.view());
    const Buffer sums(context_, x.rows, w.rows, Format::f32), xa(context_, x.rows, 1, Format::f32);
    const Buffer a = in(x.format, factor_a()), b = in(x.format, factor_b(w.rows));
    matmul(context_, {.a = x, .b = a.view(), .op_b = Op::t, .out = xa.view()});
    const Buffer half_xa = in(x.format, xa.view());
    matmul(context_, {.a = x, .b = decoded.view(), .op_b = Op::t, .out = sums.view()});
    matmul(context_, {.a = half_xa.view(), .b = b.view(), .op_b = Op::t, .accumulate = true, .out = sums.view()});
    return in(x.format, sums.view());
  }

  // As a layer launches them: x A^T, beside which the kernel for x W^T may start, and that kernel.
  void queue_few_rows(const Matrix& identity, const Matrix& w) {
    for (const Matrix& x : {rows_of(identity, 24, kFewRows), identity}) {
      const Buffer expected = reference(x, w);
      const Buffer xa(context_, x.rows, 1, x.format), y(context_, x.rows, w.rows, x.format);
      const Precision precision = precision_of(x.format);
      for (std::int64_t first = 0; first < x.rows; first += kFewRows) {
        const std::array thin{Term{rows_of(x, first, kFewRows), Op::n, factor_a(), Op::t, 1.0f, precision}};
        few_rows_gemm(context_, thin, {}, {}, rows_of(xa.view(), first, kFewRows));
      }
      const std::array tail{Term{xa.view(), Op::n, factor_b(w.rows), Op::t, 1.0f, precision_of_xa(x.format)}};
      few_rows_quantized(context_, x, w, tail, {}, y.view());
      compare(y.view(), expected.view());
    }
  }

  // Layers of 3, 0 and 40 rows; and of 2 and 9, which take the smaller tiles.
  void queue_group(const Matrix& identity, Format format) {
    const std::int64_t bytes = code_bytes(format, kNarrow * kCols);
    for (const std::vector<std::int64_t>& counts : {std::vector<std::int64_t>{3, 0, 40}, {2, 9}}) {
      std::vector<GroupedLayer> layers;
      std::int64_t first = 0;
      for (const std::int64_t rows : counts) {
        Adapter adapter;
        adapter.a = factor_a();
        adapter.b = factor_b(kNarrow);
        layers.push_back(
            {weight(format, kNarrow, static_cast<std::int64_t>(layers.size()) % 2 * bytes), adapter, first, rows});
        first += rows;
      }
      const Matrix x = rows_of(identity, 5, first);
      const Buffer y(context_, first, kNarrow, x.format), xa(context_, first, 1, Format::f32);
      few_rows_group(context_, x, layers, y.view(), xa.view());
      for (const GroupedLayer& layer : layers) {
        if (layer.rows == 0) continue;
        const Buffer expected = reference(layer.part(x), layer.weight);
        compare(layer.part(Matrix(y.view())), expected.view());
      }
    }
  }

  const Context& context_;
  CudaBackend backend_;
  std::int64_t wide_;  // rows of a weight for which few_rows takes its wide blocks
  Uploaded<std::uint8_t> codes_;
  Uploaded<float> scales_;
  Uploaded<std::uint8_t> scale_bytes_;
  Uploaded<float> levels_, identity_, factors_;
  Array<double> squares_;
  std::int64_t checks_ = 0;
};

}  // namespace

std::vector<std::string> test_routes(const Context& context) {
  static std::mutex mutex;
  if (is_tested(context.device)) return {};
  const std::lock_guard lock(mutex);  // a capture waits, too: a test of another thread closes routes for a while
  if (is_tested(context.device) || is_capturing(context)) return {};
  return SelfTest(context).run();
}

}  // namespace pissa::cuda
