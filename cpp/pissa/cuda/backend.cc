#include "pissa/cuda/backend.h"

#include <algorithm>
#include <array>
#include <stdexcept>

#include "pissa/cuda/codes.h"
#include "pissa/cuda/eigh.h"
#include "pissa/cuda/elementwise.h"
#include "pissa/cuda/factorize.h"
#include "pissa/cuda/gemm.h"
#include "pissa/cuda/products.h"

namespace pissa::cuda {
namespace {

// from = from - (from earlier^T) earlier, and the same combination of another matrix's rows: block Gram-Schmidt.
void remove_earlier(const Context& context, const MutableMatrix& basis, const MutableMatrix& companion,
                    std::int64_t done, std::int64_t rows, std::int64_t count) {
  if (done == 0) return;
  const Buffer overlap(context, rows, done, Format::f32, count);
  const MutableMatrix new_rows = rows_of(basis, done, rows);
  const std::array projection{Term{new_rows, Op::n, rows_of(basis, 0, done), Op::t}};
  sum_of_products(context, projection, {}, overlap.view(), count);
  for (const MutableMatrix& matrix : {basis, companion}) {
    if (!matrix) continue;
    const MutableMatrix target = rows_of(matrix, done, rows);
    const std::array removal{Term{overlap.view(), Op::n, rows_of(matrix, 0, done), Op::n, -1.0f}};
    sum_of_products(context, removal, target, target, count);
  }
}

}  // namespace

void CudaBackend::copy(const Matrix& a, const MutableMatrix& out) const { convert_any(context_, a, out, count()); }

void CudaBackend::add(const Matrix& a, const Matrix& b, const MutableMatrix& out) const {
  if (!is_quantized(a.format)) return cuda::add(context_, a, b, out, count());
  const Buffer decoded(context_, a.rows, a.cols, Format::f32);
  convert_any(context_, a, decoded.view());
  cuda::add(context_, decoded.view(), b, out, count());
}

void CudaBackend::fill_signs(const MutableMatrix& out, std::uint64_t seed, float scale) const {
  cuda::fill_signs(context_, out, seed, scale, count());
}

void CudaBackend::scale_rows(const Matrix& a, const Matrix& s, float divisor, const MutableMatrix& out, Op op) const {
  cuda::scale_rows(context_, a, s, divisor, out, op, count());
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

void CudaBackend::weight_gemm_nt(const Matrix& x, const Matrix& weight, float scale, Precision precision,
                                 std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) const {
  for (std::int64_t i = 0; i < count(); ++i) {
    weight_product(context_, one_of(x, i), weights_.empty() ? weight : weights_[i], Op::t, scale, precision, tail, bias,
                   one_of(y, i), kChunkBytes);
  }
}

void CudaBackend::weight_gemm_nn(const Matrix& dy, const Matrix& weight, float scale, Precision precision,
                                 std::span<const Term> tail, const MutableMatrix& dx) const {
  for (std::int64_t i = 0; i < count(); ++i) {
    weight_product(context_, one_of(dy, i), weights_.empty() ? weight : weights_[i], Op::n, scale, precision, tail, {},
                   one_of(dx, i), kChunkBytes);
  }
}

// As the CPU's (cpu/backend.cc says why), with the triangular solve in f64, and always twice: looking whether once is
// enough would make the host wait.
void CudaBackend::orthonormalize(const MutableMatrix& basis, std::int64_t done, std::int64_t rows, Rank rank) {
  if (rank == Rank::assumed_full) return orthonormalize_one(basis, done, rows, rank, flags(), count());
  for (std::int64_t i = 0; i < count(); ++i) orthonormalize_one(one_of(basis, i), done, rows, rank, flags() + i, 1);
}

void CudaBackend::orthonormalize_one(const MutableMatrix& basis, std::int64_t done, std::int64_t rows, Rank rank,
                                     int* flags, std::int64_t count) {
  if (rows == 0) return;
  struct Round {
    double least_share, least_pivot;
  };
  constexpr Round kRounds[] = {{1e-5, 0.0}, {0.5, 0.5}};
  const MutableMatrix target = rows_of(basis, done, rows);
  const Array<double> wide(context_, count * rows * basis.cols);
  const Array<double> factor(context_, count * rows * rows);
  // What is asked at once has a word of its own: what is left for had_full_rank stays there.
  std::optional<Array<int>> asked;
  if (rank == Rank::any) {
    asked.emplace(context_, 1);
    check(cudaMemsetAsync(asked->data(), 0, sizeof(int), context_.stream), context_, "cudaMemsetAsync");
  }
  for (const auto& [least_share, least_pivot] : kRounds) {
    remove_earlier(context_, basis, {}, done, rows, count);
    widen(context_, target, wide.data(), count);
    gram(context_, wide.data(), rows, basis.cols, true, factor.data(), count);
    cholesky(context_, factor.data(), rows, least_share, least_pivot, kDependentRows, asked ? asked->data() : flags,
             count);
    if (asked && take_flag(asked->data())) {
      return householder_rows(context_, rows_of(basis, 0, done + rows), done, flags);
    }
    solve_lower(context_, factor.data(), rows, wide.data(), basis.cols, count);
    narrow(context_, wide.data(), target, count);
  }
}

// One more round, for a basis that misses by no more than bf16's rounding.
void CudaBackend::reorthonormalize(const MutableMatrix& basis, const MutableMatrix& companion, std::int64_t done,
                                   std::int64_t rows) {
  if (rows == 0) return;
  remove_earlier(context_, basis, companion, done, rows, count());
  const Array<double> factor(context_, count() * rows * rows);
  const Array<double> wide(context_, count() * rows * std::max(basis.cols, companion.cols));
  for (const MutableMatrix& matrix : {basis, companion}) {
    const MutableMatrix target = rows_of(matrix, done, rows);
    widen(context_, target, wide.data(), count());
    if (matrix.data == basis.data) {
      gram(context_, wide.data(), rows, basis.cols, true, factor.data(), count());
      cholesky(context_, factor.data(), rows, 0.5, 0.5, kDependentRows, flags(), count());
    }
    solve_lower(context_, factor.data(), rows, wide.data(), matrix.cols, count());
    narrow(context_, wide.data(), target, count());
  }
}

void CudaBackend::gram_svd(const Matrix& rows, float scale, const MutableMatrix& s, const MutableMatrix& vectors) {
  constexpr std::int64_t kSlab = 1024;  // columns in f64 at a time
  const std::int64_t k = rows.rows;
  const Array<double> matrix(context_, count() * k * k);
  {
    const Array<double> slab(context_, count() * k * std::min(kSlab, rows.cols));
    for (std::int64_t first = 0; first < rows.cols; first += kSlab) {
      Matrix part = rows;
      part.data = static_cast<const float*>(rows.data) + first;
      part.cols = std::min(kSlab, rows.cols - first);
      widen(context_, part, slab.data(), count());
      gram(context_, slab.data(), k, part.cols, first == 0, matrix.data(), count());
    }
  }
  leading_eigh(context_, matrix.data(), k, scale, s, vectors, flags(), count());
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

static_assert(Backend<CudaBackend>);

}  // namespace pissa::cuda
