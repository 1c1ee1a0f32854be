// Results must not depend on the number of threads, bit for bit.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

#include "pissa/cpu/backend.h"
#include "pissa/cpu/executor.h"

namespace pissa::test {

/// Threads that count how often they are asked for: the backend does small work alone, where a test would show nothing.
class CountedThreads final : public cpu::Executor {
 public:
  explicit CountedThreads(std::int64_t threads) : executor_(threads) {}
  std::int64_t threads() const override { return executor_.threads(); }
  mutable std::atomic<std::int64_t> shared = 0;

 private:
  void run(std::int64_t count, const std::function<void(std::int64_t)>& task) const override {
    if (count > 1) ++shared;
    executor_.parallel_for(count, task);
  }

  cpu::ThreadExecutor executor_;
};

/// run(backend) returns something comparable, the same for 1, 2, 3 and 7 threads.
template <class F>
void expect_same_on_any_threads(const cpu::Kernels& kernels, F run) {
  const std::string test = ::testing::UnitTest::GetInstance()->current_test_info()->name();
  EXPECT_EQ(test.rfind("TheSameBits/", 0), 0u) << "under ThreadSanitizer only cases of this name run";
  const cpu::ThreadExecutor one(1);
  cpu::CpuBackend alone(one, kernels);
  const auto expected = run(alone);
  for (const int threads : {2, 3, 7}) {
    const CountedThreads executor(threads);
    cpu::CpuBackend backend(executor, kernels);
    EXPECT_TRUE(run(backend) == expected) << threads << " threads";
    EXPECT_GT(executor.shared, 0) << "too little work to be shared among threads";
  }
}

}  // namespace pissa::test
