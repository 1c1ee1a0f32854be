#include "pissa/cpu/split_many.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <numeric>
#include <vector>

#include "pissa/core/split.h"
#include "pissa/cpu/backend.h"

namespace pissa::cpu {
namespace {

// With at least this many elements, one weight uses all threads. A tenth of its split, a pass, takes one thread 0.8 ms
// at r = 1 and 1.9 ms at r = 16 in bf16, and waking the threads takes about 10 us, so little is lost in it. Also, only
// one workspace is in memory, instead of one for each thread; it grows with the rank, to 20 MB for 4096 x 4096 at r =
// 128.
constexpr std::int64_t kLarge = std::int64_t{1} << 22;

std::int64_t size_of(const SplitTask& task) { return task.w.rows * task.w.cols; }

}  // namespace

void split_many(std::span<const SplitTask> tasks, const SvdOptions& options, const Executor& executor,
                const Kernels& kernels) {
  std::int64_t rest = 0;  // elements of the weights that are not split yet
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    naming_weight(i, [&] { check_task(tasks[i], options); });
    rest += size_of(tasks[i]);
  }
  std::vector<std::size_t> order(tasks.size());  // largest first, so that the threads finish together
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return size_of(tasks[a]) > size_of(tasks[b]); });

  std::vector<std::exception_ptr> errors(tasks.size());
  const auto split_one = [&](std::size_t i, const Executor& threads) {
    try {
      const SplitTask& task = tasks[i];
      CpuBackend backend(threads, kernels);
      split(backend, task.w, task.scaling, options, task.a0, task.b0, task.largest, task.s, task.moment);
    } catch (...) {  // the first in the order of the weights is thrown, and names its weight
      errors[i] = std::current_exception();
    }
  };

  // A weight that is more than an equal share of the rest would keep one thread busy after all others.
  const std::int64_t threads = executor.threads();
  std::size_t first_small = 0;
  for (; first_small < order.size(); ++first_small) {
    const std::size_t i = order[first_small];
    const std::int64_t size = size_of(tasks[i]);
    if (size < kLarge && size <= rest / threads) break;
    split_one(i, executor);
    rest -= size;
  }

  const ThreadExecutor alone(1);
  const std::int64_t small = static_cast<std::int64_t>(order.size() - first_small);
  executor.parallel_for(small, [&](std::int64_t i) { split_one(order[first_small + i], alone); });

  for (std::size_t i = 0; i < errors.size(); ++i) {
    if (errors[i]) naming_weight(i, [&] { std::rethrow_exception(errors[i]); });
  }
}

}  // namespace pissa::cpu
