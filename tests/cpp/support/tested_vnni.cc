#include <algorithm>

#include "pissa/cpu/isa.h"
#include "support/isa_test.h"

namespace pissa::cpu::avxvnni_emulated {
const Kernels& kernels();
}

namespace pissa::test {

// Where the rest of these kernels, which is avx2's, can run.
std::vector<std::string> tested_isas() {
  if (std::ranges::count(cpu::available_isas(), "avx2") == 0) return {};
  return {"avxvnni_emulated"};
}
const cpu::Kernels& tested_kernels(const std::string&) { return cpu::avxvnni_emulated::kernels(); }

}  // namespace pissa::test
