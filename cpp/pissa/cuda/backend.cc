#include "pissa/cuda/backend.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

#include "pissa/core/cholesky_qr.h"
#include "pissa/cuda/codes.h"
#include "pissa/cuda/eigh.h"
#include "pissa/cuda/elementwise.h"
#include "pissa/cuda/factorize.h"
#include "pissa/cuda/few_rows.h"
#include "pissa/cuda/gemm.h"
#include "pissa/cuda/products.h"
#include "pissa/cuda/token_scores.h"

namespace pissa::cuda {
namespace {

// rows = rows - overlap earlier
void take_out(const Context& context, const Buffer& overlap, const Matrix& earlier, const MutableMatrix& rows,
              std::int64_t count) {
  const std::array removal{Term{overlap.view(), Op::n, earlier, Op::n, -1.0f}};
  sum_of_products(context, removal, rows, rows, count);
}

// Block Gram-Schmidt: takes out of the rows what lies in the span of earlier ones. Returns how much: rows earlier^T.
Buffer remove_earlier(const Context& context, const Matrix& earlier, const MutableMatrix& rows, std::int64_t count) {
  Buffer overlap(context, rows.rows, earlier.rows, Format::f32, count);
  if (earlier.rows == 0) return overlap;
  const std::array projection{Term{rows, Op::n, earlier, Op::t}};
  sum_of_products(context, projection, {}, overlap.view(), count);
  take_out(context, overlap, earlier, rows, count);
  return overlap;
}

// [count][k, k] = rows others^T in f64, which is symmetric.
Array<double> gram_of(const Context& context, const Matrix& rows, const Matrix& others, std::int64_t count) {
  constexpr std::int64_t kSlab = 1024;  // columns in f64 at a time
  const std::int64_t k = rows.rows;
  const bool same = rows.data == others.data;
  Array<double> result(context, count * k * k);
  const std::int64_t size = count * k * std::min(kSlab, rows.cols);
  const Array<double> slab(context, size), other_slab(context, same ? 0 : size);
  for (std::int64_t first = 0; first < rows.cols; first += kSlab) {
    const std::int64_t cols = std::min(kSlab, rows.cols - first);
    const auto widened = [&](Matrix part, const Array<double>& to) {
      part.data = static_cast<const float*>(part.data) + first;
      part.cols = cols;
      widen(context, part, to.data(), count);
      return to.data();
    };
    const double* left = widened(rows, slab);
    gram(context, left, same ? left : widened(others, other_slab), k, cols, first == 0, result.data(), count);
  }
  return result;
}

// What makes rows orthonormal: the inverse of their Gram matrix's Cholesky factor; flags say where there is none.
Buffer normalization_of(const Context& context, const Matrix& rows, double least_share, double least_pivot, int* flags,
                        std::int64_t count) {
  const Array<double> factor = gram_of(context, rows, rows, count);
  cholesky(context, factor.data(), rows.rows, least_share, least_pivot, kDependentRows, flags, count);
  Buffer inverse(context, rows.rows, rows.rows, Format::f32, count);
  invert_lower(context, factor.data(), rows.rows, flags, inverse.view(), count);
  return inverse;
}

// out = normalization rows
void normalize(const Context& context, const Buffer& normalization, const Matrix& rows, const MutableMatrix& out,
               std::int64_t count) {
  const std::array product{Term{normalization.view(), Op::n, rows, Op::n}};
  sum_of_products(context, product, {}, out, count);
}

}  // namespace

void CudaBackend::copy(const Matrix& a, const MutableMatrix& out) const { convert_any(context_, a, out, count()); }

void CudaBackend::decode_rows(const Matrix& a, const std::int64_t* rows, const MutableMatrix& out) const {
  if (out.rows > 0 && out.cols > 0) cuda::decode_rows(context_, a, rows, out);
}

void CudaBackend::add(const Matrix& a, const Matrix& b, const MutableMatrix& out) const {
  if (!is_quantized(a.format)) return cuda::add(context_, {a, b, out}, {}, count());
  const Buffer decoded(context_, a.rows, a.cols, Format::f32);
  convert_any(context_, a, decoded.view());
  cuda::add(context_, {decoded.view(), b, out}, {}, count());
}

void CudaBackend::subtract(const Matrix& a, const Matrix& b, const MutableMatrix& out, double* squares) const {
  Differences differences(context_);
  if (!is_quantized(b.format)) {
    differences.subtract(a, b, out);
  } else {
    const std::int64_t step = std::max<std::int64_t>(kChunkBytes / (4 * std::max<std::int64_t>(b.cols, 1)), 1);
    for (std::int64_t row = 0; row < b.rows; row += step) {
      const std::int64_t rows = std::min(step, b.rows - row);
      const Buffer decoded(context_, rows, b.cols, Format::f32);
      decode_codes(context_, b, row, 0, decoded.view());
      differences.subtract(rows_of(a, row, rows), decoded.view(), rows_of(out, row, rows));
    }
  }
  differences.sum(squares);
}

void CudaBackend::add_both(const Sum& first, const Sum& second) const { cuda::add(context_, first, second, count()); }

void CudaBackend::fill_signs(const MutableMatrix& out, std::uint64_t seed, float scale) const {
  cuda::fill_signs(context_, out, seed, scale, count());
}

void CudaBackend::scale_rows(const Matrix& a, const Matrix& s, float divisor, const MutableMatrix& out, Op op) const {
  cuda::scale_rows(context_, a, s, divisor, out, op, count());
}

void CudaBackend::normalize_rows(const Matrix& a, const MutableMatrix& out) const {
  cuda::normalize_rows(context_, a, out, count());
}

void CudaBackend::max_abs(std::span<const Matrix> matrices, float* largest) const {
  const std::size_t bytes = matrices.size() * sizeof(float);
  check(cudaMemsetAsync(largest, 0, bytes, context_.stream), context_, "cudaMemsetAsync", "bytes", bytes);
  raise_max_abs(context_, matrices, largest);
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& matrix = matrices[i];
    if (!is_quantized(matrix.format)) continue;
    const std::int64_t step = std::max<std::int64_t>(kChunkBytes / (4 * std::max<std::int64_t>(matrix.cols, 1)), 1);
    for (std::int64_t row = 0; row < matrix.rows; row += step) {
      const Buffer decoded(context_, std::min(step, matrix.rows - row), matrix.cols, Format::f32);
      decode_codes(context_, matrix, row, 0, decoded.view());
      const Matrix part = decoded.view();
      raise_max_abs(context_, std::span(&part, 1), largest + i);
    }
  }
}

