// A test that runs once per instruction set of this machine; or, in tiles_test, by the kernels for tile registers,
// which are emulated; or, in blas_test, by those with a BLAS's products.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "pissa/cpu/backend.h"
#include "pissa/cpu/executor.h"
#include "pissa/cpu/isa.h"
#include "pissa/cpu/kernels.h"

namespace pissa::test {

/// What a program tests: support/tested_isas.cc, tested_tiles.cc or tested_blas.cc.
std::vector<std::string> tested_isas();
const cpu::Kernels& tested_kernels(const std::string& isa);

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
