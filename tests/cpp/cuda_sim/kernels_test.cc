// The simulated device: that it finds what it is there to find in kernels. Our kernels' tests cover threads,
// shuffles, atomics and tiles.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "support/cuda_sim_case.h"
#include "support/formats.h"

namespace pissa::test {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---- Numbers --------------------------------------------------------------------------------------------------------

template <class Decode, class Encode>
void expect_format(const FloatFormat& format, Decode decode, Encode encode) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double exact = format.decode(bits);
    const float value = decode(static_cast<std::uint16_t>(bits));
    if (std::isnan(exact)) {
      ASSERT_TRUE(std::isnan(value)) << bits;
      ASSERT_EQ(encode(value), 0x7fff) << bits;
      continue;
    }
    ASSERT_EQ(value, exact) << bits;
    ASSERT_EQ(encode(value), bits);
    if (std::isinf(value)) continue;
    // Around the middle between this one and the next away from zero, which may be infinity: there what is rounded is
    // as if the exponents went on.
    const double below = format.decode(bits == 0 || bits == 0x8000 ? bits : bits - 1);
    const double up = format.decode(bits + 1);
    const auto middle = static_cast<float>(std::isinf(up) ? exact + (exact - below) / 2 : (exact + up) / 2);
    for (const float near : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY * middle)}) {
      ASSERT_EQ(encode(near), format.encode(near)) << near;
    }
  }
}

TEST_F(CudaSimTest, HalvesAreRoundedToNearestEven) {
  expect_format(
      kBf16, [](std::uint16_t bits) { return __bfloat162float({bits}); },
      [](float value) { return __float2bfloat16_rn(value).bits; });
  expect_format(
      kF16, [](std::uint16_t bits) { return __half2float({bits}); },
      [](float value) { return __float2half_rn(value).bits; });
}

// ---- Shared memory and barriers -------------------------------------------------------------------------------------

constexpr int kThreads = 128;
struct Partial {
  float of[kThreads];
};

template <bool with_barrier>
__global__ void sum_block(const float* in, float* out) {
  auto& partial = cuda_sim::shared_memory<Partial>();
  const int i = static_cast<int>(threadIdx.x);
  partial.of[i] = in[i];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (with_barrier) __syncthreads();
    if (i < half) partial.of[i] += partial.of[i + half];
  }
  if (i == 0) out[blockIdx.x] = partial.of[0];
}

std::vector<float> sums_of_blocks(void (*kernel)(const float*, float*), unsigned blocks) {
  float* in = upload(std::vector<float>(kThreads, 1));
  float* out = device_memory<float>(blocks);
  run(kernel, blocks, kThreads, in, out);
  return download(out, blocks);
}

TEST_F(CudaSimTest, WithBarriersThreadsShareMemory) {
  EXPECT_EQ(sums_of_blocks(sum_block<true>, 6), std::vector<float>(6, kThreads));
}

#ifndef __SANITIZE_THREAD__

TEST_F(CudaSimTest, AMissingBarrierChangesTheResult) {
  EXPECT_NE(sums_of_blocks(sum_block<false>, 6), std::vector<float>(6, kThreads));
}

#else  // ThreadSanitizer reports it, before there is a result

__global__ void write_all(int* out) { out[0] = static_cast<int>(threadIdx.x); }
__global__ void write_by_block(int* out) {
  if (threadIdx.x == blockIdx.x) out[0] = 1;
}

TEST_F(CudaSimTest, Races) {
  const std::function<void()> races[] = {[] { sums_of_blocks(sum_block<false>, 1); },
                                         [] { run(write_all, 1, 2, device_memory<int>(1)); },
                                         [] { run(write_by_block, 2, 2, device_memory<int>(1)); }};
  for (const auto& race : races) {
    EXPECT_EXIT((race(), std::exit(0)), [](int status) { return WEXITSTATUS(status) == 66; },
                "ThreadSanitizer: data race");
  }
}

#endif

__global__ void read_shared(float* out) { out[blockIdx.x] = cuda_sim::shared_memory<Partial>().of[7]; }

__global__ void write_shared(float* out) {
  cuda_sim::shared_memory<Partial>().of[threadIdx.x] = 1;
  out[blockIdx.x] = 1;
}

TEST_F(CudaSimTest, FreshSharedMemoryIsNaN) {
  float* out = device_memory<float>(3);
  run(write_shared, 3, 1, out);
  run(read_shared, 3, 1, out);
  for (const float value : download(out, 3)) EXPECT_TRUE(std::isnan(value));
}

#ifdef __SANITIZE_ADDRESS__
__global__ void overrun_shared(int past) { cuda_sim::shared_memory<Partial>().of[past] = 1; }

TEST_F(CudaSimTest, OverrunOfSharedMemory) { EXPECT_DEATH(run(overrun_shared, 1, 1, kThreads), ""); }
#endif

__global__ void some_exit_early(int* all) {
  int* out = all + blockIdx.x * blockDim.x;
  if (threadIdx.x % 2 == 1) return;
  out[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (unsigned i = 0; i < blockDim.x; i += 2) sum += out[i];
    out[1] = sum;
  }
}

TEST_F(CudaSimTest, ThreadsThatExitDoNotHoldUpABarrier) {
  const unsigned blocks = 6;  // in some of which the last thread to come is one that exits
  int* out = device_memory<int>(64 * blocks);
  run(some_exit_early, blocks, 64, out);
  for (unsigned i = 0; i < blocks; ++i) EXPECT_EQ(download(out, 64 * blocks)[64 * i + 1], 32);
}

// ---- What must not be -----------------------------------------------------------------------------------------------

__global__ void shuffle_after_some_exited(float* out) {
  if (threadIdx.x % 31 != 0) out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);  // the first and the last exit
}
__global__ void shuffle_without_one(float* out) {
  if (threadIdx.x != 15) out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}
__global__ void shuffle_in_two_branches(float* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 2.0f, 1);
  }
}
__global__ void shuffle_of_half_a_warp(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }
__global__ void shuffle(float* out) { out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1); }
__global__ void barrier_or_shuffle(float* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
  } else {
    __syncthreads();
  }
}
__global__ void two_barriers(float*) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

TEST_F(CudaSimTest, DivergentCollectives) {
  float* out = device_memory<float>(64);
  EXPECT_DEATH(run(shuffle_after_some_exited, 1, 32, out), "lanes that have exited");
  EXPECT_DEATH(run(shuffle_without_one, 1, 32, out), "ends while other lanes");
  EXPECT_DEATH(run(shuffle_in_two_branches, 1, 32, out), "divergent");
  EXPECT_DEATH(run(shuffle_of_half_a_warp, 1, 32, out), "mask");
  EXPECT_DEATH(run(shuffle, 1, 40, out), "fewer than 32");
  EXPECT_DEATH(run(barrier_or_shuffle, 1, 32, out), "deadlock");
  EXPECT_DEATH(run(two_barriers, 1, 32, out), "divergent");
}

}  // namespace
}  // namespace pissa::test
