// A test that runs once per instruction set of this machine.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "pissa/cpu/backend.h"
#include "pissa/cpu/executor.h"
#include "pissa/cpu/isa.h"
#include "pissa/cpu/kernels.h"

namespace pissa::test {

class IsaTest : public ::testing::TestWithParam<std::string> {
 protected:
  const cpu::Kernels& kernels() const { return cpu::kernels(GetParam()); }
  cpu::CpuBackend backend() const { return {executor_, kernels()}; }

 private:
  cpu::ThreadExecutor executor_{1};
};

#define PISSA_EVERY_ISA(suite)                                                              \
  INSTANTIATE_TEST_SUITE_P(Isa, suite, ::testing::ValuesIn(::pissa::cpu::available_isas()), \
                           [](const auto& info) { return info.param; })

}  // namespace pissa::test
