// The simulated device: threads and their collectives, and that it finds what it is there to find in kernels.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "support/cuda_sim_case.h"
#include "support/formats.h"
#include "support/matrices.h"

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

TEST_F(CudaSimTest, Bfloat16) {
  expect_format(
      kBf16, [](std::uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); },
      [](float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); });
}

TEST_F(CudaSimTest, Half) {
  expect_format(
      kF16, [](std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); },
      [](float value) { return __half_as_ushort(__float2half_rn(value)); });
}

TEST_F(CudaSimTest, Intrinsics) {
  EXPECT_EQ(__byte_perm(0x33221100u, 0x77665544u, 0x7410u), 0x77441100u);
  EXPECT_EQ(__byte_perm(0x80u, 0, 0x0008u), 0x808080ffu);
  EXPECT_EQ(__clz(1), 31);
  EXPECT_EQ(__clz(0), 32);
  EXPECT_EQ(__popc(0xf0f0u), 8);
  EXPECT_EQ(max(NAN, 1.0f), 1.0f);
  EXPECT_EQ(__half22float2(__floats2half2_rn(1.5f, -2.0f)).y, -2.0f);
  EXPECT_EQ(__bfloat1622float2(__floats2bfloat162_rn(1.5f, -2.0f)).x, 1.5f);
  EXPECT_EQ(min(-1LL, 1LL), -1);
  EXPECT_EQ(__float_as_uint(1.0f), 0x3f800000u);
  static_assert(alignof(float4) == 16 && alignof(uint2) == 8 && sizeof(int4) == 16);
}

// ---- Threads --------------------------------------------------------------------------------------------------------

__global__ void write_place(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned index = block * blockDim.x * blockDim.y * blockDim.z + thread;
  atomicAdd(&out[index], static_cast<int>(index));
}

TEST_F(CudaSimTest, EveryThreadRunsOnce) {
  std::vector<int> expected(2 * 3 * 2 * 5 * 7 * 3);
  int* out = upload(expected);
  std::iota(expected.begin(), expected.end(), 0);
  run(write_place, dim3(2, 3, 2), dim3(5, 7, 3), out);
  EXPECT_EQ(download(out, expected.size()), expected);
}

__global__ void shuffles(float* sums, int* shuffled, double* down, unsigned* votes) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  float sum = static_cast<float>(threadIdx.x);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  sums[threadIdx.x] = sum;
  shuffled[threadIdx.x] = __shfl_sync(kAll, lane * 10, lane + 1, 8);
  down[threadIdx.x] = __shfl_down_sync(kAll, lane + 0.5, 5);
  votes[threadIdx.x] = __ballot_sync(kAll, lane % 3 == 0) + (__any_sync(kAll, threadIdx.x == 40) ? 1u : 0u);
}

TEST_F(CudaSimTest, Shuffles) {
  float* sums = device_memory<float>(64);
  int* shuffled = device_memory<int>(64);
  double* down = device_memory<double>(64);
  unsigned* votes = device_memory<unsigned>(64);
  run(shuffles, 1, 64, sums, shuffled, down, votes);
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32;
    EXPECT_EQ(download(sums, 64)[i], i < 32 ? 496 : 496 + 32 * 32);
    EXPECT_EQ(download(shuffled, 64)[i], (lane / 8 * 8 + (lane + 1) % 8) * 10);
    EXPECT_EQ(download(down, 64)[i], (lane + 5 < 32 ? lane + 5 : lane) + 0.5);
    EXPECT_EQ(download(votes, 64)[i], 0x49249249u + (i >= 32));
  }
}

__global__ void atomics(int* integers, unsigned* bits, float* sum, double* wide) {
  const int i = static_cast<int>(threadIdx.x + blockDim.x * blockIdx.x);
  atomicMax(&integers[0], i);
  atomicMax(&integers[1], -i);
  atomicAdd(&integers[2], 1);
  atomicOr(bits, 1u << (i % 32));
  atomicAdd(sum, 0.5f);
  atomicAdd(wide, 0.25);
}

