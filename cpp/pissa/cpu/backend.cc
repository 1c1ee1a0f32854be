#include "pissa/cpu/backend.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "pissa/core/cholesky_qr.h"
#include "pissa/core/error.h"
#include "pissa/core/nested_scales.h"
#include "pissa/core/quantized.h"
#include "pissa/cpu/byte_product.h"
#include "pissa/cpu/cut.h"
#include "pissa/cpu/factorize.h"
#include "pissa/cpu/gemm_blocks.h"
#include "pissa/cpu/kernels.h"
#include "pissa/cpu/parallel.h"

namespace pissa::cpu {
namespace {

constexpr std::int64_t kAlignment = 64;
constexpr std::int64_t kFixedThreads = 4;  // that a product is cut for if its values depend on the cut

// Not std::aligned_alloc, which Windows lacks.
void* new_block(std::int64_t bytes) {
  return ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{kAlignment});
}

void delete_block(void* data) { ::operator delete(data, std::align_val_t{kAlignment}); }

// Freed memory of the calling thread, kept for the next buffer of the same size. The first access to a page costs a
// fault, about 1 us, which made the sums of the factors, 1 MB each, more expensive than the products that they are for.
// The pool is bounded: what was freed first makes room.
class Pool {
 public:
  ~Pool() {
    for (const Block& block : blocks_) delete_block(block.data);
  }
  void* take(std::int64_t bytes) {
    const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(), [&](const Block& b) { return b.bytes == bytes; });
    if (found == blocks_.rend()) return nullptr;
    void* data = found->data;
    blocks_.erase(std::next(found).base());
    held_ -= bytes;
    return data;
  }
  void keep(void* data, std::int64_t bytes) {
    if (bytes > kMostBytes) return delete_block(data);
    while (held_ + bytes > kMostBytes || blocks_.size() == kMostBlocks) {
      delete_block(blocks_.front().data);
      held_ -= blocks_.front().bytes;
      blocks_.erase(blocks_.begin());
    }
    blocks_.push_back({bytes, data});
    held_ += bytes;
  }
  Pool() { blocks_.reserve(kMostBlocks); }

 private:
  static constexpr std::int64_t kMostBytes = 16 << 20;
  static constexpr std::size_t kMostBlocks = 32;
  struct Block {
    std::int64_t bytes;
    void* data;
  };
  std::vector<Block> blocks_;
  std::int64_t held_ = 0;
};

Pool& pool() {
  thread_local Pool pool;
  return pool;
}

std::int64_t allocated_bytes(std::int64_t count, Format format) {
  return ceil_div(count * element_size(format), kAlignment) * kAlignment;
}

void* allocate(std::int64_t bytes) {
  if (bytes == 0) return nullptr;
  void* data = pool().take(bytes);
  return data ? data : new_block(bytes);
}

// Scratch of the calling thread: 1.9 MB, allocated on first use, freed with the thread.
const Panels& panels() {
  // 3 KB after A's strip, so that `scratch` does not begin with a page, as the rows of most weights do. Otherwise, a
  // load from a row would wait for a store to scratch at the same offset in its page, which cost 5% of a product with
  // 16 rows.
  constexpr std::int64_t kApart = 768;
  static constexpr std::array kSizes{
      kStripRows * (kKc + 16) + kApart, (kKc + kPanelPad) * kNc, (kMc + kStripRows) * kNc, 32 * kKc, kNc, kNc};
  pool();  // created before the buffer, so that it outlives it
  thread_local const Buffer buffer(1, std::reduce(kSizes.begin(), kSizes.end()));
  thread_local const Panels panels = [] {
    float* at[kSizes.size()] = {static_cast<float*>(buffer.view().data)};
    for (std::size_t i = 1; i < kSizes.size(); ++i) at[i] = at[i - 1] + kSizes[i - 1];
    return Panels{at[0], at[1], at[2], at[3], at[4], at[5]};
  }();
  return panels;
}

}  // namespace

void gemm_blocks(const Kernels& kernels, const GemmProblem& problem) {
  for (std::int64_t j = 0; j < problem.out.cols; j += kNc) {
    for (std::int64_t i = 0; i < problem.out.rows; i += kMc) {
      const Block block{i, std::min(kMc, problem.out.rows - i), j, std::min(kNc, problem.out.cols - j)};
      kernels.gemm_block(problem, block, panels());
    }
  }
}

