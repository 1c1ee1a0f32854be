// Streams that put work off as long as they may: it runs when something waits for it, so that what was not waited for
// has not happened. Work of one stream runs in order; of several, as far as events demand.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>

#include "driver_types.h"

namespace cuda_sim::detail {

struct Capture;

/// Every function of the runtime and the libraries holds it: work runs on whatever thread of the host waits for it.
std::recursive_mutex& runtime_mutex();

/// False for a handle that was never made or is destroyed. The null stream is one.
bool is_stream(cudaStream_t stream);

/// The device that was current when the stream was made. Null is the null stream of the current device, which no other
/// is ordered with.
int device_of(cudaStream_t stream);

/// The device whose work runs.
int running_device();

/// What a call that queues work on the stream has to return first: what is no stream, and what a capture forbids.
cudaError_t check_stream(cudaStream_t stream);

/// The same for work that takes the current device: on a stream of another it is refused.
cudaError_t check_stream_here(cudaStream_t stream);

/// The capture in which a stream's work is recorded, as one of its lanes; null for most.
struct Captured {
  std::shared_ptr<Capture> capture;
  std::size_t lane;
};
const Captured& captured(cudaStream_t stream);
void join(cudaStream_t stream, const std::shared_ptr<Capture>& capture);
/// For all streams of the capture.
void leave(const Capture& capture);

/// Whether work is left out; see set_dry in sim/control.h.
bool is_dry();

/// Queues work of the device, which must be valid by then, or records it. The memory of the device is accessible to it.
/// Dry, it is dropped.
void enqueue(cudaStream_t stream, std::function<void()> work);

/// Queues what happens dry, too: it touches no memory of the device.
void enqueue_always(cudaStream_t stream, std::function<void()> work);

/// Runs what the stream has queued, as a library does that looks at its results; the program does not wait.
void run_queued(cudaStream_t stream);

/// Runs all work of all streams.
void run_everything();

}  // namespace cuda_sim::detail
