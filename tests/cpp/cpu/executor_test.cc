// Executors: an exception of a task reaches the caller, after all other tasks.
#include "pissa/cpu/executor.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <new>

namespace pissa::test {
namespace {

TEST(ExecutorTest, TasksMayThrow) {
  for (const int threads : {1, 2, 7}) {
    std::atomic<int> done = 0;
    const auto task = [&](std::int64_t i) {
      if (i % 5 == 3) throw std::bad_alloc();
      ++done;
    };
    EXPECT_THROW(cpu::ThreadExecutor(threads).parallel_for(20, task), std::bad_alloc) << threads << " threads";
    EXPECT_EQ(done, 16);
  }
}

}  // namespace
}  // namespace pissa::test
