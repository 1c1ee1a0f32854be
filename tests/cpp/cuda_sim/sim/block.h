// Runs a kernel: the threads of a block as fibers on one thread of the host, the blocks one after the other.
//
// A thread runs until it waits for others or ends. When all have come, they go on in an order that changes each time,
// forward, backward, shuffled; a warp runs on until it waits for another one. So a barrier that is missing lets some
// threads run far ahead of others, one way or the other. Under ThreadSanitizer each thread is one of its own, and
// ordered with others by what orders it on the device: collectives, and the beginning and end of the kernel.
#pragma once

#include <functional>

#include "vector_types.h"

namespace cuda_sim::detail {

/// Of a block.
inline constexpr unsigned kMaxThreads = 1024;

/// Calls `thread` in every thread of the grid; returns when all have ended.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);

/// Runs every thread of the grid up to wait_for_earlier_kernels, and aborts if one ends without calling it.
void run_until_wait(dim3 grid, dim3 block, const std::function<void()>& thread);

}  // namespace cuda_sim::detail
