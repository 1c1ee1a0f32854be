// Prints the two largest singular values, 4 and 2, of a matrix [8, 3] whose columns are orthogonal, of lengths 4, 2, 1.
#include <bit>
#include <cmath>
#include <cstdio>
#include <vector>

#include "pissa/pissa.h"

int main() {
  const float lengths[] = {4, 2, 1};
  std::vector<float> weight;
  for (unsigned i = 0; i < 8; ++i) {
    for (unsigned j = 0; j < 3; ++j) {
      weight.push_back((std::popcount(i & j) % 2 ? -1 : 1) * lengths[j] / std::sqrt(8.0f));  // a Hadamard matrix's
    }
  }
  const pissa::cpu::ThreadExecutor executor(2);
  pissa::cpu::CpuBackend backend(executor, pissa::cpu::kernels());
  const auto svd = pissa::svd_lowrank(backend, pissa::Matrix{weight.data(), 8, 3, 3}, 2, {});
  const auto* singular = static_cast<const float*>(svd.s.view().data);
  std::printf("%.5f %.5f\n", singular[0], singular[1]);
}
