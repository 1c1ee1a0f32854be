// Reductions over the lanes of a warp and the threads of a block. Included by .cu files only.
#pragma once

#include "pissa/cuda/device.h"

namespace pissa::cuda {

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Larger {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return max(a, b);
  }
};

/// The values of all lanes of a full warp, combined; every lane gets the same bits.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

/// The same over a block of whole warps. Between two calls with the same types the block synchronises.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, Combine combine) {
  constexpr int kMostWarps = 32;  // a block has at most 1024 threads
  struct Shared {
    T of_warp[kMostWarps];
  };
  Shared& shared = shared_memory<Shared>();
  value = warp_reduce(value, combine);
  if (threadIdx.x % kWarp == 0) shared.of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  T result = shared.of_warp[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) result = combine(result, shared.of_warp[warp]);
  return result;
}

}  // namespace pissa::cuda