Buffer::Buffer(std::int64_t rows, std::int64_t cols, Format format)
    : rows_(rows),
      cols_(cols),
      format_(format),
      data_(allocate(allocated_bytes(rows * cols, format)), Free{allocated_bytes(rows * cols, format)}) {}

void Buffer::Free::operator()(void* data) const { pool().keep(data, bytes); }

void CpuBackend::run(const GemmProblem& problem) const {
  const std::int64_t m = problem.out.rows;
  const std::int64_t n = problem.out.cols;
  if (m == 0 || n == 0) return;
  const std::int64_t columns = columns_of(problem);
  const Cut cut = kernels_.any_cut
                      ? best_cut(m, n, kernels_.tile_rows, columns, executor_.threads(), executor_.uneven())
                      : best_cut(m, n, kernels_.tile_rows, columns, kFixedThreads, false);
  const std::int64_t row_blocks = ceil_div(m, cut.rows);
  std::int64_t inner = 1;
  for (std::int64_t i = 0; i < problem.term_count; ++i) inner += problem.terms[i].inner();
  parallel_for(executor_, row_blocks * ceil_div(n, cut.cols), m * n * inner, [&](std::int64_t i) {
    const std::int64_t row = i % row_blocks * cut.rows;
    const std::int64_t col = i / row_blocks * cut.cols;
    const Block block{row, std::min(cut.rows, m - row), col, std::min(cut.cols, n - col)};
    kernels_.gemm_block(problem, block, panels());
  });
}

// scale * a^T in the number format that products of that precision take.
Buffer CpuBackend::turned(const Matrix& a, float scale, Precision precision) const {
  constexpr std::int64_t kRows = 64;
  Buffer out(a.cols, a.rows, kernels_.bf16 && precision == Precision::bf16 ? Format::bf16 : Format::f32);
  parallel_for(executor_, ceil_div(a.rows, kRows), 4 * a.rows * a.cols, [&](std::int64_t task) {
    const std::int64_t first = task * kRows;
    const std::int64_t rows = std::min(kRows, a.rows - first);
    const Buffer scratch(2, rows * a.cols);
    float* values = static_cast<float*>(scratch.view().data);
    float* columns = values + rows * a.cols;
    for (std::int64_t i = 0; i < rows; ++i) kernels_.decode(a, first + i, 0, a.cols, values + i * a.cols);
    for (std::int64_t i = 0; i < rows * a.cols; ++i) values[i] *= scale;
    kernels_.transpose(values, rows, a.cols, columns);
    for (std::int64_t j = 0; j < a.cols; ++j) {
      const MutableMatrix row = rows_of(out.view(), j, 1);
      kernels_.encode(columns + j * rows, rows, row.format,
                      static_cast<char*>(row.data) + first * element_size(row.format));
    }
  });
  return out;
}

// a^T b is computed from a stored a^T. Packing a thin a across its rows again for each block of columns took a third of
// the product. If there are fewer columns than rows, it is computed as (b^T a)^T, so that the long side runs along the
// panels of B.
void CpuBackend::gemm(std::span<const Term> terms, const Matrix& addend, const MutableMatrix& out) const {
  constexpr std::int64_t kMostTurned = 512;  // columns of a
  check_terms(terms);
  if (terms.size() != 1 || terms[0].op_a == Op::n || terms[0].op_b == Op::t || addend) {
    return run({terms.data(), static_cast<std::int64_t>(terms.size()), addend, {}, out});
  }
  auto [a, op_a, b, op_b, scale, precision] = terms[0];
  const bool swapped = out.cols < out.rows;
  if (swapped) std::swap(a, b);
  const bool thin = a.cols <= kMostTurned;
  const Buffer columns = turned(thin ? a : Matrix{}, scale, precision);
  const Term term =
      thin ? Term{columns.view(), Op::n, b, Op::n, 1.0f, precision} : Term{a, Op::t, b, Op::n, scale, precision};
  run({&term,
       1,
       {},
       {},
       {out.data, swapped ? out.cols : out.rows, swapped ? out.rows : out.cols, out.ld, out.format},
       swapped});
}

void CpuBackend::quantize(const float* values, std::int64_t count, const QuantOutput& out) const {
  kernels_.quantize(out.format, values, count, out.blocksize, out.global ? *out.global : 1.0f, out.codes, out.scales);
}

