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

// What one weight's decomposition needs, at most: in f32 basis and projection, a block of each, the factors and one of
// them once more; in f64 the Gram matrix, and beside it a slab of what it is of, or what its eigenproblem needs.
std::int64_t workspace_bytes(const SplitTask& task, const SvdOptions& options) {
  const std::int64_t r = task.a0.rows;
  const std::int64_t steps = options.method == SvdMethod::krylov ? passes_for(r, options) / 2 : 1;
  const std::int64_t block = block_size(r, steps);
  const std::int64_t basis = block * steps;
  const std::int64_t sides = task.w.rows + task.w.cols;
  const std::int64_t beside = std::max<std::int64_t>(basis * 1024, basis * (5 * r + 40) + r * r);
  return 4 * (basis + block + 2 * r) * sides + 8 * (basis * basis + beside);
}

// A weight in its stack.
struct Member {
  const SplitTask* task;
  float largest;
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

// A weight that lacks full rank, which shows at the end, is decomposed once more, the careful way and alone.
void split_stack(std::span<const Member> members, const SvdOptions& options, const Context& context) {
  std::vector<Matrix> weights;
  float largest = 0;
  for (const Member& member : members) {
    weights.push_back(member.task->w);
    largest = std::max(largest, member.largest);
  }
  const std::int64_t r = members[0].task->a0.rows;
  CudaBackend stack(context, weights);
  CudaBackend single(context);
  const auto scale = [&](const SplitTask& task, const Matrix& u, const Matrix& s, const Matrix& v) {
    single.scale_rows(v, s, task.scaling, task.a0, Op::n);
    single.scale_rows(u, s, task.scaling, task.b0, Op::t);
    if (task.s) single.copy(s, task.s);
  };
  const auto svd = detail::svd_lowrank(stack, weights[0], r, options, {}, {largest, 0.0f}, Rank::assumed_full);
  const std::vector<bool> full = stack.had_full_ranks();
  for (std::size_t i = 0; i < members.size(); ++i) {
    const auto& [task, its_largest] = members[i];
    if (full[i]) {
      const auto place = static_cast<std::int64_t>(i);
      scale(*task, one_of(svd.u.view(), place), one_of(svd.s.view(), place), one_of(svd.v.view(), place));
    } else {
      const auto careful = detail::careful_svd(single, task->w, r, options, {}, {its_largest, 0.0f});
      scale(*task, careful.u.view(), careful.s.view(), careful.v.view());
    }
  }
}

// In stacks of about one size: a short one would leave multiprocessors idle.
void split_alike(std::span<const Member> members, const SvdOptions& options, std::int64_t most_bytes,
                 const Context& context) {
  std::int64_t fitting = std::max<std::int64_t>(most_bytes / workspace_bytes(*members[0].task, options), 1);
  while (!members.empty()) {
    const auto left = static_cast<std::int64_t>(members.size());
    const std::int64_t count = ceil_div(left, ceil_div(left, fitting));
    try {
      split_stack(members.first(static_cast<std::size_t>(count)), options, context);
      members = members.subspan(static_cast<std::size_t>(count));
    } catch (const OutOfMemory&) {
      if (count == 1) throw;
      fitting = ceil_div(count, 2);
    }
  }
}

}  // namespace

void split_many(std::span<const SplitTask> tasks, const SvdOptions& options, const Context& context,
                std::int64_t stack_bytes) {
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    naming_weight(i, [&] { check_task(tasks[i], options); });
  }
  const std::vector<float> largest = largest_of(tasks, context);
  std::map<Kind, std::vector<Member>> kinds;
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    naming_weight(i, [&] { detail::check_finite({largest[i], 0.0f}); });
    if (tasks[i].moment) continue;
    kinds[kind_of(tasks[i], largest[i])].push_back({&tasks[i], largest[i]});
  }
  // Torch's allocator may have more, but its stable ABI does not say; what one stack has used, the next one gets.
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), context, "cudaMemGetInfo");
  const std::int64_t most_bytes = std::min(stack_bytes, static_cast<std::int64_t>(free / 4));
  for (const auto& [kind, members] : kinds) split_alike(members, options, most_bytes, context);
  // A second moment is as large as a weight: those that have one are split one after the other.
  CudaBackend single(context);
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    const SplitTask& task = tasks[i];
    if (!task.moment) continue;
    naming_weight(
        i, [&] { split(single, task.w, task.scaling, options, task.a0, task.b0, largest[i], task.s, task.moment); });
  }
}

}  // namespace pissa::cuda
