// The CUDA backend: the core's primitives on a GPU, for one problem or for a stack of equal ones.
//
// Everything is queued on the context's stream and allocated there; read and had_full_rank wait for it, and
// orthonormalize where rows may be dependent. So what has none of these, the linear layer, can be captured into a CUDA
// graph. Results are bitwise the same from run to run on one device and one cuBLAS; from the CPU's they differ by
// rounding, the sketch and quantised codes excepted, which are bitwise equal.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "pissa/core/backend.h"
#include "pissa/core/grouped_linear.h"
#include "pissa/core/types.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/weight.h"

namespace pissa::cuda {

/// Scratch memory of one decoded chunk of a weight: fits in the L2 of the large cards. A product with a quantised
/// weight of any size allocates two at most.
inline constexpr std::int64_t kChunkBytes = 32 << 20;

/// The Backend for a GPU. Matrices are in its memory; everything is queued on the context's stream.
class CudaBackend {
 public:
  /// The context must outlive the backend.
  explicit CudaBackend(const Context& context) : context_(context) {}

  /// For a stack of problems: weights of one shape and format. Every matrix that alloc returns is weights.size() of
  /// them, and the weight that the core names stands for all. They must outlive the backend.
  CudaBackend(const Context& context, std::span<const Matrix> weights) : context_(context), weights_(weights) {}

  CudaBackend(const CudaBackend&) = delete;

  // The Backend concept; pissa/core/backend.h says what each does.
  Buffer alloc(std::int64_t rows, std::int64_t cols, Format format) const {
    return {context_, rows, cols, format, count()};
  }
  void copy(const Matrix& a, const MutableMatrix& out) const;
  void decode_rows(const Matrix& a, const std::int64_t* rows, const MutableMatrix& out) const;  // of a quantised one
  void add(const Matrix& a, const Matrix& b, const MutableMatrix& out) const;
  void subtract(const Matrix& a, const Matrix& b, const MutableMatrix& out, double* squares) const;  // of one problem
  void add_both(const Sum& first, const Sum& second) const;
  void fill_signs(const MutableMatrix& out, std::uint64_t seed, float scale) const;
  void scale_rows(const Matrix& a, const Matrix& s, float divisor, const MutableMatrix& out, Op op) const;
  void normalize_rows(const Matrix& a, const MutableMatrix& out) const;
  bool multiplies_in(Format format) const { return format == Format::bf16 || format == Format::f16; }
  void max_abs(std::span<const Matrix> matrices, float* largest) const;
  std::vector<float> read(const float* from, std::int64_t count) const;
  void gemm(std::span<const Term> terms, const Matrix& addend, const MutableMatrix& out) const;
  void gemm_quantized(std::span<const Term> terms, const Matrix& addend, const QuantOutput& out) const;
  void quantize_absmax(const float* absmax, std::int64_t count, const float* given, std::uint8_t* codes8,
                       float* nested_absmax, float* offset) const;
  static constexpr std::int64_t kScoredTokens = 4096;
  static constexpr std::int64_t kLogitBytes = 64 << 20;  // of 4,096 rows of the vocabulary
  void add_scores(const MutableMatrix& logits, const std::int64_t* labels, std::int64_t first, float scale, float cap,
                  const MutableMatrix& state, const MutableMatrix& earlier, bool gradient) const;  // of one problem
  void finish_scores(const Matrix& state, const std::int64_t* labels, const Matrix& weight, float scale, float cap,
                     const MutableMatrix& scores, const Matrix& sum, const MutableMatrix& dx) const;  // of one problem
  void quantize_columns(const Matrix& w, const Matrix& lower, Format format, const Scales& scales, std::int64_t first,
                        const MutableMatrix& errors, std::uint8_t* codes) const;  // of one problem
  /// y in half precision is rounded once more than pissa/core/backend.h says, after the tail, for more than 16 rows.
  void weight_gemm_nt(const Matrix& x, const Weight& weight, float scale, Precision precision,
                      std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) const;
  void weight_gemm_nn(const Matrix& dy, const Weight& weight, float scale, Precision precision,
                      std::span<const Term> tail, const MutableMatrix& dx) const;
  /// Decodes a quantised weight that fits into one chunk, for more than 16 rows.
  Weight decode_ahead(const Matrix& weight, Op op, Precision precision, std::int64_t rows) const;
  /// In two launches, for at most 128 rows of a layer in half precision; false for more.
  bool multiply_group(const Matrix& x, std::span<const GroupedLayer> layers, const MutableMatrix& y,
                      const MutableMatrix& xa) const;
  void orthonormalize(const MutableMatrix& basis, std::int64_t done, std::int64_t rows, Rank rank);
  void reorthonormalize(const MutableMatrix& basis, const MutableMatrix& companion, std::int64_t done,
                        std::int64_t rows);
  bool had_full_rank();
  std::vector<bool> had_full_ranks();  // of each matrix of the stack
  void gram_svd(const Matrix& rows, const Matrix& others, float scale, const MutableMatrix& s,
                const MutableMatrix& vectors);

 private:
  std::int64_t count() const { return weights_.empty() ? 1 : static_cast<std::int64_t>(weights_.size()); }
  void weight_gemm(const Matrix& x, const Weight& weight, Op op, float scale, Precision precision,
                   std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) const;
  void orthonormalize_one(const MutableMatrix& basis, std::int64_t done, std::int64_t rows, Rank rank, int* flags,
                          std::int64_t count);
  int* flags();
  std::vector<int> take(int* flags, std::int64_t count) const;  // to the host, and cleared
  bool take_flag(int* flag) const;

  const Context& context_;
  std::span<const Matrix> weights_;
  std::optional<Array<int>> flags_;  // of factorize.h, one word for each matrix of the stack
};

}  // namespace pissa::cuda
