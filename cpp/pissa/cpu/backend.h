// The CPU backend: the core's primitives over kernels.h and factorize.h, in blocks, and threaded by an executor.
// Results are bitwise the same for any number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pissa/core/backend.h"
#include "pissa/core/merge_codes.h"
#include "pissa/core/types.h"
#include "pissa/cpu/executor.h"

namespace pissa::cpu {

struct GemmProblem;
struct Kernels;

/// A matrix that owns its memory, 64-byte aligned, uninitialised. Freed memory is kept, within bounds, for the thread's
/// next buffers.
class Buffer {
 public:
  Buffer(std::int64_t rows, std::int64_t cols, Format format = Format::f32);
  /// Lives no longer than the buffer.
  MutableMatrix view() const { return {data_.get(), rows_, cols_, cols_, format_}; }

 private:
  struct Free {
    std::int64_t bytes;
    void operator()(void* data) const;
  };
  std::int64_t rows_;
  std::int64_t cols_;
  Format format_;
  std::unique_ptr<void, Free> data_;
};

/// The Backend for CPUs. Several threads may use the same one at the same time.
class CpuBackend {
 public:
  /// Both must outlive the backend.
  CpuBackend(const Executor& executor, const Kernels& kernels) : executor_(executor), kernels_(kernels) {}

  // The Backend concept; pissa/core/backend.h describes each operation.
  Buffer alloc(std::int64_t rows, std::int64_t cols, Format format) const { return {rows, cols, format}; }
  void copy(const Matrix& a, const MutableMatrix& out) const;
  void decode_rows(const Matrix& a, const std::int64_t* rows, const MutableMatrix& out) const;
  void add(const Matrix& a, const Matrix& b, const MutableMatrix& out) const;
  void subtract(const Matrix& a, const Matrix& b, const MutableMatrix& out, double* squares) const;
  void fill_signs(const MutableMatrix& out, std::uint64_t seed, float scale) const;
  void scale_rows(const Matrix& a, const Matrix& s, float divisor, const MutableMatrix& out, Op op) const;
  void normalize_rows(const Matrix& a, const MutableMatrix& out) const;
  bool multiplies_in(Format format) const { return format == Format::bf16; }
  void max_abs(std::span<const Matrix> matrices, float* largest) const;
  std::vector<float> read(const float* from, std::int64_t count) const { return {from, from + count}; }
  void gemm(std::span<const Term> terms, const Matrix& addend, const MutableMatrix& out) const;
  void gemm_quantized(std::span<const Term> terms, const Matrix& addend, const QuantOutput& out) const;
  void quantize_absmax(const float* absmax, std::int64_t count, const float* given, std::uint8_t* codes8,
                       float* nested_absmax, float* offset) const;
  static constexpr std::int64_t kScoredTokens = 512;    // rows of one block of a product
  static constexpr std::int64_t kLogitBytes = 4 << 20;  // in a shared cache
  void add_scores(const MutableMatrix& logits, const std::int64_t* labels, std::int64_t first, float scale, float cap,
                  const MutableMatrix& state, const MutableMatrix& earlier, bool gradient) const;
  void finish_scores(const Matrix& state, const std::int64_t* labels, const Matrix& weight, float scale, float cap,
                     const MutableMatrix& scores, const Matrix& sum, const MutableMatrix& dx) const;
  void quantize_columns(const Matrix& w, const Matrix& lower, Format format, const Scales& scales, std::int64_t first,
                        const MutableMatrix& errors, std::uint8_t* codes) const;
  /// Writes all codes of a quantised weight [rows, cols] after a change, the sum of at most kMostTerms products [rows,
  /// k] [k, cols], whose first operands are not transposed. codes: code_bytes(format, rows * cols), not the old ones.
  /// lower: empty, or for error feedback as in quantize_with_feedback, [cols, cols] f32.
  MergeSums merge_codes(const Matrix& weight, std::span<const Term> change, const Matrix& lower, Rounding rounding,
                        std::uint64_t seed, std::uint8_t* codes) const;
  void weight_gemm_nt(const Matrix& x, const Matrix& weight, float scale, Precision precision,
                      std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) const;
  void weight_gemm_nn(const Matrix& dy, const Matrix& weight, float scale, Precision precision,
                      std::span<const Term> tail, const MutableMatrix& dx) const;
  bool multiplies_bytes(std::int64_t rows) const;
  Matrix decode_ahead(const Matrix& weight, Op, Precision, std::int64_t) const { return weight; }  // products decode it
  std::vector<std::int64_t> nonzero_rows(const Matrix& a) const;
  void take_rows(const Matrix& a, std::span<const std::int64_t> rows, const MutableMatrix& out) const;
  void put_rows(const Matrix& a, std::span<const std::int64_t> rows, const MutableMatrix& out) const;
  void orthonormalize(const MutableMatrix& basis, std::int64_t done, std::int64_t count, Rank rank) const;
  void reorthonormalize(const MutableMatrix& basis, const MutableMatrix& companion, std::int64_t done,
                        std::int64_t count) const;
  bool had_full_rank() const { return true; }  // rank deficiency is handled where it is found
  void gram_svd(const Matrix& rows, const Matrix& others, float scale, const MutableMatrix& s,
                const MutableMatrix& vectors) const;

 private:
  void run(const GemmProblem& problem) const;
  Buffer turned(const Matrix& a, float scale, Precision precision) const;
  void weight_gemm(const Term& product, std::span<const Term> tail, const Matrix& bias, const MutableMatrix& out) const;
  void quantize(const float* values, std::int64_t count, const QuantOutput& out) const;
  void quantize(const Matrix& a, const QuantOutput& out) const;
  void gemm_quantized_within_rows(std::span<const Term> terms, const Matrix& addend, const QuantOutput& out) const;
  float mean(const float* values, std::int64_t count) const;
  std::unique_ptr<double[]> gram(const Matrix& rows, const Matrix& others) const;

  const Executor& executor_;
  const Kernels& kernels_;
};

}  // namespace pissa::cpu