void CpuBackend::quantize(const Matrix& a, const QuantOutput& out) const {
  constexpr std::int64_t kLeastRun = 4096;  // elements, rounded up to whole blocks
  constexpr std::int64_t kRunsOfTask = 16;
  const std::int64_t run = ceil_div(kLeastRun, out.blocksize) * out.blocksize;
  const std::int64_t length = kRunsOfTask * run;
  const std::int64_t total = a.rows * a.cols;
  parallel_for(executor_, ceil_div(total, length), 8 * total, [&](std::int64_t task) {
    const Buffer buffer(1, run);
    float* values = static_cast<float*>(buffer.view().data);
    const std::int64_t end = std::min((task + 1) * length, total);
    for (std::int64_t first = task * length; first < end; first += run) {
      const std::int64_t count = std::min(run, end - first);
      for (std::int64_t i = first; i < first + count;) {  // from one or more rows
        const std::int64_t in_row = std::min(a.cols - i % a.cols, first + count - i);
        kernels_.decode(a, i / a.cols, i % a.cols, in_row, values + (i - first));
        i += in_row;
      }
      quantize(values, count, out.from(first));
    }
  });
}

// The number of rows whose sum one task quantises. For a run of blocks, a task also computes the parts of its
// neighbours' rows that the run touches, at most two rows, about 1 in 56. With fewer rows, the panels of the second
// factor, packed again for each task, would take longer than the products.
constexpr std::int64_t kQuantizedRows = 112;

namespace {

// The terms of those rows of a sum.
std::array<Term, kMostTerms> rows_of(std::span<const Term> terms, std::int64_t first, std::int64_t rows) {
  std::array<Term, kMostTerms> shifted;
  std::copy(terms.begin(), terms.end(), shifted.begin());
  for (std::size_t i = 0; i < terms.size(); ++i) shifted[i].a = pissa::rows_of(terms[i].a, first, rows);
  return shifted;
}

}  // namespace

void CpuBackend::gemm_quantized(std::span<const Term> terms, const Matrix& addend, const QuantOutput& out) const {
  check_terms(terms);
  if (terms.empty()) return quantize(addend, out);
  const std::int64_t cols = addend.cols;
  if (cols % out.blocksize == 0 && kNc % out.blocksize == 0) return gemm_quantized_within_rows(terms, addend, out);
  const BlockRuns runs(addend.rows, cols, out.blocksize, kQuantizedRows);
  executor_.parallel_for(runs.count(), [&](std::int64_t task) {
    const BlockRuns::Run run = runs[task];
    const Buffer values(run.rows, cols);
    gemm_blocks(kernels_, {rows_of(terms, run.first_row, run.rows).data(),
                           static_cast<std::int64_t>(terms.size()),
                           rows_of(addend, run.first_row, run.rows),
                           {},
                           values.view()});
    quantize(static_cast<const float*>(values.view().data) + run.skip(), run.count, out.from(run.first));
  });
}

// If blocks cross neither rows nor the columns of a block of the output, the codes are computed from its accumulators
// while they are in the cache, and nothing else is stored.
void CpuBackend::gemm_quantized_within_rows(std::span<const Term> terms, const Matrix& addend,
                                            const QuantOutput& out) const {
  const std::int64_t cols = addend.cols;
  executor_.parallel_for(ceil_div(addend.rows, kQuantizedRows), [&](std::int64_t task) {
    const std::int64_t first = task * kQuantizedRows;
    const std::int64_t rows = std::min(kQuantizedRows, addend.rows - first);
    const GemmProblem problem{terms.data(), static_cast<std::int64_t>(terms.size()), addend, {}, {nullptr, rows, cols}};
    for (std::int64_t col = 0; col < cols; col += kNc) {
      const Block block{first, rows, col, std::min(kNc, cols - col)};
      kernels_.gemm_block(problem, block, panels());
      for (std::int64_t i = 0; i < rows; ++i) {
        quantize(panels().c + i * kNc, block.cols, out.from((first + i) * cols + col));
      }
    }
  });
}

