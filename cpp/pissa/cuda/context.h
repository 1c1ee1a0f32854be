// What a computation on CUDA takes from its surroundings: a device, a stream, library handles, memory; and its errors.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <cusolverDn.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "pissa/core/error.h"
#include "pissa/core/types.h"

namespace pissa::cuda {

/// The device has no room for an allocation.
class OutOfMemory : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Where device memory comes from: torch's caching allocator inside torch. Both calls are ordered by the stream: memory
/// may be freed while work that uses it is still queued there.
class Allocator {
 public:
  virtual ~Allocator() = default;
  /// Throws OutOfMemory.
  virtual void* allocate(std::int64_t bytes, cudaStream_t stream) const = 0;
  virtual void free(void* data, cudaStream_t stream) const noexcept = 0;
};

/// cudaMallocAsync, for programs without torch.
const Allocator& stream_ordered_allocator();

/// Everything runs on `stream`, of `device`, which is the current one while a backend lives.
struct Context {
  int device = 0;
  cudaStream_t stream = nullptr;
  cublasHandle_t blas = nullptr;  ///< on `stream`; also serves as the handle of cublasLt
  const Allocator* allocator = nullptr;

  /// A cuSOLVER handle on `stream`, of the calling thread; made on first use, which takes milliseconds.
  cusolverDnHandle_t solver() const;

  /// A second stream, of the calling thread, and an event to order it with the first; made on first use, which may be
  /// inside a capture. side_stream.h is for those who use it.
  struct Side {
    cudaStream_t stream = nullptr;
    cudaEvent_t event = nullptr;
  };
  Side side() const;
};

/// A context on the current device for programs without torch: the calling thread's own stream and handle. When the
/// thread has ended they serve the next new one.
const Context& standalone_context();

/// 10 * major + minor of a device's compute capability.
int capability(int device);

int multiprocessors(int device);

/// Throws std::runtime_error, naming the device and what the library was built for, unless it can run there.
void check_supported(int device);

std::string describe(cudaError_t status);
std::string describe(cublasStatus_t status);
std::string describe(cusolverStatus_t status);

inline bool succeeded(cudaError_t status) { return status == cudaSuccess; }
inline bool succeeded(cublasStatus_t status) { return status == CUBLAS_STATUS_SUCCESS; }
inline bool succeeded(cusolverStatus_t status) { return status == CUSOLVER_STATUS_SUCCESS; }

/// Throws std::runtime_error naming the call, the device, the status and the sizes, given as name, value, name, value.
template <class Status, class... Sizes>
void check(Status status, const Context& context, const char* call, const Sizes&... sizes) {
  if (succeeded(status)) return;
  std::string text = message(call, " failed on CUDA device ", context.device, ": ", describe(status));
  if constexpr (sizeof...(sizes) > 0) {
    text += " (";
    (text.append(message(sizes, " ")), ...);
    text.back() = ')';
  }
  throw std::runtime_error(text);
}

/// Copies device memory to the host and waits for it, and with it for everything before on the stream.
void read_back(const Context& context, const void* device, void* host, std::int64_t bytes);

/// Launches a kernel with CUDA's launch attributes; a block's threads are one-dimensional.
template <class... Params, class... Args>
void launch_with(std::span<cudaLaunchAttribute> attributes, const Context& context, const char* name,
                 void (*kernel)(Params...), dim3 grid, unsigned threads, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = context.stream;
  config.attrs = attributes.data();
  config.numAttrs = static_cast<unsigned>(attributes.size());
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  if (succeeded(status)) return;  // an error of a kernel before this one, maybe of another library, comes here too
  check(status, context, message(name, ", or a kernel before it,").c_str(), "grid", grid.x, "x", grid.y);
}

/// Launches a kernel without attributes.
template <class... Params, class... Args>
void launch(const Context& context, const char* name, void (*kernel)(Params...), dim3 grid, unsigned threads,
            const Args&... args) {
  launch_with({}, context, name, kernel, grid, threads, args...);
}

/// Whether the stream is being captured into a graph.
bool is_capturing(const Context& context);

/// Whether launch_dependent may ask for an early start: from compute capability 9.0 on, where that was not found to be
/// wrong (routes.h), and outside of a capture, in which drivers have refused it (SGLang #18596).
bool may_launch_early(const Context& context);

/// Launches a kernel that may start before its predecessor on the stream has ended, if the predecessor calls
/// allow_dependent_launch and the device can do so. The kernel has to call wait_for_earlier_kernels.
template <class... Params, class... Args>
void launch_dependent(const Context& context, const char* name, void (*kernel)(Params...), dim3 grid, unsigned threads,
                      const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  const std::size_t count = may_launch_early(context) ? 1 : 0;
  launch_with(std::span(&attribute, count), context, name, kernel, grid, threads, args...);
}

/// Device memory of one matrix, or of a stack of `count` matrices one after the other.
class Buffer {
 public:
  Buffer(const Context& context, std::int64_t rows, std::int64_t cols, Format format, std::int64_t count = 1);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer();

  MutableMatrix view() const { return view_; }
  template <class T>
  T* data() const {
    return static_cast<T*>(view_.data);
  }

 private:
  const Allocator* allocator_;
  cudaStream_t stream_;
  MutableMatrix view_;
};

/// Uninitialised device memory for `count` elements of a type that is no format: f64, pointers, integers, bytes.
template <class T>
class Array {
 public:
  Array(const Context& context, std::int64_t count)
      : buffer_(context, 1, (count * static_cast<std::int64_t>(sizeof(T)) + 3) / 4, Format::f32) {}
  T* data() const { return buffer_.data<T>(); }

 private:
  Buffer buffer_;
};

}  // namespace pissa::cuda
