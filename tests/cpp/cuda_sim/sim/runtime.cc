// The runtime but for streams: errors, the device, memory.
#include "sim/runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"
#include "sim/capture.h"
#include "sim/control.h"
#include "sim/ledger.h"
#include "sim/memory.h"
#include "sim/modes.h"

namespace cuda_sim::detail {
namespace {

int compute_capability_major = 9;
int compute_capability_minor = 0;
int multiprocessor_count = kMultiprocessors;

thread_local int device_of_thread = 0;

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;
};
constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "failed due to a previous error during capture"},
    {cudaErrorStreamCaptureMerge, "cudaErrorStreamCaptureMerge", "would result in a merge of separate captures"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation", "dependency on uncaptured work"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent", "event last recorded in a capturing stream"},
};

bool is_device_number(int device) { return device >= 0 && device < kDevices; }

const ErrorText& text_of(cudaError_t error) {
  for (const ErrorText& entry : kErrors) {
    if (entry.error == error) return entry;
  }
  static constexpr ErrorText kOther{cudaSuccess, "unrecognized error code", "unrecognized error code"};
  return kOther;
}

bool is_valid(const void* pointer, std::size_t bytes) {
  return pointer && (!is_device(pointer) || is_allocated(pointer, bytes));
}

}  // namespace

Failure runtime_failure, blas_failure, solver_failure;

void die(const char* what) {
  std::fprintf(stderr, "cuda_sim: %s\n", what);
  std::abort();
}

int current_device() { return device_of_thread; }

bool has_dependent_launches() { return compute_capability_major >= 9; }

}  // namespace cuda_sim::detail

namespace cuda_sim {

void set_compute_capability(int major, int minor) {
  detail::compute_capability_major = major;
  detail::compute_capability_minor = minor;
}

void set_multiprocessors(int count) { detail::multiprocessor_count = count; }

void fail_next(cudaError_t error, int after) { detail::runtime_failure.arm(error, after); }

bool failure_pending() {
  return detail::runtime_failure.pending() || detail::blas_failure.pending() || detail::solver_failure.pending();
}

void clear_failures() { detail::runtime_failure = detail::blas_failure = detail::solver_failure = {}; }

}  // namespace cuda_sim

using namespace cuda_sim::detail;

const char* cudaGetErrorName(cudaError_t error) { return text_of(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return text_of(error).text; }

cudaError_t cudaGetDevice(int* device) {
  const Call call;
  if (call.failed()) return call.error();
  *device = current_device();
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  const Call call;
  if (call.failed()) return call.error();
  if (!is_device_number(device)) return cudaErrorInvalidDevice;
  device_of_thread = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const Call call;
  if (call.failed()) return call.error();
  if (!is_device_number(device)) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessor_count;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = compute_capability_major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = compute_capability_minor;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t stream) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_stream(stream)) return error;
  if (!pointer) return cudaErrorInvalidValue;
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  *pointer = allocate(bytes, device_of(stream));
  if (!*pointer) {  // what is freed in the queues makes room
    run_everything();
    *pointer = allocate(bytes, device_of(stream));
  }
  if (!*pointer) return cudaErrorMemoryAllocation;
  record({.kind = Kind::allocation, .name = "cudaMallocAsync", .bytes = static_cast<double>(bytes)});
  if (const auto& capture = captured(stream).capture) {
    capture->graph->own(*pointer);
    enqueue(stream, [memory = *pointer] { make_fresh(memory); });
  }
  return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  const Call call(Call::kNeverFails);
  if (!pointer) return cudaSuccess;
  if (const cudaError_t error = check_stream(stream)) return error;
  if (const auto& capture = captured(stream).capture) {
    if (capture->graph->owns(pointer) && retire(pointer)) {
      enqueue(stream, [pointer] { make_inaccessible(pointer); });
      return cudaSuccess;
    }
    capture->valid = false;
    return cudaErrorInvalidValue;
  }
  if (!retire(pointer)) return cudaErrorInvalidValue;
  enqueue_always(stream, [pointer] { release(pointer); });
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  const Call call;
  if (call.failed()) return call.error();
  *total = memory_of_device();
  *free = *total - cuda_sim::bytes_in_use();
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Call call;
  if (call.failed()) return call.error();
  const bool device = is_allocated(pointer, 1);
  void* address = const_cast<void*>(pointer);
  *attributes = {device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, device ? device_of(pointer) : -2,
                 device ? address : nullptr, device ? nullptr : address};
  return cudaSuccess;
}

// Memory of the host is pageable, all of it: its bytes are taken now, for the host may change them; in a capture it
// cannot be copied.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_stream(stream)) return error;
  if (bytes == 0) return cudaSuccess;
  if (!is_valid(to, bytes) || !is_valid(from, bytes)) return cudaErrorInvalidValue;
  const bool reads_device = kind == cudaMemcpyDeviceToHost;
  if (is_device(to) == reads_device || is_device(from) != reads_device) return cudaErrorInvalidMemcpyDirection;
  if (const auto& capture = captured(stream).capture) {
    capture->valid = false;
    return cudaErrorStreamCaptureUnsupported;
  }
  record({.kind = reads_device ? Kind::copy_to_host : Kind::copy_to_device,
          .name = "cudaMemcpyAsync",
          .bytes = static_cast<double>(bytes)});
  if (is_dry()) {
    if (reads_device) enqueue_always(stream, [=] { std::memset(to, 0, bytes); });
    return cudaSuccess;
  }
  std::vector<unsigned char> taken;
  if (!reads_device) {
    const auto* first = static_cast<const unsigned char*>(from);
    taken.assign(first, first + bytes);
    if (library_modes.defect == cuda_sim::Defect::byte_flipped && bytes > 100) taken[100] ^= 0x11;
  }
  enqueue(stream, [=, taken = std::move(taken)] {
    const void* of_device = reads_device ? from : to;
    const DeviceOpen open(device_of(of_device));  // of any
    require_allocated(of_device, bytes, "cudaMemcpy", device_of(of_device));
    std::memcpy(to, reads_device ? from : taken.data(), bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_stream_here(stream)) return error;
  if (bytes == 0) return cudaSuccess;
  if (!is_allocated(to, bytes)) return cudaErrorInvalidValue;
  enqueue(stream, [=] {
    require_allocated(to, bytes, "cudaMemset");
    std::memset(to, value, bytes);
  });
  return cudaSuccess;
}
