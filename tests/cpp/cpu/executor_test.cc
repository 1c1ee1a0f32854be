// Executors: each task runs once, and a slow one holds up no other; an exception reaches the caller, after all tasks.
#include "pissa/cpu/executor.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>
#include <vector>

namespace pissa::test {
namespace {

TEST(ExecutorTest, ASlowTaskHoldsUpNoOther) {
  for (const int threads : {1, 2, 7}) {
    std::vector<std::atomic<int>> runs(40);
    std::atomic<int> others = 0;
    cpu::ThreadExecutor(threads).parallel_for(40, [&](std::int64_t i) {
      ++runs[static_cast<std::size_t>(i)];
      if (i == 0 && threads > 1) {
        while (others < 39) std::this_thread::yield();  // for ever, if one of them is to run after this one
      }
      ++others;
    });
    for (const auto& count : runs) EXPECT_EQ(count, 1) << threads << " threads";
  }
}

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