namespace {

// As quantize_with_feedback, on the calling thread.
void merge_with_feedback(const Kernels& kernels, const Matrix& weight, std::span<const Term> change,
                         const Matrix& lower, std::int64_t first, std::int64_t rows, Rounding rounding,
                         std::uint64_t seed, std::uint8_t* codes, MergeSums& sums) {
  const Buffer errors(rows, weight.cols);  // before their column is reached, the change
  const Buffer products(rows, kMergeRun);
  const MutableMatrix done = errors.view();
  gemm_blocks(kernels, {rows_of(change, first, rows).data(), static_cast<std::int64_t>(change.size()), {}, {}, done});
  for (std::int64_t col, last = weight.cols; last > 0; last = col) {
    col = (last - 1) / kMergeRun * kMergeRun;
    const std::int64_t later = weight.cols - last, count = last - col;
    const MutableMatrix group = cols_of(products.view(), 0, count);
    const Term product{cols_of(done, last, later), Op::n, cols_of(rows_of(lower, last, later), col, count)};
    gemm_blocks(kernels, {&product, 1, {}, {}, group});
    for (std::int64_t i = 0; i < rows; ++i) {
      kernels.merge_columns(weight, lower, first + i, col, count, static_cast<float*>(done.data) + i * done.ld + col,
                            static_cast<float*>(group.data) + i * group.ld, rounding, seed, codes, sums);
    }
  }
}

}  // namespace

MergeSums CpuBackend::merge_codes(const Matrix& weight, std::span<const Term> change, const Matrix& lower,
                                  Rounding rounding, std::uint64_t seed, std::uint8_t* codes) const {
  check_terms(change);
  static_assert(kMergeRun <= kNc);
  static_assert(kQuantizedRows % 8 == 0);  // so that no two tasks write to a byte
  std::vector<MergeSums> sums(ceil_div(weight.rows, kQuantizedRows));
  executor_.parallel_for(static_cast<std::int64_t>(sums.size()), [&](std::int64_t task) {
    const std::int64_t first = task * kQuantizedRows;
    const std::int64_t rows = std::min(kQuantizedRows, weight.rows - first);
    const std::int64_t begin = code_bytes(weight.format, first * weight.cols);
    const std::int64_t end = code_bytes(weight.format, (first + rows) * weight.cols);
    std::memcpy(codes + begin, static_cast<const std::uint8_t*>(weight.data) + begin, end - begin);
    const GemmProblem problem{
        change.data(), static_cast<std::int64_t>(change.size()), {}, {}, {nullptr, rows, weight.cols}};
    if (lower) {
      return merge_with_feedback(kernels_, weight, change, lower, first, rows, rounding, seed, codes, sums[task]);
    }
    for (std::int64_t col = 0; col < weight.cols; col += kNc) {
      const Block block{first, rows, col, std::min(kNc, weight.cols - col)};
      kernels_.gemm_block(problem, block, panels());
      for (std::int64_t i = 0; i < rows; ++i) {
        kernels_.merge_codes(weight, first + i, col, block.cols, panels().c + i * kNc, rounding, seed, codes,
                             sums[task]);
      }
    }
  });
  MergeSums total;
  for (const MergeSums& part : sums) {
    total.along += part.along, total.square += part.square;
    total.moved += part.moved, total.beyond += part.beyond;
  }
  return total;
}

// In f64, run by run, which gives the same bits for any number of threads.
float CpuBackend::mean(const float* values, std::int64_t count) const {
  constexpr std::int64_t kRun = 4096;
  std::vector<double> sums(ceil_div(count, kRun));
  parallel_for(executor_, ceil_div(count, kRun), count, [&](std::int64_t run) {
    const std::int64_t last = std::min((run + 1) * kRun, count);
    for (std::int64_t i = run * kRun; i < last; ++i) sums[run] += double{values[i]};
  });
  return static_cast<float>(std::accumulate(sums.begin(), sums.end(), 0.0) / static_cast<double>(count));
}

