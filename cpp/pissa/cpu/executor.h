// The source of the CPU backend's threads: torch's pool inside torch, ThreadExecutor anywhere else.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pissa::cpu {

/// Whether this machine has cores of several kinds, some slower than others, as laptops have. Known on Linux and
/// Windows.
bool cores_differ();

/// The numbers of tasks, each taken once, by the thread that is free first: a fast core takes more than a slow one.
class TaskNumbers {
 public:
  explicit TaskNumbers(std::int64_t count) : count_(count) {}
  /// What each thread calls.
  void take_all(const std::function<void(std::int64_t)>& task) {
    const auto take = [&] { return next_.fetch_add(1, std::memory_order_relaxed); };
    for (std::int64_t i = take(); i < count_; i = take()) task(i);
  }

 private:
  std::int64_t count_;
  std::atomic<std::int64_t> next_ = 0;
};

/// Runs the tasks of a computation on threads. A derived class overrides `threads` and `run`.
class Executor {
 public:
  virtual ~Executor() = default;
  /// The number of tasks that can run at the same time; results do not depend on it.
  virtual std::int64_t threads() const = 0;
  /// Whether some threads are slower than others. Work is then cut into more pieces; results do not depend on it.
  virtual bool uneven() const { return cores_differ(); }
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
  /// Does the work of parallel_for, with tasks that do not throw. Should start tasks in order, each on the thread that
  /// is free first: what takes longest comes first.
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
    TaskNumbers numbers(count);
    std::vector<std::jthread> others;
    for (std::int64_t thread = 1; thread < std::min(threads_, count); ++thread) {
      others.emplace_back([&] { numbers.take_all(task); });
    }
    numbers.take_all(task);
  }

  std::int64_t threads_;
};

}  // namespace pissa::cpu
