// The CPU backend, counting how often it reads one matrix, the weight.
#pragma once

#include <cstdint>
#include <span>

#include "pissa/cpu/backend.h"

namespace pissa::test {

class CountingBackend : public cpu::CpuBackend {
 public:
  CountingBackend(const cpu::Executor& executor, const cpu::Kernels& kernels, const Matrix& weight)
      : CpuBackend(executor, kernels), weight_(weight.data) {}

  std::int64_t passes = 0;  // products with the weight
  std::int64_t others = 0;  // any other operation that reads it, but for max_abs

  void weight_gemm_nt(const Matrix& x, const Matrix& weight, float scale, Precision precision,
                      std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) {
    passes += weight.data == weight_;
    CpuBackend::weight_gemm_nt(x, weight, scale, precision, tail, bias, y);
  }
  void weight_gemm_nn(const Matrix& dy, const Matrix& weight, float scale, Precision precision,
                      std::span<const Term> tail, const MutableMatrix& dx) {
    passes += weight.data == weight_;
    CpuBackend::weight_gemm_nn(dy, weight, scale, precision, tail, dx);
  }
  void gemm(std::span<const Term> terms, const Matrix& addend, const MutableMatrix& out) {
    for (const Term& term : terms) others += term.a.data == weight_ || term.b.data == weight_;
    others += addend.data == weight_;
    CpuBackend::gemm(terms, addend, out);
  }
  void copy(const Matrix& a, const MutableMatrix& out) {
    others += a.data == weight_;
    CpuBackend::copy(a, out);
  }
  void add(const Matrix& a, const Matrix& b, const MutableMatrix& out) {
    others += a.data == weight_ || b.data == weight_;
    CpuBackend::add(a, b, out);
  }

 private:
  const void* weight_;
};

}  // namespace pissa::test
