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
            const cpu::Cut cut = cpu::best_cut(m, n, tile, threads, uneven);
            EXPECT_TRUE(cut.rows > 0 && cut.rows <= cpu::kMc && cut.rows % tile == 0) << m << ", " << n;
            EXPECT_TRUE(cut.cols > 0 && cut.cols <= cpu::kNc && cut.cols % 32 == 0) << m << ", " << n;
          }
        }
      }
    }
  }
}

TEST(CutTest, NoThreadWaitsForAnother) {
  EXPECT_EQ(blocks_of(508, 576, cpu::best_cut(508, 576, 14, 8, false)), 8);
  EXPECT_EQ(blocks_of(512, 4096, cpu::best_cut(512, 4096, 14, 16, false)), 16);
  EXPECT_EQ(blocks_of(1, 4096, cpu::best_cut(1, 4096, 14, 2, false)), 8);
  EXPECT_EQ(cpu::rounds_of(17, 8, false), 3);
}

// Four fast threads and four slow ones do twelve blocks while a slow one does one.
TEST(CutTest, SlowThreadsTakeFewerBlocks) {
  EXPECT_EQ(cpu::rounds_of(4, 8, true), 1);
  EXPECT_EQ(cpu::rounds_of(12, 8, true), 2);
  EXPECT_EQ(cpu::rounds_of(13, 8, true), 3);
  EXPECT_EQ(blocks_of(512, 4096, cpu::best_cut(512, 4096, 14, 8, true)) % 12, 0);
}

}  // namespace
}  // namespace pissa::test
