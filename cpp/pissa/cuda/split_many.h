// PiSSA's split of many weights: those of one shape side by side, as a stack.
#pragma once

#include <span>

#include "pissa/core/split.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// Workspace of one stack, about: as many weights as fit are decomposed at once, but always one.
inline constexpr std::int64_t kStackBytes = std::int64_t{1} << 30;

/// What `split` makes of every task, but for rounding. Throws std::invalid_argument "weights[i]: ...", as split does,
/// before anything is written.
void split_many(std::span<const SplitTask> tasks, const SvdOptions& options, const Context& context,
                std::int64_t stack_bytes = kStackBytes);

}  // namespace pissa::cuda
