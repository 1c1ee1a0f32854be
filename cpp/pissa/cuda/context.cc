#include "pissa/cuda/context.h"

#include <algorithm>
#include <array>
#include <utility>

#include "pissa/cuda/of_thread.h"
#include "pissa/cuda/routes.h"

namespace pissa::cuda {
namespace {

// The architectures that CMake asked nvcc for; a comma-separated list of two- or three-digit numbers.
#if !defined(PISSA_CUDA_ARCHITECTURES)
#error "PISSA_CUDA_ARCHITECTURES is defined by CMakeLists.txt"
#endif
constexpr int kArchitectures[] = {PISSA_CUDA_ARCHITECTURES};

class StreamOrderedAllocator final : public Allocator {
 public:
  void* allocate(std::int64_t bytes, cudaStream_t stream) const override {
    void* data = nullptr;
    const cudaError_t status = cudaMallocAsync(&data, static_cast<std::size_t>(bytes), stream);
    if (succeeded(status)) return data;
    const std::string text = message("cudaMallocAsync of ", bytes, " bytes: ", describe(status));
    if (status == cudaErrorMemoryAllocation) throw OutOfMemory(text);
    throw std::runtime_error(text);
  }
  void free(void* data, cudaStream_t stream) const noexcept override { cudaFreeAsync(data, stream); }
};

// While it lives, a capture lets this thread make calls that are in no graph, as torch's allocator does.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Context& context) {
    check(cudaThreadExchangeStreamCaptureMode(&mode_), context, "cudaThreadExchangeStreamCaptureMode");
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the thread's own
};

int attribute(cudaDeviceAttr name, int device) {
  Context context;
  context.device = device;
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), context, "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

const Allocator& stream_ordered_allocator() {
  static const StreamOrderedAllocator allocator;
  return allocator;
}

cusolverDnHandle_t Context::solver() const {
  cusolverDnHandle_t& handle = OfThread<cusolverDnHandle_t>::at(device);
  if (!handle) check(cusolverDnCreate(&handle), *this, "cusolverDnCreate");
  check(cusolverDnSetStream(handle, stream), *this, "cusolverDnSetStream");
  return handle;
}

Context::Side Context::side() const {
  Side& kept = OfThread<Side>::at(device);
  if (kept.stream) return kept;
  const RelaxedCapture relaxed(*this);
  if (!kept.event)
    check(cudaEventCreateWithFlags(&kept.event, cudaEventDisableTiming), *this, "cudaEventCreateWithFlags");
  check(cudaStreamCreateWithFlags(&kept.stream, cudaStreamNonBlocking), *this, "cudaStreamCreateWithFlags");
  return kept;
}

const Context& standalone_context() {
  int device = 0;
  Context context;
  check(cudaGetDevice(&device), context, "cudaGetDevice");
  check_supported(device);
  Context& kept = OfThread<Context>::at(device);
  if (kept.stream) return kept;
  context.device = device;
  context.allocator = &stream_ordered_allocator();
  check(cudaStreamCreateWithFlags(&context.stream, cudaStreamNonBlocking), context, "cudaStreamCreateWithFlags");
  check(cublasCreate(&context.blas), context, "cublasCreate");
  check(cublasSetStream(context.blas, context.stream), context, "cublasSetStream");
  return kept = context;
}

int capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

void check_supported(int device) {
  // Code for x.y runs on x.z with z >= y; PTX of the newest on everything newer.
  const int found = capability(device);
  const int newest = *std::max_element(std::begin(kArchitectures), std::end(kArchitectures));
  const bool supported = found > newest || std::any_of(std::begin(kArchitectures), std::end(kArchitectures),
                                                       [&](int a) { return a / 10 == found / 10 && a <= found; });
  if (supported) return;
  std::string built;
  for (const int a : kArchitectures) built += message(built.empty() ? "" : ", ", a / 10, ".", a % 10);
  throw std::runtime_error(message("CUDA device ", device, ": got compute capability ", found / 10, ".", found % 10,
                                   "; this build runs on ", built,
                                   " and newer; move the tensors to the CPU, or build pissa from source with "
                                   "-DPISSA_CUDA_ARCHITECTURES (7.5 is the oldest that the kernels support)"));
}

// By way of memory that stays: if a call fails, its copy may still be on the stream when the caller's variable is gone.
void read_back(const Context& context, const void* device, void* host, std::int64_t bytes) {
  constexpr std::int64_t kPiece = 4096;
  std::array<char, kPiece>& piece = OfThread<std::array<char, kPiece>>::at(context.device);
  for (std::int64_t done = 0; done < bytes; done += kPiece) {
    const std::size_t size = static_cast<std::size_t>(std::min(kPiece, bytes - done));
    check(cudaMemcpyAsync(piece.data(), static_cast<const char*>(device) + done, size, cudaMemcpyDeviceToHost,
                          context.stream),
          context, "cudaMemcpyAsync", "bytes", size);
    check(cudaStreamSynchronize(context.stream), context, "cudaStreamSynchronize");
    std::copy_n(piece.data(), size, static_cast<char*>(host) + done);
  }
}

bool is_capturing(const Context& context) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(context.stream, &status), context, "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

bool may_launch_early(const Context& context) {
  return capability(context.device) >= 90 && is_open(context.device, Route::early_launch) && !is_capturing(context);
}

std::string describe(cudaError_t status) {
  return message(cudaGetErrorName(status), " (", static_cast<int>(status), "), ", cudaGetErrorString(status));
}

std::string describe(cublasStatus_t status) {
  return message(cublasGetStatusName(status), " (", static_cast<int>(status), ")");
}

std::string describe(cusolverStatus_t status) { return message("cusolverStatus_t ", static_cast<int>(status)); }

Buffer::Buffer(const Context& context, std::int64_t rows, std::int64_t cols, Format format, std::int64_t count)
    : allocator_(context.allocator),
      stream_(context.stream),
      view_{nullptr, rows, cols, cols, format, count > 1 ? rows * cols : 0} {
  const std::int64_t bytes = count * rows * cols * element_size(format);
  if (bytes > 0) view_.data = allocator_->allocate(bytes, stream_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : allocator_(other.allocator_), stream_(other.stream_), view_(std::exchange(other.view_, {})) {}

Buffer::~Buffer() {
  if (view_.data) allocator_->free(view_.data, stream_);
}

}  // namespace pissa::cuda
