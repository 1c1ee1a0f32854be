// The source of the CPU backend's threads: torch's pool inside torch, ThreadExecutor anywhere else.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pissa::cpu {

/// Runs the tasks of a computation on threads. A derived class overrides `threads` and `run`.
class Executor {
 public:
  virtual ~Executor() = default;
  /// The number of tasks that can run at the same time; results do not depend on it.
  virtual std::int64_t threads() const = 0;
  /// Runs task(0) ... task(count - 1), in any order, on any threads, and returns when all are done. If tasks throw, the
  /// exception that was thrown first is then rethrown here.
  void parallel_for(std::int64_t count, const std::function<void(std::int64_t)>& task) const {
    std::mutex mutex;
    std::exception_ptr error;
    run(count, [&](std::int64_t i) {
      try {
        task(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  }

 private:
  /// Does the work of parallel_for, with tasks that do not throw.
  virtual void run(std::int64_t count, const std::function<void(std::int64_t)>& task) const = 0;
};

/// Starts its threads, except the caller's own, for each call, which takes about 10 us a thread. With one thread it
/// starts none.
class ThreadExecutor final : public Executor {
 public:
  /// With this many threads, including the caller's own; at least 1.
  explicit ThreadExecutor(std::int64_t threads) : threads_(threads) {}
  std::int64_t threads() const override { return threads_; }

 private:
  void run(std::int64_t count, const std::function<void(std::int64_t)>& task) const override {
    const auto run_share = [&](std::int64_t thread) {
      for (std::int64_t i = count * thread / threads_; i < count * (thread + 1) / threads_; ++i) task(i);
    };
    std::vector<std::jthread> others;
    for (std::int64_t thread = 1; thread < threads_; ++thread) others.emplace_back(run_share, thread);
    run_share(0);
  }

  std::int64_t threads_;
};

}  // namespace pissa::cpu
