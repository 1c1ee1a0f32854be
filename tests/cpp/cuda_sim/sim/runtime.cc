// The runtime but for streams: errors, the device, memory.
#include "sim/runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"
#include "sim/capture.h"
#include "sim/control.h"
#include "sim/ledger.h"
#include "sim/memory.h"

namespace cuda_sim::detail {
namespace {

int compute_capability_major = 9;
int compute_capability_minor = 0;

thread_local cudaError_t last_error = cudaSuccess;
thread_local int device_of_thread = 0;

/// What cudaMallocHost has given, with its size. Other memory of the host is pageable.
std::map<const char*, std::size_t>& pinned_memory() {
  static auto& result = *new std::map<const char*, std::size_t>;
  return result;
}

bool is_pinned(const void* pointer, std::size_t bytes) {
  const char* first = static_cast<const char*>(pointer);
  const auto after = pinned_memory().upper_bound(first);
  if (after == pinned_memory().begin()) return false;
  const auto& [start, size] = *std::prev(after);
  return first + bytes <= start + size;
}

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;
};
constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDevicePointer, "cudaErrorInvalidDevicePointer", "invalid device pointer"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver", "driver is insufficient for the runtime"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice", "no kernel image for the device"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "failed due to a previous error during capture"},
    {cudaErrorStreamCaptureMerge, "cudaErrorStreamCaptureMerge", "would result in a merge of separate captures"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched", "capture was not ended where it began"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation", "dependency on uncaptured work"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit", "would depend on legacy stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent", "event last recorded in a capturing stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread", "capture ended from another thread"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

bool is_device_number(int device) { return device >= 0 && device < kDevices; }

const ErrorText& text_of(cudaError_t error) {
  for (const ErrorText& entry : kErrors) {
    if (entry.error == error) return entry;
  }
  static constexpr ErrorText kOther{cudaErrorUnknown, "unrecognized error code", "unrecognized error code"};
  return kOther;
}

cudaError_t allocate_or_fail(const Call& call, const char* name, void** pointer, std::size_t bytes, int device) {
  if (!pointer) return call.fail(cudaErrorInvalidValue);
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  *pointer = allocate(bytes, device);
  if (!*pointer) {  // what is freed in the queues makes room
    run_everything();
    *pointer = allocate(bytes, device);
  }
  if (!*pointer) return call.fail(cudaErrorMemoryAllocation);
  record({.kind = Kind::allocation, .name = name, .bytes = static_cast<double>(bytes)});
  return cudaSuccess;
}

bool matches(cudaMemcpyKind kind, const void* to, const void* from) {
  switch (kind) {
    case cudaMemcpyHostToHost:
      return !is_device(to) && !is_device(from);
    case cudaMemcpyHostToDevice:
      return is_device(to) && !is_device(from);
    case cudaMemcpyDeviceToHost:
      return !is_device(to) && is_device(from);
    case cudaMemcpyDeviceToDevice:
      return is_device(to) && is_device(from);
    case cudaMemcpyDefault:
      return true;
  }
  return false;
}

bool is_valid(const void* pointer, std::size_t bytes) {
  return pointer && (!is_device(pointer) || is_allocated(pointer, bytes));
}

cudaError_t copy(const Call& call, const char* name, void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                 cudaStream_t stream) {
  if (const cudaError_t error = check_stream(stream)) return call.fail(error);
  if (bytes == 0) return cudaSuccess;
  if (!is_valid(to, bytes) || !is_valid(from, bytes)) return call.fail(cudaErrorInvalidValue);
  if (!matches(kind, to, from)) return call.fail(cudaErrorInvalidMemcpyDirection);
  const auto is_pageable = [bytes](const void* pointer) { return !is_device(pointer) && !is_pinned(pointer, bytes); };
  if (const auto& capture = captured(stream).capture; capture && (is_pageable(to) || is_pageable(from))) {
    capture->valid = false;
    return call.fail(cudaErrorStreamCaptureUnsupported);
  }
  const bool reads_device = is_device(from);
  if (is_device(to) != reads_device) {
    record({.kind = reads_device ? Kind::copy_to_host : Kind::copy_to_device,
            .name = name,
            .bytes = static_cast<double>(bytes)});
  }
  if (is_dry()) {
    if (!is_device(to)) enqueue_always(stream, [=] { std::memset(to, 0, bytes); });
    return cudaSuccess;
  }
  // Pageable bytes of the host are taken now: it may change them. Pinned ones are read when the copy runs.
  std::vector<unsigned char> taken;
  if (is_pageable(from)) {
    const auto* first = static_cast<const unsigned char*>(from);
    taken.assign(first, first + bytes);
  }
  enqueue(stream, [=, taken = std::move(taken)] {
    const DeviceOpen open_to(device_of(to)), open_from(device_of(from));  // of any devices
    if (is_device(to)) require_allocated(to, bytes, "cudaMemcpy", device_of(to));
    if (is_device(from)) require_allocated(from, bytes, "cudaMemcpy", device_of(from));
    std::memmove(to, taken.empty() ? from : taken.data(), bytes);
  });
  return cudaSuccess;
}

}  // namespace

Failure runtime_failure, blas_failure, solver_failure;

void die(const char* what) {
  std::fprintf(stderr, "cuda_sim: %s\n", what);
  std::abort();
}

int current_device() { return device_of_thread; }

