// The source of the CPU backend's threads: torch's pool inside torch, ThreadExecutor anywhere else.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace pissa::cpu {

/// Runs the tasks of a computation on threads.
class Executor {
 public:
  virtual ~Executor() = default;
  /// The number of tasks that can run at the same time; results do not depend on it.
  virtual std::int64_t threads() const = 0;
  /// Runs task(0) ... task(count - 1), in any order, on any threads, and returns when all are done. Tasks must not
  /// throw.
  virtual void parallel_for(std::int64_t count, const std::function<void(std::int64_t)>& task) const = 0;
};

/// Starts its threads, except the caller's own, for each call, which takes about 10 us a thread. With one thread it
/// starts none.
class ThreadExecutor final : public Executor {
 public:
  /// With this many threads, including the caller's own; at least 1.
  explicit ThreadExecutor(std::int64_t threads) : threads_(threads) {}
  std::int64_t threads() const override { return threads_; }
  void parallel_for(std::int64_t count, const std::function<void(std::int64_t)>& task) const override {
    const auto run = [&](std::int64_t thread) {
      for (std::int64_t i = count * thread / threads_; i < count * (thread + 1) / threads_; ++i) task(i);
    };
    std::vector<std::jthread> others;
    for (std::int64_t thread = 1; thread < threads_; ++thread) others.emplace_back(run, thread);
    run(0);
  }

 private:
  std::int64_t threads_;
};

}  // namespace pissa::cpu