void CpuBackend::quantize_absmax(const float* absmax, std::int64_t count, const float* given, std::uint8_t* codes8,
                                 float* nested_absmax, float* offset) const {
  static const std::vector<std::uint8_t> code_of = [] {  // for every point, because searching takes ten times as long
    std::vector<std::uint8_t> codes(1 << 16);
    for (std::int32_t point = 0; point < 1 << 16; ++point) codes[point] = dynamic_code(point);
    return codes;
  }();
  const float center = given ? *given : mean(absmax, count);
  *offset = center;
  executor_.parallel_for(ceil_div(count, kNestedBlocksize), [&](std::int64_t block) {
    const std::int64_t first = block * kNestedBlocksize;
    const std::int64_t last = std::min(first + kNestedBlocksize, count);
    std::uint32_t bits = 0;  // of absolute values, as in max_abs: NaN is largest
    for (std::int64_t i = first; i < last; ++i) {
      bits = std::max(bits, std::bit_cast<std::uint32_t>(std::fabs(absmax[i] - center)));
    }
    const float largest = std::bit_cast<float>(bits);
    nested_absmax[block] = largest;
    for (std::int64_t i = first; i < last; ++i) {
      codes8[i] = largest > 0 ? code_of[dynamic_point((absmax[i] - center) / largest)] : std::uint8_t{0};
    }
  });
}

void CpuBackend::quantize_columns(const Matrix& w, const Matrix& lower, Format format, const Scales& scales,
                                  std::int64_t first, const MutableMatrix& errors, std::uint8_t* codes) const {
  constexpr std::int64_t kRows = 64;
  std::vector<float> reciprocals(errors.cols);
  for (std::int64_t j = 0; j < errors.cols; ++j) {
    reciprocals[j] = 1.0f / static_cast<const float*>(lower.data)[(first + j) * (lower.ld + 1)];
  }
  const std::int64_t work = w.rows * errors.cols * (errors.cols + 32);
  parallel_for(executor_, ceil_div(w.rows, kRows), work, [&](std::int64_t task) {
    const std::int64_t row = task * kRows;
    kernels_.quantize_columns(w, lower, reciprocals.data(), format, scales, row, std::min(kRows, w.rows - row), first,
                              errors, codes);
  });
}

void CpuBackend::weight_gemm(const Term& product, std::span<const Term> tail, const Matrix& bias,
                             const MutableMatrix& out) const {
  check_terms(tail, kMostTail);
  std::array<Term, 2 + kMostTail> terms{product};
  auto end = std::copy(tail.begin(), tail.end(), terms.begin() + 1);
  std::optional<ByteProduct> in_bytes;
  if (product.precision == Precision::int8 && product.inner() > 0) {
    in_bytes.emplace(kernels_, executor_, product);
    end = std::copy(in_bytes->apart().begin(), in_bytes->apart().end(), end);
  }
  run({terms.data(), end - terms.begin(), {}, bias, out, false, in_bytes ? &in_bytes->rows() : nullptr});
}

bool CpuBackend::multiplies_bytes(std::int64_t rows) const { return kernels_.bytes != 0 && rows > kDotRows; }

void CpuBackend::weight_gemm_nt(const Matrix& x, const Matrix& weight, float scale, Precision precision,
                                std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) const {
  weight_gemm({x, Op::n, weight, Op::t, scale, precision}, tail, bias, y);
}

void CpuBackend::weight_gemm_nn(const Matrix& dy, const Matrix& weight, float scale, Precision precision,
                                std::span<const Term> tail, const MutableMatrix& dx) const {
  weight_gemm({dy, Op::n, weight, Op::n, scale, precision}, tail, {}, dx);
}

std::unique_ptr<double[]> CpuBackend::gram(const Matrix& rows, const Matrix& others) const {
  constexpr std::int64_t kRows = 8;
  const std::int64_t k = rows.rows;
  const std::int64_t pieces = ceil_div(k, kRows);
  auto gram = std::make_unique<double[]>(k * k);
  // Row i has i + 1 elements. A piece from the top is paired with one from the bottom, so that tasks are equal.
  parallel_for(executor_, ceil_div(pieces, 2), k * k * rows.cols, [&](std::int64_t task) {
    for (const std::int64_t piece : {task, pieces - 1 - task}) {
      kernels_.gram(static_cast<const float*>(rows.data), static_cast<const float*>(others.data), rows.cols, rows.ld,
                    piece * kRows, std::min((piece + 1) * kRows, k), gram.get(), k);
      if (2 * task + 1 == pieces) break;  // the one in the middle
    }
  });
  return gram;
}

namespace {

// The least share of its length that a row has kept. `pivots` is what remains of a row outside the rows before it. The
// diagonal of `gram` contains what remained outside the earlier rows, and the overlap the rest, by Pythagoras.
double least_share_kept(const std::vector<double>& pivots, const double* gram, const MutableMatrix& overlap) {
  double least = 1.0;
  for (std::int64_t i = 0; i < overlap.rows; ++i) {
    double squared = gram[i * overlap.rows + i];
    const float* row = static_cast<const float*>(overlap.data) + i * overlap.ld;
    for (std::int64_t j = 0; j < overlap.cols; ++j) squared += double{row[j]} * double{row[j]};
    least = std::min(least, pivots[i] / std::sqrt(squared));
  }
  return least;
}

}  // namespace

