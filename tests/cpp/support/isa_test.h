// A test that runs once per instruction set of this machine; or, with PISSA_TEST_TILES, by the kernels for tile
// registers, which are emulated.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "pissa/cpu/backend.h"
#include "pissa/cpu/executor.h"
#include "pissa/cpu/isa.h"
#include "pissa/cpu/kernels.h"

#if defined(PISSA_TEST_TILES)
namespace pissa::cpu::amxbf16_emulated {
const Kernels& kernels();
}
#endif

namespace pissa::test {

#if defined(PISSA_TEST_TILES)

/// "amxbf16_emulated" where the rest of these kernels, which is avx512bf16's, can run.
inline std::vector<std::string> tested_isas() {
  for (const std::string& isa : cpu::available_isas()) {
    if (isa == "avx512bf16") return {"amxbf16_emulated"};
  }
  return {};
}
inline const cpu::Kernels& tested_kernels(const std::string&) { return cpu::amxbf16_emulated::kernels(); }

#else

inline std::vector<std::string> tested_isas() { return cpu::available_isas(); }
inline const cpu::Kernels& tested_kernels(const std::string& isa) { return cpu::kernels(isa); }

#endif

class IsaTest : public ::testing::TestWithParam<std::string> {
 protected:
  const cpu::Kernels& kernels() const { return tested_kernels(GetParam()); }
  cpu::CpuBackend backend() const { return {executor_, kernels()}; }

 private:
  cpu::ThreadExecutor executor_{1};
};

#define PISSA_EVERY_ISA(suite)                                                            \
  GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(suite);                                   \
  INSTANTIATE_TEST_SUITE_P(Isa, suite, ::testing::ValuesIn(::pissa::test::tested_isas()), \
                           [](const auto& info) { return info.param; })

}  // namespace pissa::test
