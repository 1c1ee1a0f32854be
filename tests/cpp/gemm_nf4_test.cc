// gemm_nf4: subtracting the factors and quantising in one pass gives the codes of doing one after the other.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "backend_test.h"
#include "gemm_case.h"
#include "isa.h"

namespace pissa::test {
namespace {

class GemmNf4Test : public BackendTest {};

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
    residual_sum(list.terms(), weight.view(), {residual.data(), rows, cols, cols, Codec::f32});
    std::vector<std::uint8_t> expected_codes(nf4_bytes(rows * cols));
    std::vector<float> expected_absmax(ceil_div(rows * cols, blocksize));
    cpu::kernels("baseline").nf4_quantize(residual.data(), rows * cols, blocksize, expected_codes.data(), expected_absmax.data());

    std::vector<std::uint8_t> codes(expected_codes.size() + 1, 0xee);
    std::vector<float> absmax(expected_absmax.size() + 1, std::nanf(""));
    backend().gemm_nf4(list.terms(), weight.view(), {blocksize, codes.data(), absmax.data()});
    EXPECT_EQ(codes.back(), 0xee);
    EXPECT_TRUE(std::isnan(absmax.back()));
    codes.pop_back();
    absmax.pop_back();
    EXPECT_TRUE(codes == expected_codes);
    EXPECT_TRUE(absmax == expected_absmax);
  }
}

TEST_P(GemmNf4Test, TheSameBits) {
  Random random(2);
  for (const std::int64_t blocksize : {32, 4096}) {
    const Stored weight(random.dense(230, 61), Codec::bf16);
    TermList list(230, 61);
    list.add(random, 5, Form::f32, Op::n, Form::f32, Op::n, -0.3f);
    expect_same_bits([&](auto& cpu) {
      std::vector<std::uint8_t> codes(nf4_bytes(230 * 61));
      std::vector<float> absmax(ceil_div(230 * 61, blocksize));
      cpu.gemm_nf4(list.terms(), weight.view(), {blocksize, codes.data(), absmax.data()});
      return std::pair(codes, absmax);
    });
  }
}

PISSA_EVERY_BACKEND(GemmNf4Test);

}  // namespace
}  // namespace pissa::test
