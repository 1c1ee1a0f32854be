#include "pissa/cuda/split_many.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
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

void split_stack(std::span<const SplitTask* const> tasks, const SvdOptions& options, const Context& context) {
  std::vector<Matrix> weights;
  for (const SplitTask* task : tasks) weights.push_back(task->w);
  CudaBackend stack(context, weights);
  const auto svd = svd_lowrank(stack, weights[0], tasks[0]->a0.rows, options);
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
  CudaBackend backend(context);
  std::map<Kind, std::vector<const SplitTask*>> kinds;
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    const SplitTask& task = tasks[i];
    naming_weight(i, [&] { check_split(task.w, task.a0.rows, task.scaling, options); });
    const float largest = naming_weight(i, [&] { return detail::largest_of(backend, task.w); });
    kinds[kind_of(task, largest)].push_back(&task);
  }
  for (const auto& [kind, same] : kinds) {
    const std::int64_t fitting = std::max<std::int64_t>(stack_bytes / workspace_bytes(*same[0], options), 1);
    for (std::size_t first = 0; first < same.size(); first += static_cast<std::size_t>(fitting)) {
      const std::size_t count = std::min(static_cast<std::size_t>(fitting), same.size() - first);
      split_stack(std::span(same).subspan(first, count), options, context);
    }
  }
}

}  // namespace pissa::cuda
