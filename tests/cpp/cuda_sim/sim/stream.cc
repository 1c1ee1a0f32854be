#include "sim/stream.h"

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "sim/block.h"
#include "sim/capture.h"
#include "sim/control.h"
#include "sim/ledger.h"
#include "sim/memory.h"
#include "sim/modes.h"
#include "sim/order.h"
#include "sim/runtime.h"

namespace cuda_sim::detail {
namespace {

int running = 0;  // device

struct Stream {
  int device = 0;
  std::deque<std::function<void()>> queue = {};
  std::uint64_t queued = 0;
  std::uint64_t done = 0;
  Captured captured = {};

  void run_until(std::uint64_t position) {
    std::optional<DeviceOpen> open;
    if (!is_dry()) open.emplace(device);
    const int interrupted = std::exchange(running, device);
    while (done < position) {
      // Taken out first: work that waits for an event may come back to this stream.
      const std::function<void()> work = std::move(queue.front());
      queue.pop_front();
      ++done;
      work();
    }
    running = interrupted;
  }
  void run() { run_until(queued); }
};

struct Event {
  int device = 0;
  Stream* stream = nullptr;  // null: never recorded
  std::uint64_t position = 0;
  Captured captured = {};  // where it was last recorded, at `position`, if that was captured
};

/// Nothing is destroyed: our code keeps its streams and events to the end.
struct Runtime {
  std::recursive_mutex mutex;
  std::vector<std::unique_ptr<Stream>> streams;  // first the null stream of each device
  std::vector<std::unique_ptr<Event>> events;
  bool dry = false;

  Runtime() {
    for (int device = 0; device < kDevices; ++device) streams.push_back(std::make_unique<Stream>(Stream{device}));
  }
};

Runtime& runtime() {
  static Runtime& result = *new Runtime;
  return result;
}

Stream* find(cudaStream_t handle) {
  if (!handle) return runtime().streams[static_cast<std::size_t>(current_device())].get();
  for (const auto& stream : runtime().streams) {
    if (reinterpret_cast<cudaStream_t>(stream.get()) == handle) return stream.get();
  }
  return nullptr;
}

Event* find(cudaEvent_t handle) {
  for (const auto& event : runtime().events) {
    if (reinterpret_cast<cudaEvent_t>(event.get()) == handle) return event.get();
  }
  return nullptr;
}

void push(Stream& stream, std::function<void()> work) {
  stream.queue.push_back(std::move(work));
  ++stream.queued;
}

cudaError_t invalidate(Capture& capture, cudaError_t error) {
  capture.valid = false;
  return error;
}

/// What a call that waits for a stream, or asks how far it is, has to return first.
cudaError_t check_wait(cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream)) return error;
  const auto& capture = captured(stream).capture;
  return capture ? invalidate(*capture, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

/// cudaStreamWaitEvent where the stream or the event, or both, are captured.
cudaError_t wait_in_capture(cudaStream_t stream, const Event& event) {
  const auto& [from, from_lane] = event.captured;
  if (!from) {
    return event.stream ? invalidate(*captured(stream).capture, cudaErrorStreamCaptureIsolation) : cudaSuccess;
  }
  if (from->ended) return cudaErrorCapturedEvent;
  if (!from->valid) return cudaErrorStreamCaptureInvalidated;
  if (!stream) return invalidate(*from, cudaErrorStreamCaptureUnsupported);
  if (!captured(stream).capture) join(stream, from);
  const auto& [into, lane] = captured(stream);
  if (into != from) {
    invalidate(*into, cudaErrorStreamCaptureMerge);
    return invalidate(*from, cudaErrorStreamCaptureMerge);
  }
  if (lane != from_lane) into->graph->add_wait(lane, from_lane, event.position);
  return cudaSuccess;
}

void after_wait(const char* name) {
  record({.kind = Kind::wait, .name = name});
  check_redzones();
}

}  // namespace

std::recursive_mutex& runtime_mutex() { return runtime().mutex; }

bool is_stream(cudaStream_t stream) { return find(stream) != nullptr; }

int device_of(cudaStream_t stream) { return find(stream)->device; }

int running_device() { return running; }

cudaError_t check_stream_here(cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream)) return error;
  return device_of(stream) == current_device() ? cudaSuccess : cudaErrorInvalidResourceHandle;
}

cudaError_t check_stream(cudaStream_t stream) {
  if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
  const Captured& in = captured(stream);
  return in.capture && !in.capture->valid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}

const Captured& captured(cudaStream_t stream) { return find(stream)->captured; }

void join(cudaStream_t stream, const std::shared_ptr<Capture>& capture) {
  find(stream)->captured = {capture, capture->graph->add_lane()};
}

