// The cut of a product: blocks that fit and cover the output, and as many as the threads need.
#include "pissa/cpu/cut.h"

#include <gtest/gtest.h>

namespace pissa::test {
namespace {

std::int64_t blocks_of(std::int64_t m, std::int64_t n, const cpu::Cut& cut) {
  return ceil_div(m, cut.rows) * ceil_div(n, cut.cols);
}

TEST(CutTest, BlocksFit) {
  for (const std::int64_t m : {1, 13, 508, 519, 4096}) {
    for (const std::int64_t n : {1, 33, 512, 576, 4608, 50000}) {
      for (const std::int64_t tile : {6, 14, 32}) {
        for (const std::int64_t threads : {1, 2, 7, 64}) {
          for (const bool uneven : {false, true}) {
            for (const std::int64_t columns : {32, 64}) {
              const cpu::Cut cut = cpu::best_cut(m, n, tile, columns, threads, uneven);
              EXPECT_TRUE(cut.rows > 0 && cut.rows <= cpu::kMc && cut.rows % tile == 0) << m << ", " << n;
              EXPECT_TRUE(cut.cols > 0 && cut.cols <= cpu::kNc && cut.cols % columns == 0) << m << ", " << n;
            }
          }
        }
      }
    }
  }
}

// Two halves of 576 columns would cut a step of 64 codes, and its elements would be decoded one by one.
TEST(CutTest, StepsOfCodesAreWhole) {
  const auto cols = [](Format format, Op op) {
    const Matrix weight{nullptr, 576, 576, 576, format};
    const Term terms[] = {{{nullptr, 64, 576, 576, Format::bf16}, Op::n, weight, op},
                          {{nullptr, 64, 16, 16, Format::f32}, Op::n, {nullptr, 16, 576, 576, Format::f32}, Op::n}};
    const cpu::GemmProblem problem{terms, 2, {}, {}, {nullptr, 64, 576, 576, Format::bf16}};
    return cpu::best_cut(64, 576, 14, cpu::columns_of(problem), 1, false).cols;
  };
  EXPECT_EQ(cols(Format::nf4, Op::n) % 64, 0);
  EXPECT_EQ(cols(Format::nf4, Op::t), 288);
  EXPECT_EQ(cols(Format::bf16, Op::n), 288);
}

TEST(CutTest, NoThreadWaitsForAnother) {
  EXPECT_EQ(blocks_of(508, 576, cpu::best_cut(508, 576, 14, 32, 8, false)), 8);
  EXPECT_EQ(blocks_of(512, 4096, cpu::best_cut(512, 4096, 14, 32, 16, false)), 16);
  EXPECT_EQ(blocks_of(1, 4096, cpu::best_cut(1, 4096, 14, 32, 2, false)), 8);
  EXPECT_EQ(cpu::rounds_of(17, 8, false), 3);
}

// Four fast threads and four slow ones do twelve blocks while a slow one does one.
TEST(CutTest, SlowThreadsTakeFewerBlocks) {
  EXPECT_EQ(cpu::rounds_of(4, 8, true), 1);
  EXPECT_EQ(cpu::rounds_of(12, 8, true), 2);
  EXPECT_EQ(cpu::rounds_of(13, 8, true), 3);
  EXPECT_EQ(blocks_of(512, 4096, cpu::best_cut(512, 4096, 14, 32, 8, true)) % 12, 0);
}

}  // namespace
}  // namespace pissa::test
