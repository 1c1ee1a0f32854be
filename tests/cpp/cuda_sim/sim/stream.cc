#include "sim/stream.h"

#include <algorithm>
#include <chrono>
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
#include "sim/order.h"
#include "sim/runtime.h"

namespace cuda_sim::detail {
namespace {

int running = 0;  // device

struct Stream {
  int device = 0;
  std::deque<std::function<void()>> queue;
  std::uint64_t queued = 0;
  std::uint64_t done = 0;
  bool blocking = true;  // ordered with the null stream
  bool destroyed = false;
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
using StreamPtr = std::shared_ptr<Stream>;

struct Event {
  int device = 0;
  StreamPtr stream;  // null: never recorded
  std::uint64_t position = 0;
  Captured captured = {};  // where it was last recorded, at `position`, if that was captured
  bool timed = true;
  std::chrono::steady_clock::time_point time;
  bool complete() const { return !stream || stream->done >= position; }
};
using EventPtr = std::shared_ptr<Event>;

struct Runtime {
  std::recursive_mutex mutex;
  std::vector<StreamPtr> null_streams;  // of each device
  std::vector<StreamPtr> streams;       // these, too; those that are destroyed stay until their work is done
  std::vector<EventPtr> events;
  bool dry = false;

  Runtime() {
    for (int device = 0; device < kDevices; ++device) {
      null_streams.push_back(std::make_shared<Stream>());
      null_streams.back()->device = device;
    }
    streams = null_streams;
  }
};

Runtime& runtime() {
  static Runtime& result = *new Runtime;
  return result;
}

StreamPtr find(cudaStream_t handle) {
  if (!handle) return runtime().null_streams[current_device()];
  for (const StreamPtr& stream : runtime().streams) {
    if (reinterpret_cast<cudaStream_t>(stream.get()) == handle && !stream->destroyed) return stream;
  }
  return nullptr;
}

EventPtr find(cudaEvent_t handle) {
  for (const EventPtr& event : runtime().events) {
    if (reinterpret_cast<cudaEvent_t>(event.get()) == handle) return event;
  }
  return nullptr;
}

void push(Stream& stream, std::function<void()> work) {
  stream.queue.push_back(std::move(work));
  ++stream.queued;
}

void push_wait(Stream& stream, const StreamPtr& other, std::uint64_t position) {
  if (other->done < position) push(stream, [other, position] { other->run_until(position); });
}

/// What the null stream and the others owe each other: work of either begins when earlier work of the other is done.
void push_legacy_waits(Stream& stream) {
  if (!stream.blocking) return;
  for (const StreamPtr& other : runtime().streams) {
    const StreamPtr& null_stream = runtime().null_streams[stream.device];
    const bool ordered = (&stream == null_stream.get()) != (other == null_stream);
    if (ordered && other->device == stream.device && other->blocking) push_wait(stream, other, other->queued);
  }
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

cudaError_t check_not_captured(const Event& event) {
  const auto& capture = event.captured.capture;
  return capture ? invalidate(*capture, cudaErrorCapturedEvent) : cudaSuccess;
}

/// cudaStreamWaitEvent where the stream or the event, or both, are captured.
cudaError_t wait_in_capture(cudaStream_t stream, const Event& event) {
  const auto& [from, from_lane] = event.captured;
  if (!from) {
    return event.stream ? invalidate(*captured(stream).capture, cudaErrorStreamCaptureIsolation) : cudaSuccess;
  }
  if (from->ended) return cudaErrorCapturedEvent;
  if (!from->valid) return cudaErrorStreamCaptureInvalidated;
  if (!stream) return invalidate(*from, cudaErrorStreamCaptureImplicit);
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
  std::erase_if(runtime().streams, [](const StreamPtr& stream) { return stream->destroyed && stream->queue.empty(); });
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
  if (!stream) return check_null_stream();
  const Captured& in = captured(stream);
  return in.capture && !in.capture->valid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}

const Captured& captured(cudaStream_t stream) { return find(stream)->captured; }

void join(cudaStream_t handle, const std::shared_ptr<Capture>& capture) {
  const StreamPtr stream = find(handle);
  stream->captured = {capture, capture->graph->add_lane()};
  capture->blocking |= stream->blocking;
}

void leave(const Capture& capture) {
  for (const StreamPtr& stream : runtime().streams) {
    if (stream->captured.capture.get() == &capture) stream->captured = {};
  }
}

bool is_dry() { return runtime().dry; }

void enqueue(cudaStream_t stream, std::function<void()> work) {
  if (!is_dry()) enqueue_always(stream, std::move(work));
}

void enqueue_always(cudaStream_t handle, std::function<void()> work) {
  const StreamPtr stream = find(handle);
  if (const auto& [capture, lane] = stream->captured; capture) return capture->graph->add(lane, std::move(work));
  push_legacy_waits(*stream);
  push(*stream, std::move(work));
}

void run_queued(cudaStream_t stream) {
  enqueue_always(stream, [] {});  // behind what the null stream owes
  find(stream)->run();
}

void run_device(int device) {
  const std::vector<StreamPtr> streams = runtime().streams;
  visit_shuffled(streams.size(), [&](std::uint64_t i) {
    if (streams[i]->device == device) streams[i]->run();
  });
}

void run_everything() {
  for (int device = 0; device < kDevices; ++device) run_device(device);
}

void synchronize(cudaStream_t stream, const char* name) {
  run_queued(stream);
  after_wait(name);
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
    return call.fail(cudaErrorInvalidConfiguration);
  }
  if (config.numAttrs != 0 || config.dynamicSmemBytes != 0) return call.fail(cudaErrorNotSupported);
  if (const cudaError_t error = check_stream_here(config.stream)) return call.fail(error);
  record({.kind = Kind::launch,
          .name = "cudaLaunchKernelEx",
          .kernel = kernel,
          .grid = {grid.x, grid.y, grid.z},
          .block = {block.x, block.y, block.z}});
  enqueue(config.stream, [grid, block, thread = std::move(thread)] { run_grid(grid, block, thread); });
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
  if (const cudaError_t error = check_wait_for_device()) return call.fail(error);
  run_device(current_device());
  after_wait("cudaDeviceSynchronize");
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  const Call call;
  if (call.failed()) return call.error();
  if (!stream || flags > cudaStreamNonBlocking) return call.fail(cudaErrorInvalidValue);
  if (const cudaError_t error = check_unsafe_call()) return call.fail(error);
  const StreamPtr& made = runtime().streams.emplace_back(std::make_shared<Stream>());
  made->device = current_device();
  made->blocking = flags != cudaStreamNonBlocking;
  *stream = reinterpret_cast<cudaStream_t>(made.get());
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Call call(Call::kNeverFails);
  const StreamPtr stream = find(handle);
  if (!stream || !handle) return call.fail(cudaErrorInvalidResourceHandle);
  stream->destroyed = true;  // its work still runs, when something waits for all
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_wait(stream)) return call.fail(error);
  synchronize(stream, "cudaStreamSynchronize");
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_wait(handle)) return call.fail(error);
  return find(handle)->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_stream(handle)) return call.fail(error);
  const StreamPtr stream = find(handle);
  const EventPtr event = find(event_handle);
  if (!event) return call.fail(cudaErrorInvalidResourceHandle);
  if (event->captured.capture || stream->captured.capture) {
    const cudaError_t error = wait_in_capture(handle, *event);
    return error ? call.fail(error) : cudaSuccess;
  }
  push_legacy_waits(*stream);
  // What the event stands for now, whatever is recorded in it later.
  if (event->stream && event->stream != stream) push_wait(*stream, event->stream, event->position);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const Call call;
  if (call.failed()) return call.error();
  if (!event || flags > (cudaEventBlockingSync | cudaEventDisableTiming)) return call.fail(cudaErrorInvalidValue);
  if (const cudaError_t error = check_unsafe_call()) return call.fail(error);
  const EventPtr& made = runtime().events.emplace_back(std::make_shared<Event>());
  made->device = current_device();
  made->timed = !(flags & cudaEventDisableTiming);
  *event = reinterpret_cast<cudaEvent_t>(made.get());
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  const Call call(Call::kNeverFails);
  const EventPtr event = find(handle);
  if (!event) return call.fail(cudaErrorInvalidResourceHandle);
  std::erase(runtime().events, event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event_handle, cudaStream_t handle) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_stream(handle)) return call.fail(error);
  const StreamPtr stream = find(handle);
  const EventPtr event = find(event_handle);
  if (!event || event->device != stream->device) return call.fail(cudaErrorInvalidResourceHandle);
  event->captured = stream->captured;
  if (const auto& [capture, lane] = event->captured; capture) {
    event->position = capture->graph->position(lane);
    return cudaSuccess;
  }
  enqueue_always(handle, [event] { event->time = std::chrono::steady_clock::now(); });
  event->stream = stream;
  event->position = stream->queued;
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const Call call;
  if (call.failed()) return call.error();
  const EventPtr event = find(handle);
  if (!event) return call.fail(cudaErrorInvalidResourceHandle);
  if (const cudaError_t error = check_not_captured(*event)) return call.fail(error);
  if (event->stream) event->stream->run_until(event->position);
  after_wait("cudaEventSynchronize");
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const Call call;
  if (call.failed()) return call.error();
  const EventPtr event = find(handle);
  if (!event) return call.fail(cudaErrorInvalidResourceHandle);
  if (const cudaError_t error = check_not_captured(*event)) return call.fail(error);
  return event->complete() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start_handle, cudaEvent_t end_handle) {
  const Call call;
  if (call.failed()) return call.error();
  const EventPtr start = find(start_handle);
  const EventPtr end = find(end_handle);
  if (!start || !end || !start->stream || !end->stream || !start->timed || !end->timed) {
    return call.fail(cudaErrorInvalidResourceHandle);
  }
  for (const EventPtr& event : {start, end}) {
    if (const cudaError_t error = check_not_captured(*event)) return call.fail(error);
  }
  if (!start->complete() || !end->complete()) return call.fail(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}