std::vector<float> CudaBackend::read(const float* from, std::int64_t count) const {
  std::vector<float> values(static_cast<std::size_t>(count));
  read_back(context_, from, values.data(), count * static_cast<std::int64_t>(sizeof(float)));
  return values;
}

void CudaBackend::gemm(std::span<const Term> terms, const Matrix& addend, const MutableMatrix& out) const {
  sum_of_products(context_, terms, addend, out, count());
}

void CudaBackend::gemm_quantized(std::span<const Term> terms, const Matrix& addend, const QuantOutput& out) const {
  quantized_sum(context_, terms, addend, out, kChunkBytes);
}

void CudaBackend::quantize_columns(const Matrix& w, const Matrix& lower, Format format, const Scales& scales,
                                   std::int64_t first, const MutableMatrix& errors, std::uint8_t* codes) const {
  cuda::quantize_columns(context_, w, lower, format, scales, first, errors, codes);
}

void CudaBackend::add_scores(const MutableMatrix& logits, const std::int64_t* labels, std::int64_t first, float scale,
                             float cap, const MutableMatrix& state, const MutableMatrix& earlier, bool gradient) const {
  cuda::add_scores(context_, logits, labels, first, scale, cap, state, earlier, gradient);
}

void CudaBackend::finish_scores(const Matrix& state, const std::int64_t* labels, const Matrix& weight, float scale,
                                float cap, const MutableMatrix& scores, const Matrix& sum,
                                const MutableMatrix& dx) const {
  cuda::finish_scores(context_, state, labels, weight, scale, cap, scores, sum, dx);
}

void CudaBackend::weight_gemm_nt(const Matrix& x, const Weight& weight, float scale, Precision precision,
                                 std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) const {
  weight_gemm(x, weight, Op::t, scale, precision, tail, bias, y);
}

void CudaBackend::weight_gemm_nn(const Matrix& dy, const Weight& weight, float scale, Precision precision,
                                 std::span<const Term> tail, const MutableMatrix& dx) const {
  weight_gemm(dy, weight, Op::n, scale, precision, tail, {}, dx);
}

void CudaBackend::weight_gemm(const Matrix& x, const Weight& weight, Op op, float scale, Precision precision,
                              std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) const {
  const auto multiply = [&](const Matrix& x_part, const Weight& of, const MutableMatrix& y_part) {
    weight_product(context_, x_part, of, op, scale, precision, tail, bias, y_part, kChunkBytes);
  };
  if (weights_.empty()) return multiply(x, weight, y);
  for (std::int64_t i = 0; i < count(); ++i) multiply(one_of(x, i), weights_[i], one_of(y, i));
}

Weight CudaBackend::decode_ahead(const Matrix& weight, Op op, Precision precision, std::int64_t rows) const {
  if (!is_quantized(weight.format) || rows <= (op == Op::t ? kFewRowsQuantized : kFewRows)) return weight;
  const Format format = common_format(weight, weight, precision);
  const std::int64_t bytes = weight.rows * weight.cols * element_size(format);
  if (bytes == 0 || bytes > kChunkBytes) return weight;
  return {context_, weight, format};
}

bool CudaBackend::multiply_group(const Matrix& x, std::span<const GroupedLayer> layers, const MutableMatrix& y,
                                 const MutableMatrix& xa) const {
  return grouped_product(context_, x, layers, y, xa);
}