// The share of other rows that the first round leaves in a row grows as one over the share of its length that the row
// kept. If that is large enough for every row, one round is enough.
void CpuBackend::orthonormalize(const MutableMatrix& basis, std::int64_t done, std::int64_t count, Rank) const {
  constexpr double kOnceIsEnough = 0.25;
  const MutableMatrix earlier = rows_of(basis, 0, done);
  const MutableMatrix rows = rows_of(basis, done, count);
  const Buffer inverse(count, count);
  const Buffer overlap(count, done);
  const Buffer other(count, basis.cols);
  MutableMatrix from = rows;
  MutableMatrix to = other.view();
  for (const auto& [least_ratio, least_pivot] : kCholeskyRounds) {
    if (done > 0) {
      const std::array projection{Term{from, Op::n, earlier, Op::t}};
      const std::array removal{Term{overlap.view(), Op::n, earlier, Op::n, -1.0f}};
      gemm(projection, {}, overlap.view());
      gemm(removal, from, from);
    }
    const auto gram_matrix = gram(from, from);
    float* inverse_data = static_cast<float*>(inverse.view().data);
    const auto pivots = cholesky_inverse(gram_matrix.get(), count, least_ratio, least_pivot, inverse_data);
    if (!pivots) {
      if (from.data != rows.data) copy(from, rows);
      return householder_rows(static_cast<float*>(basis.data), done, done + count, basis.cols, basis.ld);
    }
    const std::array normalization{Term{inverse.view(), Op::n, from, Op::n}};
    gemm(normalization, {}, to);
    std::swap(from, to);
    if (from.data != rows.data && least_share_kept(*pivots, gram_matrix.get(), overlap.view()) >= kOnceIsEnough) {
      return copy(from, rows);
    }
  }
}

// One more round, for a basis that deviates by no more than bf16's rounding. (Products in bf16 would be enough for
// everything except the overlap, to 2^-17 of a row, which is not enough if a basis fills the space.)
void CpuBackend::reorthonormalize(const MutableMatrix& basis, const MutableMatrix& companion, std::int64_t done,
                                  std::int64_t count) const {
  const Buffer overlap(count, done);
  const MutableMatrix rows = rows_of(basis, done, count);
  if (done > 0) {
    const std::array projection{Term{rows, Op::n, rows_of(basis, 0, done), Op::t}};
    gemm(projection, {}, overlap.view());
    for (const MutableMatrix& matrix : {basis, companion}) {
      const std::array removal{Term{overlap.view(), Op::n, rows_of(matrix, 0, done), Op::n, -1.0f}};
      gemm(removal, rows_of(matrix, done, count), rows_of(matrix, done, count));
    }
  }
  const Buffer inverse(count, count);
  const auto pivots =
      cholesky_inverse(gram(rows, rows).get(), count, 0.5, 0.5, static_cast<float*>(inverse.view().data));
  PISSA_CHECK(pivots, "reorthonormalize: the rows were not orthonormal before they were rounded");
  for (const MutableMatrix& matrix : {basis, companion}) {
    const MutableMatrix from = rows_of(matrix, done, count);
    const Buffer to(count, matrix.cols);
    const std::array normalization{Term{inverse.view(), Op::n, from, Op::n}};
    gemm(normalization, {}, to.view());
    copy(to.view(), from);
  }
}

void CpuBackend::gram_svd(const Matrix& rows, const Matrix& others, float scale, const MutableMatrix& s,
                          const MutableMatrix& vectors) const {
  std::vector<double> eigenvalues(vectors.rows);
  eigh(gram(rows, others).get(), rows.rows, eigenvalues, static_cast<float*>(vectors.data), vectors.ld);
  for (std::int64_t i = 0; i < vectors.rows; ++i) {
    static_cast<float*>(s.data)[i] = static_cast<float>(double{scale} * std::sqrt(eigenvalues[i]));
  }
}

static_assert(Backend<CpuBackend>);

}  // namespace pissa::cpu
