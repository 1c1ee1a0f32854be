#include "pissa/cuda/few_rows.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <vector>

#include "pissa/cuda/few_rows_device.h"
#include "pissa/cuda/formats_device.h"

namespace pissa::cuda {
namespace {

constexpr int kRowsAtOnce = 4;  // of x: that many loads are under way before the first is used

// kSplit threads, a warp or the block, share a column of the output and divide its inner dimension.
template <int kSplit, class Sum>
__device__ __forceinline__ void multiply_few_rows(const Sum& sum) {
  struct Shared {
    float partial[kWarps][kRows];
  };
  const int part = threadIdx.x % kSplit;
  const std::int64_t col = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kSplit) + threadIdx.x / kSplit;
  const int rows = static_cast<int>(sum.out.rows);
  const bool inside = col < sum.out.cols;
  allow_dependent_launch();
  float total[kRows] = {};
  for (int i = 0; i < sum.count && inside; ++i) {
    const Term& term = sum.term(i);
    const bool beyond_f16 = term.precision == Precision::f16_scaled;
    for (std::int64_t k = part * kOctet; k < term.a.cols; k += kSplit * kOctet) {
      float b[1][kOctet];
      load_rounded(term.b, col, k, 1.0f, format_of(term.precision), b);
#pragma unroll
      for (int first = 0; first < kRows; first += kRowsAtOnce) {
        if (first >= rows) break;
        float a[kRowsAtOnce][kOctet];
        load_rounded(term.a, first, k, term.scale, beyond_f16 ? Format::f32 : format_of(term.precision), a);
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma unroll
          for (int j = 0; j < kOctet; ++j) total[first + i] = fmaf(a[i][j], b[0][j], total[first + i]);
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (row < rows) total[row] = warp_reduce(total[row], Add{});
  }
  if constexpr (kSplit == kWarp) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (part == row && row < rows && inside) finish(sum, row, col, total[row]);
    }
  } else {
    Shared& shared = shared_memory<Shared>();
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) shared.partial[threadIdx.x / kWarp][row] = total[row];
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x);
    if (row >= rows || !inside) return;
    float value = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) value += shared.partial[warp][row];
    finish(sum, row, col, value);
  }
}

template <int kSplit>
__global__ void few_rows_kernel(RowSum sum) {
  multiply_few_rows<kSplit>(sum);
}

template <int kSplit>
__global__ void few_rows_group_kernel(const __grid_constant__ Group group) {
  const LayerSum sum(group, kRows);
  if (sum.rows > 0) multiply_few_rows<kSplit>(sum);
}

bool are_rows_by_rows(std::span<const Term> terms) {
  return terms.size() <= kMostTerms && std::ranges::all_of(terms, [](const Term& term) {
           return term.op_a == Op::n && term.op_b == Op::t && !is_quantized(term.a.format) &&
                  !is_quantized(term.b.format);
         });
}

// Up to 1024, a warp reads a row of b in four steps; above, the block shares it, or one warp would wait for each step.
bool is_long(std::int64_t inner) { return inner > 1024; }

dim3 grid_of(std::int64_t cols, std::int64_t cols_of_block) {
  return dim3(static_cast<unsigned>(ceil_div(cols, cols_of_block)));
}