// Always both rounds: looking whether one is enough would make the host wait.
void CudaBackend::orthonormalize(const MutableMatrix& basis, std::int64_t done, std::int64_t rows, Rank rank) {
  if (rank == Rank::assumed_full) return orthonormalize_one(basis, done, rows, rank, flags(), count());
  for (std::int64_t i = 0; i < count(); ++i) orthonormalize_one(one_of(basis, i), done, rows, rank, flags() + i, 1);
}

void CudaBackend::orthonormalize_one(const MutableMatrix& basis, std::int64_t done, std::int64_t rows, Rank rank,
                                     int* flags, std::int64_t count) {
  if (rows == 0) return;
  const MutableMatrix target = rows_of(basis, done, rows);
  const Buffer other(context_, rows, basis.cols, Format::f32, count);
  // What is asked at once has a word of its own: what is left for had_full_rank stays there.
  std::optional<Array<int>> asked;
  if (rank == Rank::any) {
    asked.emplace(context_, 1);
    check(cudaMemsetAsync(asked->data(), 0, sizeof(int), context_.stream), context_, "cudaMemsetAsync");
  }
  MutableMatrix from = target;
  MutableMatrix to = other.view();
  for (const auto& [least_share, least_pivot] : kCholeskyRounds) {
    remove_earlier(context_, rows_of(basis, 0, done), from, count);
    const Buffer normalization =
        normalization_of(context_, from, least_share, least_pivot, asked ? asked->data() : flags, count);
    if (asked && take_flag(asked->data())) {
      if (from.data != target.data) convert(context_, from, 1.0f, target, count);
      return householder_rows(context_, rows_of(basis, 0, done + rows), done, flags);
    }
    normalize(context_, normalization, from, to, count);
    std::swap(from, to);
  }
}

// One more round, for a basis that misses by no more than bf16's rounding.
void CudaBackend::reorthonormalize(const MutableMatrix& basis, const MutableMatrix& companion, std::int64_t done,
                                   std::int64_t rows) {
  if (rows == 0) return;
  const Buffer overlap = remove_earlier(context_, rows_of(basis, 0, done), rows_of(basis, done, rows), count());
  if (done > 0) {
    take_out(context_, overlap, rows_of(companion, 0, done), rows_of(companion, done, rows), count());
  }
  const Buffer normalization = normalization_of(context_, rows_of(basis, done, rows), 0.5, 0.5, flags(), count());
  for (const MutableMatrix& matrix : {basis, companion}) {
    const MutableMatrix target = rows_of(matrix, done, rows);
    const Buffer from(context_, rows, matrix.cols, Format::f32, count());
    convert(context_, target, 1.0f, from.view(), count());
    normalize(context_, normalization, from.view(), target, count());
  }
}

void CudaBackend::gram_svd(const Matrix& rows, const Matrix& others, float scale, const MutableMatrix& s,
                           const MutableMatrix& vectors) {
  const Array<double> matrix = gram_of(context_, rows, others, count());
  leading_eigh(context_, matrix.data(), rows.rows, scale, s, vectors, flags(), count());
}

int* CudaBackend::flags() {
  if (!flags_) {
    flags_.emplace(context_, count());
    check(cudaMemsetAsync(flags_->data(), 0, static_cast<std::size_t>(count()) * sizeof(int), context_.stream),
          context_, "cudaMemsetAsync");
  }
  return flags_->data();
}

std::vector<int> CudaBackend::take(int* flags, std::int64_t count) const {
  std::vector<int> host(static_cast<std::size_t>(count));
  const std::size_t bytes = host.size() * sizeof(int);
  read_back(context_, flags, host.data(), static_cast<std::int64_t>(bytes));
  check(cudaMemsetAsync(flags, 0, bytes, context_.stream), context_, "cudaMemsetAsync");
  return host;
}

bool CudaBackend::take_flag(int* flag) const { return take(flag, 1)[0] != 0; }

bool CudaBackend::had_full_rank() {
  return std::ranges::all_of(had_full_ranks(), [](bool full) { return full; });
}

std::vector<bool> CudaBackend::had_full_ranks() {
  if (!flags_) return std::vector<bool>(static_cast<std::size_t>(count()), true);
  const std::vector<int> taken = take(flags_->data(), count());
  // Dependent rows end as NaN, of which there are no eigenvalues; only without them is that a failure of its own.
  if (std::ranges::any_of(taken, [](int flag) { return flag == kNotConverged; })) {
    throw std::runtime_error("the eigenvalues of a Gram matrix did not converge on the CUDA device");
  }
  std::vector<bool> full;
  for (const int flag : taken) full.push_back(flag == 0);
  return full;
}

void CudaBackend::quantize_absmax(const float* absmax, std::int64_t count, const float* given, std::uint8_t* codes8,
                                  float* nested_absmax, float* offset) const {
  cuda::quantize_absmax(context_, absmax, count, given, codes8, nested_absmax, offset);
}

static_assert(KeepsFactorSums<CudaBackend>);
static_assert(MultipliesGroups<CudaBackend>);

}  // namespace pissa::cuda
