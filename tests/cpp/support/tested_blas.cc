#include "pissa/cpu/blas.h"
#include "pissa/cpu/isa.h"
#include "support/isa_test.h"

namespace pissa::test {
namespace {

// cblas_sgemm as its manual defines it. CblasTrans is 112.
void sgemm(int, int op_a, int op_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
           float beta, float* c, int ldc) {
  const auto element = [](const float* matrix, int ld, int op, int row, int col) {
    return op == 112 ? matrix[std::int64_t{col} * ld + row] : matrix[std::int64_t{row} * ld + col];
  };
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      float sum = 0;
      for (int l = 0; l < k; ++l) sum += element(a, lda, op_a, i, l) * element(b, ldb, op_b, l, j);
      float& to = c[std::int64_t{i} * ldc + j];
      to = alpha * sum + beta * to;
    }
  }
}

template <bool fastest>
const cpu::Kernels& table() {
  static const std::vector<std::string> isas = cpu::available_isas();
  static const cpu::Kernels& others = cpu::kernels(fastest ? isas.back() : isas.front());
  static const cpu::Kernels kernels = cpu::with_blas(
      "blas", others, [](const cpu::GemmProblem& problem, const cpu::Block& block, const cpu::Panels& panels) {
        cpu::gemm_block_by(sgemm, others, problem, block, panels);
      });
  return kernels;
}

}  // namespace

std::vector<std::string> tested_isas() { return {"beside_the_baseline", "beside_the_fastest"}; }
const cpu::Kernels& tested_kernels(const std::string& isa) {
  return isa == "beside_the_fastest" ? table<true>() : table<false>();
}

}  // namespace pissa::test
