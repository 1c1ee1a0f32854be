// The table of cases that every backend has to pass. A test of it is compiled once for the CPU, where it runs for every
// instruction set of the machine, and once, with PISSA_TEST_CUDA, for the CUDA backend, simulated or on a GPU.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <string>

#include "pissa/core/types.h"

#if defined(PISSA_TEST_CUDA)
#include "support/transferring_backend.h"
#else
#include "support/isa_test.h"
#include "support/threads.h"
#endif

namespace pissa::test {

#if defined(PISSA_TEST_CUDA)

class BackendTest : public ::testing::TestWithParam<std::string> {
 protected:
  TransferringBackend backend() const { return TransferringBackend(); }

  /// Whether operands of this precision are rounded to it.
  bool rounds(Precision precision) const { return precision != Precision::f32; }

  /// Roundings to half precision on the way to an output of a format, beyond the last one: of what a product is added
  /// to.
  static constexpr std::int64_t intermediate_roundings(Format out) { return out == Format::f32 ? 0 : 2; }

  /// The sum as gemm_quantized adds it up before it quantises.
  void residual_sum(std::span<const Term> terms, const Matrix& addend, const MutableMatrix& out) const {
    backend().gemm(terms, {}, out);
    backend().add(addend, out, out);
  }

  /// The same bits again: nothing depends on the order in which blocks of threads run.
  template <class F>
  void expect_same_bits(F run) const {
    auto first = backend();
    const auto expected = run(first);
    for (int repetition = 0; repetition < 2; ++repetition) {
      auto again = backend();
      EXPECT_TRUE(run(again) == expected);
    }
  }
};

#define PISSA_EVERY_BACKEND(suite) \
  INSTANTIATE_TEST_SUITE_P(Cuda, suite, ::testing::Values("cuda"), [](const auto& info) { return info.param; })

#else

class BackendTest : public IsaTest {
 protected:
  bool rounds(Precision precision) const { return precision == Precision::bf16 && kernels().bf16; }
  static constexpr std::int64_t intermediate_roundings(Format) { return 0; }

  void residual_sum(std::span<const Term> terms, const Matrix& addend, const MutableMatrix& out) const {
    backend().gemm(terms, addend, out);
  }

  /// The same bits on any number of threads.
  template <class F>
  void expect_same_bits(F run) const {
    expect_same_on_any_threads(kernels(), run);
  }
};

#define PISSA_EVERY_BACKEND PISSA_EVERY_ISA

#endif

}  // namespace pissa::test