TEST_F(CudaSimTest, Atomics) {
  int* integers = upload(std::vector<int>{0, -1000, 0});
  unsigned* bits = upload(std::vector<unsigned>{0});
  float* sum = upload(std::vector<float>{0});
  double* wide = upload(std::vector<double>{0});
  run(atomics, 3, 40, integers, bits, sum, wide);
  EXPECT_EQ(download(integers, 3), (std::vector<int>{119, 0, 120}));
  EXPECT_EQ(download(bits, 1)[0], kAll);
  EXPECT_EQ(download(sum, 1)[0], 60);
  EXPECT_EQ(download(wide, 1)[0], 30);
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

TEST_F(CudaSimTest, BlockReduction) { EXPECT_EQ(sums_of_blocks(sum_block<true>, 6), std::vector<float>(6, kThreads)); }

#ifndef __SANITIZE_THREAD__

TEST_F(CudaSimTest, MissingBarrierChangesTheResult) {
  EXPECT_NE(sums_of_blocks(sum_block<false>, 6), std::vector<float>(6, kThreads));
}

#else  // ThreadSanitizer reports it, before there is a result

TEST_F(CudaSimTest, MissingBarrierIsARace) {
  EXPECT_EXIT(
      {
        sums_of_blocks(sum_block<false>, 1);
        std::exit(0);
      },
      [](int status) { return WEXITSTATUS(status) == 66; }, "ThreadSanitizer: data race");
}

__global__ void write_all(int* out) { out[0] = static_cast<int>(threadIdx.x); }

TEST_F(CudaSimTest, SameAddressOfGlobalMemoryIsARace) {
  EXPECT_EXIT(
      {
        run(write_all, 1, 2, device_memory<int>(1));
        std::exit(0);
      },
      [](int status) { return WEXITSTATUS(status) == 66; }, "ThreadSanitizer: data race");
}

__global__ void write_by_block(int* out) {
  if (threadIdx.x == blockIdx.x) out[0] = 1;
}

TEST_F(CudaSimTest, SameAddressFromTwoBlocksIsARace) {
  EXPECT_EXIT(
      {
        run(write_by_block, 2, 2, device_memory<int>(1));
        std::exit(0);
      },
      [](int status) { return WEXITSTATUS(status) == 66; }, "ThreadSanitizer: data race");
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
  EXPECT_DEATH(run(shuffle, 1, 1025, out), "more than 1024");
}

// ---- Matrix products ------------------------------------------------------------------------------------------------

/// d = d + a * b of one tile, row-major, each lane with its fragments as PTX lays them out.
__global__ void multiply_tile(const std::uint16_t* a, const std::uint16_t* b, float* d, bool bf16) {
  const unsigned g = threadIdx.x >> 2, q = threadIdx.x & 3;
  unsigned a_fragment[4], b_fragment[2];
  for (unsigned i = 0; i < 4; ++i) {
    const std::uint16_t* pair = a + (g + 8 * (i & 1)) * 16 + 2 * q + 8 * (i >> 1);
    a_fragment[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
  }
  for (unsigned i = 0; i < 2; ++i) {
    const unsigned k = 2 * q + 8 * i;
    b_fragment[i] = b[k * 8 + g] | static_cast<unsigned>(b[(k + 1) * 8 + g]) << 16;
  }
  float sums[4];
  for (unsigned i = 0; i < 4; ++i) sums[i] = d[(g + 8 * (i >> 1)) * 8 + 2 * q + (i & 1)];
  cuda_sim::mma_m16n8k16(sums, a_fragment, b_fragment, bf16);
  for (unsigned i = 0; i < 4; ++i) d[(g + 8 * (i >> 1)) * 8 + 2 * q + (i & 1)] = sums[i];
}

TEST_F(CudaSimTest, MatrixProduct) {
  Random random(1);
  for (const bool bf16 : {true, false}) {
    const FloatFormat& format = bf16 ? kBf16 : kF16;
    const Dense a = random.dense(16, 16), b = random.dense(16, 8), c = random.dense(16, 8);
    std::vector<std::uint16_t> a_bits, b_bits;
    for (const double value : a.values) a_bits.push_back(static_cast<std::uint16_t>(format.encode(value)));
    for (const double value : b.values) b_bits.push_back(static_cast<std::uint16_t>(format.encode(value)));
    float* d = upload(std::vector<float>(c.values.begin(), c.values.end()));
    run(multiply_tile, 1, 32, upload(a_bits), upload(b_bits), d, bf16);
    const std::vector<float> result = download(d, 16 * 8);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        double exact = static_cast<float>(c(i, j));
        for (int k = 0; k < 16; ++k) exact += format.decode(a_bits[i * 16 + k]) * format.decode(b_bits[k * 8 + j]);
        EXPECT_NEAR(result[i * 8 + j], exact, 1e-6 * (1 + std::fabs(exact)));
      }
    }
  }
}

}  // namespace
}  // namespace pissa::test
