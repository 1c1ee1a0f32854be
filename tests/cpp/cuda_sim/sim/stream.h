// Streams that put work off as long as they may: it runs when something waits for it, so that what was not waited for
// has not happened. Work of one stream runs in order; of several, as far as events demand.
#pragma once

#include <functional>
#include <mutex>

#include "driver_types.h"

namespace cuda_sim::detail {

/// Every function of the runtime and the libraries holds it: work runs on whatever thread of the host waits for it.
std::recursive_mutex& runtime_mutex();

/// False for a handle that was never made or is destroyed. The null stream is one.
bool is_stream(cudaStream_t stream);

/// Queues work, which must be valid by then. The memory of the device is accessible to it.
void enqueue(cudaStream_t stream, std::function<void()> work);

/// Runs what the stream has queued, as a library does that looks at its results; the program does not wait.
void run_queued(cudaStream_t stream);

/// Runs all work of all streams.
void run_everything();

}  // namespace cuda_sim::detail
