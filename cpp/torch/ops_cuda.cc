// The ops on CUDA: the core over CudaBackend, on torch's stream and allocator. Schemas and fakes are those of _C.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "placeholder.h"

namespace pissa::ops {

void placeholder_cuda(float* out, int n) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(0, &stream);
  cuda::placeholder(out, n, static_cast<cudaStream_t>(stream));
}

}  // namespace pissa::ops

STABLE_TORCH_LIBRARY_IMPL(pissa, CUDA, m) { (void)m; }
