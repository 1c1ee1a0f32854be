// PiSSA's split of many weights: whole weights side by side, each on one thread.
#pragma once

#include <span>

#include "pissa/core/split.h"
#include "pissa/cpu/executor.h"

namespace pissa::cpu {

struct Kernels;

/// Performs `split` for every task, bit for bit. Whole weights are decomposed side by side, each on one thread.
///
/// Throws std::invalid_argument "weights[i]: ...", like split: for a bad rank, pass count or scaling, before anything
/// is written; for a non-finite weight, at the end, when some factors have been written.
void split_many(std::span<const SplitTask> tasks, const SvdOptions& options, const Executor& executor,
                const Kernels& kernels);

}  // namespace pissa::cpu