void set_last_error(cudaError_t error) { last_error = error; }

}  // namespace cuda_sim::detail

namespace cuda_sim {

void set_compute_capability(int major, int minor) {
  detail::compute_capability_major = major;
  detail::compute_capability_minor = minor;
}

void fail_next(cudaError_t error, int after) { detail::runtime_failure.arm(error, after); }

bool failure_pending() {
  return detail::runtime_failure.pending() || detail::blas_failure.pending() || detail::solver_failure.pending();
}

void clear_failures() { detail::runtime_failure = detail::blas_failure = detail::solver_failure = {}; }

}  // namespace cuda_sim

using namespace cuda_sim::detail;

const char* cudaGetErrorName(cudaError_t error) { return text_of(error).name; }
const char* cudaGetErrorString(cudaError_t error) { return text_of(error).text; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* device) {
  const Call call;
  if (call.failed()) return call.error();
  *device = current_device();
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  const Call call;
  if (call.failed()) return call.error();
  if (!is_device_number(device)) return call.fail(cudaErrorInvalidDevice);
  device_of_thread = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  const Call call;
  if (call.failed()) return call.error();
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const Call call;
  if (call.failed()) return call.error();
  if (!is_device_number(device)) return call.fail(cudaErrorInvalidDevice);
  const std::pair<cudaDeviceAttr, int> attributes[] = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxGridDimX, 0x7fffffff},
      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrClockRate, 1980000},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrComputeCapabilityMajor, compute_capability_major},
      {cudaDevAttrComputeCapabilityMinor, compute_capability_minor},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
      {cudaDevAttrMemoryPoolsSupported, 1},
  };
  for (const auto& [known, its_value] : attributes) {
    if (known != attribute) continue;
    *value = its_value;
    return cudaSuccess;
  }
  return call.fail(cudaErrorInvalidValue);
}

// The one pool keeps nothing back, whatever its threshold.
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  const Call call;
  if (call.failed()) return call.error();
  if (!is_device_number(device)) return call.fail(cudaErrorInvalidDevice);
  *pool = nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  const Call call;
  return call.error();
}

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_unsafe_call()) return call.fail(error);
  return allocate_or_fail(call, "cudaMalloc", pointer, bytes, current_device());
}

cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t stream) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_stream(stream)) return call.fail(error);
  const cudaError_t error = allocate_or_fail(call, "cudaMallocAsync", pointer, bytes, device_of(stream));
  if (const auto& capture = captured(stream).capture; capture && !error && *pointer) {
    capture->graph->own(*pointer);
    enqueue(stream, [memory = *pointer] { make_fresh(memory); });
  }
  return error;
}

cudaError_t cudaFree(void* pointer) {
  const Call call(Call::kNeverFails);
  if (!pointer) return cudaSuccess;
  if (const cudaError_t error = check_unsafe_call()) return call.fail(error);
  run_everything();  // as the real one waits for the device
  if (!retire(pointer)) return call.fail(cudaErrorInvalidValue);
  release(pointer);
  return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  const Call call(Call::kNeverFails);
  if (!pointer) return cudaSuccess;
  if (const cudaError_t error = check_stream(stream)) return call.fail(error);
  if (const auto& capture = captured(stream).capture; capture) {
    if (capture->graph->owns(pointer) && retire(pointer)) {
      enqueue(stream, [pointer] { make_inaccessible(pointer); });
      return cudaSuccess;
    }
    capture->valid = false;
    return call.fail(cudaErrorInvalidValue);
  }
  if (!retire(pointer)) return call.fail(cudaErrorInvalidValue);
  enqueue_always(stream, [pointer] { release(pointer); });
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** pointer, std::size_t bytes) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_unsafe_call()) return call.fail(error);
  *pointer = std::malloc(bytes);
  if (!*pointer) return call.fail(cudaErrorMemoryAllocation);
  pinned_memory()[static_cast<const char*>(*pointer)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
  const Call call(Call::kNeverFails);
  if (!pointer) return cudaSuccess;
  if (const cudaError_t error = check_unsafe_call()) return call.fail(error);
  run_everything();  // as the real one waits for the device
  if (pinned_memory().erase(static_cast<const char*>(pointer)) == 0) return call.fail(cudaErrorInvalidValue);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  const Call call;
  if (call.failed()) return call.error();
  *total = memory_of_device();
  *free = *total - std::min(*total, cuda_sim::bytes_in_use());
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

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const Call call;
  if (call.failed()) return call.error();
  return copy(call, "cudaMemcpyAsync", to, from, bytes, kind, stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_unsafe_call()) return call.fail(error);
  if (const cudaError_t error = copy(call, "cudaMemcpy", to, from, bytes, kind, nullptr)) return error;
  synchronize(nullptr, "cudaMemcpy");
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_stream_here(stream)) return call.fail(error);
  if (bytes == 0) return cudaSuccess;
  if (!is_allocated(to, bytes)) return call.fail(cudaErrorInvalidValue);
  enqueue(stream, [=] {
    require_allocated(to, bytes, "cudaMemset");
    std::memset(to, value, bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int) {
  const Call call;
  if (call.failed()) return call.error();
  return function ? cudaSuccess : call.fail(cudaErrorInvalidDeviceFunction);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, std::size_t) {
  const Call call;
  if (call.failed()) return call.error();
  *blocks = 2;
  return cudaSuccess;
}
