#include "pissa/cpu/isa.h"
#include "support/isa_test.h"

namespace pissa::test {

std::vector<std::string> tested_isas() { return cpu::available_isas(); }
const cpu::Kernels& tested_kernels(const std::string& isa) { return cpu::kernels(isa); }

}  // namespace pissa::test
