// What a kernel may use: qualifiers, its place in the grid, collectives, shared memory. Arithmetic and atomics are in
// intrinsics.h. `__shared__` is not there on purpose: see shared_memory().
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

#include "sim/intrinsics.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// Of the running thread. All threads of the device run on one thread of the host, one at a time.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace cuda_sim {
namespace detail {

using Where = std::source_location;

constexpr int kWarpSize = 32;
constexpr std::size_t kMaxSharedBytes = 48 << 10;

/// Collectives: each returns when all threads that take part have called it. `where` tells one call in the source from
/// another, to find threads that wait at different ones.
void sync_threads(Where where);
std::uint64_t shuffle(unsigned mask, std::uint64_t bits, int source, Where where);
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool bf16, Where where);

/// The lane of the running thread in its warp.
int lane();

/// The block's memory for `key`, made when a thread first asks for it.
void* shared_memory(const void* key, std::size_t bytes, std::size_t alignment);

template <class T>
inline constexpr char shared_key = 0;

/// The lane whose value a shuffle reads: `source` where it is within the lane's group of `width`, else the lane's own.
template <class T>
T shuffle_value(unsigned mask, T value, int source, Where where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  return std::bit_cast<T>(static_cast<Bits>(shuffle(mask, std::bit_cast<Bits>(value), source, where)));
}

}  // namespace detail

/// The shared memory of type T of the block, in the place of a `__shared__` variable: one for each type and block, its
/// bytes all 0xff when the block starts, so that floats that nobody wrote are NaN.
template <class T>
T& shared_memory() {
  static_assert(sizeof(T) <= detail::kMaxSharedBytes, "more shared memory than a block has without opting in");
  static_assert(std::is_trivially_copyable_v<T>);
  return *static_cast<T*>(detail::shared_memory(&detail::shared_key<T>, sizeof(T), alignof(T)));
}

/// PTX mma.sync.aligned.m16n8k16.row.col.f32.{bf16,f16}.{bf16,f16}.f32: d += a * b over a warp.
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool bf16,
                         detail::Where where = detail::Where::current()) {
  detail::mma_m16n8k16(d, a, b, bf16, where);
}

/// PTX griddepcontrol.wait. Before it, a kernel that may start early can touch no memory: what it reads may not be
/// written yet, and what it writes may still be read. It may prefetch, from memory that is allocated.
void wait_for_earlier_kernels();
void prefetch(const void* address);

void count_loaded(std::size_t bytes);

}  // namespace cuda_sim

inline constexpr int warpSize = cuda_sim::detail::kWarpSize;

inline void __syncthreads(cuda_sim::detail::Where where = cuda_sim::detail::Where::current()) {
  cuda_sim::detail::sync_threads(where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_sim::detail::Where where = cuda_sim::detail::Where::current()) {
  const int group = cuda_sim::detail::lane() & ~(width - 1);
  return cuda_sim::detail::shuffle_value(mask, value, group + (source & (width - 1)), where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize,
                  cuda_sim::detail::Where where = cuda_sim::detail::Where::current()) {
  const int lane = cuda_sim::detail::lane();
  const int source = lane ^ lanes;
  // A later group is out of reach; an earlier one is not, says PTX.
  return cuda_sim::detail::shuffle_value(mask, value, source > (lane | (width - 1)) ? lane : source, where);
}
