#include <algorithm>

#include "pissa/cpu/isa.h"
#include "support/isa_test.h"

namespace pissa::cpu::amxbf16_emulated {
const Kernels& kernels();
}

namespace pissa::test {

// Where the rest of these kernels, which is avx512bf16's, can run.
std::vector<std::string> tested_isas() {
  if (std::ranges::count(cpu::available_isas(), "avx512bf16") == 0) return {};
  return {"amxbf16_emulated"};
}
const cpu::Kernels& tested_kernels(const std::string&) { return cpu::amxbf16_emulated::kernels(); }

}  // namespace pissa::test
