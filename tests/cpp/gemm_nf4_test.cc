// gemm_nf4: subtracting the factors and quantising in one pass gives the codes of doing one after the other.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "gemm_case.h"
#include "isa_test.h"

namespace pissa::test {
namespace {

class GemmNf4Test : public IsaTest {};

TEST_P(GemmNf4Test, EqualsQuantizingTheStoredResidual) {
  Random random(1);
  struct Shape {
    std::int64_t rows, cols, blocksize;
  };
  for (const auto& [rows, cols, blocksize] :
       {Shape{1, 1, 64}, Shape{1, 1000, 64}, Shape{1000, 1, 64}, Shape{129, 1, 4096}, Shape{5, 7, 32},
        Shape{33, 61, 32}, Shape{64, 64, 256}, Shape{100, 259, 64}, Shape{70, 513, 128}, Shape{37, 299, 4096},
        Shape{3, 2, 4096}}) {
    const Form form = static_cast<Form>(random.pick(kCodecs));
    SCOPED_TRACE(::testing::Message() << "[" << rows << ", " << cols << "] " << name(form) << ", blocksize "
                                      << blocksize);
    const Operand weight(random, rows, cols, form);
    TermList list(rows, cols);
    list.add(random, 5, Form::f32, Op::n, Form::f32, Op::n, -0.3f);
    if (random.coin()) list.add(random, 3, Form::bf16, Op::n, Form::f32, Op::t, 2.0f);

    std::vector<float> residual(rows * cols, std::nanf(""));
    backend().gemm(list.terms(), weight.view(), {residual.data(), rows, cols, cols, Codec::f32});
    std::vector<std::uint8_t> expected_codes(nf4_bytes(rows * cols));
    std::vector<float> expected_absmax(ceil_div(rows * cols, blocksize));
    kernels().nf4_quantize(residual.data(), rows * cols, blocksize, expected_codes.data(), expected_absmax.data());

    for (const int threads : {1, 2, 3, 7}) {
      const cpu::ThreadExecutor executor(threads);
      std::vector<std::uint8_t> codes(expected_codes.size() + 1, 0xee);
      std::vector<float> absmax(expected_absmax.size() + 1, std::nanf(""));
      cpu::CpuBackend(executor, kernels())
          .gemm_nf4(list.terms(), weight.view(), {blocksize, codes.data(), absmax.data()});
      EXPECT_EQ(codes.back(), 0xee);
      EXPECT_TRUE(std::isnan(absmax.back()));
      codes.pop_back();
      absmax.pop_back();
      EXPECT_TRUE(codes == expected_codes) << threads << " threads";
      EXPECT_TRUE(absmax == expected_absmax) << threads << " threads";
    }
  }
}

TEST_P(GemmNf4Test, RequantizesAnNf4Weight) {
  Random random(2);
  const Operand weight(random, 21, 67, Form::nf4);
  std::vector<std::uint8_t> codes(nf4_bytes(21 * 67));
  std::vector<float> absmax(ceil_div(21 * 67, 32));
  backend().gemm_nf4({}, weight.view(), {32, codes.data(), absmax.data()});
  Matrix again{codes.data(), 21, 67, 0, Codec::nf4};
  again.scales = {32, absmax.data()};
  Stored out = Stored::poisoned(21, 67, Codec::f32);
  backend().copy(again, out.mutable_view());
  // Same blocks and levels; a block without a code of +-1 gets a smaller absmax. Half the largest gap between levels
  // bounds it.
  const Dense expected = weight.values();
  for (std::size_t i = 0; i < expected.values.size(); ++i) {
    ASSERT_LE(std::fabs(out.values().values[i] - expected.values[i]), 0.1520 * absmax[i / 32] * (1 + 4 * kEps32)) << i;
  }
}

PISSA_EVERY_ISA(GemmNf4Test);

}  // namespace
}  // namespace pissa::test
