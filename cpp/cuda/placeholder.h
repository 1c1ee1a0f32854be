// Stands for the CUDA backend until it is there: something of each library, so that the build links what it will need.
#pragma once

#include <cuda_runtime.h>

namespace pissa::cuda {

void placeholder(float* out, int n, cudaStream_t stream);

}  // namespace pissa::cuda
