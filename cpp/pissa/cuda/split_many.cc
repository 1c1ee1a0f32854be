#include "pissa/cuda/split_many.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <tuple>
#include <vector>

#include "pissa/cuda/backend.h"

namespace pissa::cuda {
namespace {

// Weights that can share a stack: of one shape, type and rank, and, since a stack is scaled by one power of two, of
// about one magnitude.
using Kind = std::tuple<std::int64_t, std::int64_t, Format, std::int64_t, int>;

Kind kind_of(const SplitTask& task, float largest) {
  constexpr int kBinades = 32;
  const int magnitude = largest > 0 ? std::ilogb(largest) : 0;
  return {task.w.rows, task.w.cols, task.w.format, task.a0.rows, (magnitude + 1024) / kBinades};
}

// What one weight's decomposition needs: basis and projection in f32; a block of them, the Gram matrix and a slab in
// f64.
std::int64_t workspace_bytes(const SplitTask& task, const SvdOptions& options) {
  const std::int64_t r = task.a0.rows;
  const std::int64_t steps = options.method == SvdMethod::krylov ? passes_for(r, options) / 2 : 1;
  const std::int64_t block = block_size(r, steps);
  const std::int64_t basis = block * steps;
  const std::int64_t sides = task.w.rows + task.w.cols;
  return 4 * (basis + block + r) * sides + 8 * (2 * block * sides + basis * (basis + 1024));
}

struct Stack {
  std::vector<const SplitTask*> tasks;
  float largest = 0;  // element of all weights
};

// max_abs of every weight; of those that nobody has looked at, together.
std::vector<float> largest_of(std::span<const SplitTask> tasks, const Context& context) {
  std::vector<Matrix> unknown;
  for (const SplitTask& task : tasks) {
    if (!task.largest) unknown.push_back(task.w);
  }
  CudaBackend backend(context);
  const std::vector<float> found = max_abs(backend, unknown);
  auto next = found.begin();
  std::vector<float> largest;
  for (const SplitTask& task : tasks) largest.push_back(task.largest ? *task.largest : *next++);
  return largest;
}

void split_stack(std::span<const SplitTask* const> tasks, const SvdOptions& options, float largest,
                 const Context& context) {
  std::vector<Matrix> weights;
  for (const SplitTask* task : tasks) weights.push_back(task->w);
  CudaBackend stack(context, weights);
  const auto svd = svd_lowrank(stack, weights[0], tasks[0]->a0.rows, options, largest);
  CudaBackend single(context);
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    const std::int64_t place = static_cast<std::int64_t>(i);
    const Matrix s = one_of(svd.s.view(), place);
    single.scale_rows(one_of(svd.v.view(), place), s, tasks[i]->scaling, tasks[i]->a0, Op::n);
    single.scale_rows(one_of(svd.u.view(), place), s, tasks[i]->scaling, tasks[i]->b0, Op::t);
  }
}

}  // namespace

void split_many(std::span<const SplitTask> tasks, const SvdOptions& options, const Context& context,
                std::int64_t stack_bytes) {
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    naming_weight(i, [&] { check_split(tasks[i].w, tasks[i].a0.rows, tasks[i].scaling, options); });
  }
  const std::vector<float> largest = largest_of(tasks, context);
  std::map<Kind, Stack> stacks;
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    naming_weight(i, [&] { detail::check_finite(largest[i]); });
    Stack& stack = stacks[kind_of(tasks[i], largest[i])];
    stack.tasks.push_back(&tasks[i]);
    stack.largest = std::max(stack.largest, largest[i]);
  }
  for (const auto& [kind, stack] : stacks) {
    const std::span<const SplitTask* const> same = stack.tasks;
    const std::int64_t fitting = std::max<std::int64_t>(stack_bytes / workspace_bytes(*same[0], options), 1);
    for (std::size_t first = 0; first < same.size(); first += static_cast<std::size_t>(fitting)) {
      const std::size_t count = std::min(static_cast<std::size_t>(fitting), same.size() - first);
      split_stack(same.subspan(first, count), options, stack.largest, context);
    }
  }
}

}  // namespace pissa::cuda
