// PiSSA's split of many weights: those of one shape side by side, as a stack.
#pragma once

#include <span>

#include "pissa/core/split.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// Workspace of one stack, about, where the device has as much: 128 weights [4096, 4096] at r = 128, so that one block
/// of threads a matrix is enough for 132 multiprocessors.
inline constexpr std::int64_t kStackBytes = std::int64_t{8} << 30;

/// What `split` makes of every task, but for rounding. As many weights at once as fit into `stack_bytes` and a quarter
/// of the memory that is free, and half as many whenever it runs out, but always one. Waits once for each stack, and
/// once for what is not told of the weights' largest elements. Throws std::invalid_argument "weights[i]: ...", as split
/// does, before anything is written.
void split_many(std::span<const SplitTask> tasks, const SvdOptions& options, const Context& context,
                std::int64_t stack_bytes = kStackBytes);

}  // namespace pissa::cuda
