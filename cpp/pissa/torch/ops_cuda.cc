// The ops on CUDA devices: CudaBackend, on torch's current stream, cuBLAS handle and caching allocator.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "pissa/cuda/backend.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/routes.h"
#include "pissa/cuda/self_test.h"
#include "pissa/cuda/split_many.h"
#include "pissa/torch/ops.h"

namespace pissa::ops {
namespace {

// Blocks are bound to the stream that was current when they were allocated, which is the op's. Before torch reports
// that it has no memory, it has released its cache, and has printed more on stderr than its stable ABI returns.
class TorchAllocator final : public cuda::Allocator {
 public:
  void* allocate(std::int64_t bytes, cudaStream_t) const override {
    void* data = nullptr;
    if (aoti_torch_cuda_caching_allocator_raw_alloc(static_cast<std::uint64_t>(bytes), &data) != AOTI_TORCH_SUCCESS)
      throw cuda::OutOfMemory(message("torch's CUDA allocator: no memory for ", bytes, " bytes"));
    return data;
  }
  void free(void* data, cudaStream_t) const noexcept override { aoti_torch_cuda_caching_allocator_raw_delete(data); }
};

class CudaDevice {
 public:
  template <class... Tensors>
  explicit CudaDevice(const Tensor& first, const Tensors&... others)
      : guard_(first.get_device_index()), context_(current_context(first.get_device_index())), backend_(context_) {
    (check_same_device(first, others), ...);
    if (cuda::is_tested(context_.device)) return;
    for (const std::string& closed : cuda::test_routes(context_)) {
      aoti_torch_warn("test_routes", "self_test.cc", 0,
                      (closed + ". Please report it with what `pissa env` prints").c_str());
    }
  }
  cuda::CudaBackend& backend() { return backend_; }
  void split_many(std::span<const SplitTask> tasks, const SvdOptions& options) const {
    cuda::split_many(tasks, options, context_);
  }

 private:
  static cuda::Context current_context(std::int32_t device) {
    static const TorchAllocator allocator;
    // The library has its own CUDA runtime, for which the device must be set too.
    cuda::check(cudaSetDevice(device), {.device = device}, "cudaSetDevice");
    cuda::check_supported(device);
    void* stream = nullptr;
    void* blas = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&blas));
    return {device, static_cast<cudaStream_t>(stream), static_cast<cublasHandle_t>(blas), &allocator};
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Context context_;
  cuda::CudaBackend backend_;
};

std::int64_t closed_routes(const Tensor& on) {
  const CudaDevice device(on);
  std::int64_t bits = 0;
  for (const cuda::Route route : cuda::kRoutes) {
    if (!cuda::is_open(on.get_device_index(), route)) bits |= std::int64_t{1} << static_cast<int>(route);
  }
  return bits;
}

}  // namespace
}  // namespace pissa::ops

STABLE_TORCH_LIBRARY_IMPL(pissa, CUDA, m) {
  pissa::ops::implement<pissa::ops::CudaDevice>(m);
  m.impl("closed_routes", PISSA_BOX(&pissa::ops::closed_routes));
}
