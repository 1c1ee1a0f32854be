// PiSSA's split of many weights: whole weights side by side, each on one thread.
#pragma once

#include <span>

#include "executor.h"
#include "kernels.h"
#include "pissa/rsvd.h"
#include "pissa/types.h"

namespace pissa::cpu {

/// A weight [out, in], and where its start factors go: a0 [r, in] and b0 [out, r], f32.
struct SplitTask {
  Matrix w;
  float scaling;
  MutableMatrix a0;
  MutableMatrix b0;
};

/// What `split` makes of every task, bit for bit.
///
/// Throws std::invalid_argument "weights[i]: ...", as split does: for a bad rank, pass count or scaling before anything
/// is written; for a non-finite weight at the end, when some factors have been.
void split_many(std::span<const SplitTask> tasks, const SvdOptions& options, const Executor& executor,
                const Kernels& kernels);

}  // namespace pissa::cpu