// As many layers as fit into a launch, each with rows.
void multiply_layers(const Context& context, const Matrix& x, std::span<const GroupedLayer> layers,
                     const MutableMatrix& y, const MutableMatrix& xa) {
  const Matrix& weight = layers[0].weight;
  const Adapter& adapter = layers[0].adapter;
  const Precision precision = precision_of(x.format);
  const int count = adapter.a0 ? 2 : 1;
  const std::array thin{Term{x, Op::n, adapter.a, Op::t, 1.0f, precision}, Term{}};
  const std::array tail{Term{xa, Op::n, adapter.b, Op::t, adapter.scaling, precision_of_xa(x.format)}, Term{}};
  Group product{sum_of(std::span(thin).first(count), {}, {}, xa), {}};
  QuantizedGroup all{{sum_of(std::span(tail).first(count), {}, {}, y), {}},
                     x,
                     weight,
                     shift_of(weight.scales.blocksize),
                     static_cast<int>(layers.size()),
                     {}};
  std::int64_t most_rows = 0;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const GroupedLayer& layer = layers[i];
    const Scales& scales = layer.weight.scales;
    const auto factors = [&](const Matrix& start, const Matrix& delta) {
      const void* const first = start ? start.data : delta.data;
      return LayerFactors{{first, delta.data}, static_cast<int>(layer.first), static_cast<int>(layer.rows)};
    };
    product.layers[i] = factors(layer.adapter.a0, layer.adapter.a);
    all.group.layers[i] = factors(layer.adapter.b0, layer.adapter.b);
    all.weights[i] = {layer.weight.data,
                      scales.absmax    ? scales.absmax
                      : scales.absmax8 ? static_cast<const void*>(scales.absmax8)
                                       : scales.absmax16,
                      scales.levels ? scales.levels : scales.nested_absmax, scales.offset};
    most_rows = std::max(most_rows, layer.rows);
  }
  const bool by_block = is_long(x.cols);
  const dim3 grid(static_cast<unsigned>(ceil_div(xa.cols, std::int64_t{by_block ? 1 : kWarps})),
                  static_cast<unsigned>(layers.size()), static_cast<unsigned>(ceil_div(most_rows, kFewRows)));
  launch(context, "few_rows_group", by_block ? few_rows_group_kernel<kThreads> : few_rows_group_kernel<kWarp>, grid,
         kThreads, product);
  with_codes(weight.format,
             [&](auto codes) { FewRowsOf<decltype(codes)::kFormat>::multiply_group(context, most_rows, all); });
}

}  // namespace

bool few_rows_fit(std::span<const Term> terms, const MutableMatrix& out) {
  return out.rows <= kFewRows && are_rows_by_rows(terms);
}

void few_rows_gemm(const Context& context, std::span<const Term> terms, const Matrix& addend, const Matrix& bias,
                   const MutableMatrix& out) {
  const bool by_block = std::ranges::any_of(terms, [](const Term& term) { return is_long(term.a.cols); });
  launch(context, "few_rows_gemm", by_block ? few_rows_kernel<kThreads> : few_rows_kernel<kWarp>,
         grid_of(out.cols, by_block ? 1 : kWarps), kThreads, sum_of(terms, addend, bias, out));
}

bool few_rows_quantized_fits(const Matrix& x, const Matrix& weight, std::span<const Term> tail) {
  return x.rows <= kFewRowsQuantized && (x.format == Format::bf16 || x.format == Format::f16) &&
         is_quantized(weight.format) && !is_read_only(weight.format) && weight.cols % kLine == 0 &&
         weight.scales.blocksize % (kLine / scales_of_line(weight.format)) == 0 && x.ld % 8 == 0 &&
         aligned_to_16(x.data) && aligned_to_16(weight.data) && are_rows_by_rows(tail) &&
         std::ranges::all_of(tail, [&](const Term& term) { return format_of(term.precision) == x.format; });
}

void few_rows_quantized(const Context& context, const Matrix& x, const Matrix& weight, std::span<const Term> tail,
                        const Matrix& bias, const MutableMatrix& y) {
  const RowSum sum = sum_of(tail, {}, bias, y);
  with_codes(weight.format,
             [&](auto codes) { FewRowsOf<decltype(codes)::kFormat>::multiply(context, x, weight, sum); });
}

bool few_rows_group_fits(const Matrix& x, std::span<const GroupedLayer> layers) {
  return std::ranges::all_of(layers, [&](const GroupedLayer& layer) {
    const Adapter &own = layer.adapter, &first = layers[0].adapter;
    Matrix tile = layer.part(x);
    tile.rows = std::min(tile.rows, kFewRowsQuantized);
    return layer.rows <= kFewRowsOfGroup && few_rows_quantized_fits(tile, layer.weight, {}) && own.a.ld == first.a.ld &&
           own.b.ld == first.b.ld && (!own.a0 || (own.a0.ld == first.a.ld && own.b0.ld == first.b.ld));
  });
}

void few_rows_group(const Context& context, const Matrix& x, std::span<const GroupedLayer> layers,
                    const MutableMatrix& y, const MutableMatrix& xa) {
  std::vector<GroupedLayer> busy;
  std::ranges::copy_if(layers, std::back_inserter(busy), [](const GroupedLayer& layer) { return layer.rows > 0; });
  for (std::size_t i = 0; i < busy.size(); i += kLayersOfLaunch) {
    const std::size_t count = std::min<std::size_t>(busy.size() - i, kLayersOfLaunch);
    multiply_layers(context, x, std::span(busy).subspan(i, count), y, xa);
  }
}

}  // namespace pissa::cuda