void leave(const Capture& capture) {
  for (const auto& stream : runtime().streams) {
    if (stream->captured.capture.get() == &capture) stream->captured = {};
  }
}

bool is_dry() { return runtime().dry; }

void enqueue(cudaStream_t stream, std::function<void()> work) {
  if (!is_dry()) enqueue_always(stream, std::move(work));
}

void enqueue_always(cudaStream_t handle, std::function<void()> work) {
  Stream& stream = *find(handle);
  if (const auto& [capture, lane] = stream.captured; capture) return capture->graph->add(lane, std::move(work));
  push(stream, std::move(work));
}

void run_queued(cudaStream_t stream) { find(stream)->run(); }

void run_everything() {
  visit_shuffled(runtime().streams.size(), [](std::uint64_t i) { runtime().streams[i]->run(); });
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> thread) {
  const Call call;
  if (call.failed()) return call.error();
  const dim3 grid = config.gridDim;
  const dim3 block = config.blockDim;
  if (std::uint64_t{block.x} * block.y * block.z > kMaxThreads)
    die("a kernel was launched with more than 1024 threads");
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.numAttrs > 1 || config.dynamicSmemBytes != 0) return cudaErrorNotSupported;
  const bool dependent = config.numAttrs == 1;  // there is one attribute
  if (dependent && !has_dependent_launches()) return cudaErrorNotSupported;
  if (dependent && library_modes.defect == Defect::early_refused) return cudaErrorInvalidResourceHandle;
  if (const cudaError_t error = check_stream_here(config.stream)) return error;
  record({.kind = Kind::launch,
          .name = "cudaLaunchKernelEx",
          .kernel = kernel,
          .grid = {grid.x, grid.y, grid.z},
          .block = {block.x, block.y, block.z},
          .dependent = dependent});
  enqueue(config.stream, [=, thread = std::move(thread)] {
    if (dependent) {  // beside the kernels before it, of which nothing is known then
      const DeviceShut shut(running);
      run_until_wait(grid, block, thread);
    }
    run_grid(grid, block, thread);
  });
  return cudaSuccess;
}

}  // namespace cuda_sim::detail

namespace cuda_sim {

void set_dry(bool dry) {
  const std::lock_guard lock(detail::runtime_mutex());
  detail::run_everything();
  detail::runtime().dry = dry;
}

}  // namespace cuda_sim

using namespace cuda_sim::detail;

cudaError_t cudaDeviceSynchronize() {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_wait_for_device()) return error;
  visit_shuffled(runtime().streams.size(), [](std::uint64_t i) {
    if (Stream& stream = *runtime().streams[i]; stream.device == current_device()) stream.run();
  });
  after_wait("cudaDeviceSynchronize");
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  const Call call;
  if (call.failed()) return call.error();
  if (!stream || flags != cudaStreamNonBlocking) return cudaErrorInvalidValue;
  if (const cudaError_t error = check_unsafe_call()) return error;
  const auto& made = runtime().streams.emplace_back(std::make_unique<Stream>(Stream{current_device()}));
  *stream = reinterpret_cast<cudaStream_t>(made.get());
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_wait(stream)) return error;
  run_queued(stream);
  after_wait("cudaStreamSynchronize");
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_wait(handle)) return error;
  return find(handle)->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_stream(handle)) return error;
  const Event* event = find(event_handle);
  if (!event) return cudaErrorInvalidResourceHandle;
  Stream& stream = *find(handle);
  if (event->captured.capture || stream.captured.capture) return wait_in_capture(handle, *event);
  // What the event stands for now, whatever is recorded in it later.
  if (event->stream && event->stream != &stream && event->stream->done < event->position) {
    push(stream, [other = event->stream, position = event->position] { other->run_until(position); });
  }
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const Call call;
  if (call.failed()) return call.error();
  if (!event || flags > cudaEventDisableTiming) return cudaErrorInvalidValue;
  if (const cudaError_t error = check_unsafe_call()) return error;
  const auto& made = runtime().events.emplace_back(std::make_unique<Event>(Event{current_device()}));
  *event = reinterpret_cast<cudaEvent_t>(made.get());
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event_handle, cudaStream_t handle) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_stream(handle)) return error;
  Stream& stream = *find(handle);
  Event* event = find(event_handle);
  if (!event || event->device != stream.device) return cudaErrorInvalidResourceHandle;
  event->captured = stream.captured;
  if (const auto& [capture, lane] = event->captured; capture) {
    event->position = capture->graph->position(lane);
    return cudaSuccess;
  }
  event->stream = &stream;
  event->position = stream.queued;
  return cudaSuccess;
}
