// What the kernels share: elements of any format, eight at a time where they lie together; warps; shared memory.
//
// All of it also compiles as plain C++ for the simulation in tests/cpp/cuda_sim, which defines PISSA_CUDA_SIM; what
// only a GPU has, inline PTX and `__shared__`, is behind a function with a body for each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "pissa/core/types.h"

namespace pissa::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

#if defined(PISSA_CUDA_SIM)
using cuda_sim::shared_memory;
#else
/// The block's shared memory of type T: one object for all its threads, uninitialised.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T memory;
  return memory;
}
#endif

/// d += a b, [16, 8] += [16, 16] [16, 8], by the tensor cores of one warp; a and b in bf16 or f16, d in f32. The PTX
/// ISA, "Matrix fragments for mma.m16n8k16", says which lane holds which elements. Before compute capability 8.0 f16
/// alone, in two steps of m16n8k8, whose fragments are the halves of these.
template <Format format>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(PISSA_CUDA_SIM)
  cuda_sim::mma_m16n8k16(d, a, b, format == Format::bf16);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  if constexpr (format == Format::bf16) {
    __trap();  // products.cc sends it another way
  } else {
    for (int half = 0; half < 2; ++half) {
      asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
  }
#else
  if constexpr (format == Format::bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

/// Asks for the 128 bytes around an address of the device's memory, which a cache, L2, then has.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(PISSA_CUDA_SIM)
  cuda_sim::prefetch(address);  // a GPU ignores an address that is none; the simulation does not
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

/// Programmatic dependent launch: lets the next kernel on the stream start before this one ends, if launch_dependent
/// launched it. Does nothing before compute capability 9.0.
__device__ __forceinline__ void allow_dependent_launch() {
#if !defined(PISSA_CUDA_SIM) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until the kernels before this one have ended and what they wrote can be read. Each thread of a kernel that
/// launch_dependent starts has to call it, and may do no more than prefetch before that.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(PISSA_CUDA_SIM)
  cuda_sim::wait_for_earlier_kernels();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// *from. The simulation counts these bytes, for what several blocks read comes from L2 each time.
template <class T>
__device__ __forceinline__ T counted_load(const T* from) {
#if defined(PISSA_CUDA_SIM)
  cuda_sim::count_loaded(sizeof(T));
#endif
  return *from;
}

/// Bytes of an element of a dense format. element_size would look it up in memory, before what is to be loaded.
__device__ __forceinline__ int dense_size(Format format) { return format == Format::f32 ? 4 : 2; }

__device__ __forceinline__ float load(const void* data, Format format, std::int64_t i) {
  if (format == Format::f32) return static_cast<const float*>(data)[i];
  if (format == Format::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}

__device__ __forceinline__ void store(void* data, Format format, std::int64_t i, float value) {
  if (format == Format::f32) static_cast<float*>(data)[i] = value;
  else if (format == Format::bf16) static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
  else static_cast<__half*>(data)[i] = __float2half_rn(value);
}

/// A value as an element of a dense format holds it.
__device__ __forceinline__ float rounded(float value, Format format) {
  if (format == Format::bf16) return __bfloat162float(__float2bfloat16_rn(value));
  if (format == Format::f16) return __half2float(__float2half_rn(value));
  return value;
}

/// Two values as the halves of a register, the first in the lower one.
template <Format format>
__device__ __forceinline__ unsigned pack_halves(float first, float second) {
  unsigned bits;
  if constexpr (format == Format::bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

template <Format format>
__device__ __forceinline__ void unpack_halves(unsigned bits, float& first, float& second) {
  if constexpr (format == Format::bf16) {
    first = __uint_as_float(bits << 16);
    second = __uint_as_float(bits & 0xffff0000u);
  } else {
    __half halves[2];
    memcpy(halves, &bits, sizeof bits);
    first = __half2float(halves[0]);
    second = __half2float(halves[1]);
  }
}

/// Elements that a thread handles together: 16 bytes of a half-precision row, and one load of codes.
inline constexpr int kOctet = 8;

/// Codes that a thread of few_rows handles together.
inline constexpr int kLine = 32;

__host__ __device__ __forceinline__ bool aligned_to_16(const void* pointer) {
  return (reinterpret_cast<std::uintptr_t>(pointer) & 15u) == 0;
}

template <Format format>
__device__ __forceinline__ void store_halves(void* to, const float (&values)[kOctet]) {
  *static_cast<uint4*>(to) =
      make_uint4(pack_halves<format>(values[0], values[1]), pack_halves<format>(values[2], values[3]),
                 pack_halves<format>(values[4], values[5]), pack_halves<format>(values[6], values[7]));
}

template <Format format>
__device__ __forceinline__ void unpack_octet(const uint4 (&words)[2], float (&values)[kOctet]) {
  if constexpr (format == Format::f32) {
    memcpy(values, words, sizeof values);
  } else {
    unpack_halves<format>(words[0].x, values[0], values[1]);
    unpack_halves<format>(words[0].y, values[2], values[3]);
    unpack_halves<format>(words[0].z, values[4], values[5]);
    unpack_halves<format>(words[0].w, values[6], values[7]);
  }
}

// Octets at addresses of 16 bytes, each whole or empty.
template <Format format, int n>
__device__ __forceinline__ void load_whole_octets(const char* const (&from)[n], const int (&counts)[n],
                                                  float (&values)[n][kOctet]) {
  uint4 words[n][2] = {};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (counts[i] <= 0) continue;
    words[i][0] = reinterpret_cast<const uint4*>(from[i])[0];
    if constexpr (format == Format::f32) words[i][1] = reinterpret_cast<const uint4*>(from[i])[1];
  }
#pragma unroll
  for (int i = 0; i < n; ++i) unpack_octet<format>(words[i], values[i]);
}

/// values[i] = elements [firsts[i], firsts[i] + counts[i]), counts[i] <= 8; the rest are 0. Where the addresses allow
/// loads of 16 bytes, those of all the octets are under way before the first is used: a wait for memory for n octets.
template <int n>
__device__ __forceinline__ void load_octets(const void* data, Format format, const std::int64_t (&firsts)[n],
                                            const int (&counts)[n], float (&values)[n][kOctet]) {
  const char* from[n];
  bool whole = true;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    from[i] = static_cast<const char*>(data) + firsts[i] * dense_size(format);
    whole = whole && (counts[i] <= 0 || (counts[i] == kOctet && aligned_to_16(from[i])));
  }
  if (whole) {
    if (format == Format::bf16) return load_whole_octets<Format::bf16>(from, counts, values);
    if (format == Format::f16) return load_whole_octets<Format::f16>(from, counts, values);
    return load_whole_octets<Format::f32>(from, counts, values);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) values[i][j] = j < counts[i] ? load(data, format, firsts[i] + j) : 0.0f;
  }
}

/// The same of one octet.
__device__ __forceinline__ void load_octet(const void* data, Format format, std::int64_t first, int count,
                                           float (&values)[kOctet]) {
  float octets[1][kOctet];
  load_octets(data, format, {first}, {count}, octets);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) values[j] = octets[0][j];
}

__device__ __forceinline__ void store_octet(void* data, Format format, std::int64_t i, int count,
                                            const float (&values)[kOctet]) {
  char* to = static_cast<char*>(data) + i * dense_size(format);
  if (count == kOctet && aligned_to_16(to)) {
    if (format == Format::bf16) return store_halves<Format::bf16>(to, values);
    if (format == Format::f16) return store_halves<Format::f16>(to, values);
    reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    if (j < count) store(data, format, i + j, values[j]);
  }
}

/// Quotient and remainder; in 32 bits, three times as fast, where that is enough.
__device__ __forceinline__ std::int64_t divide(std::int64_t a, std::int64_t b, std::int64_t& remainder) {
  if (((a | b) >> 31) == 0) {
    const unsigned quotient = static_cast<unsigned>(a) / static_cast<unsigned>(b);
    remainder = a - static_cast<std::int64_t>(quotient) * b;
    return quotient;
  }
  const std::int64_t quotient = a / b;
  remainder = a - quotient * b;
  return quotient;
}

}  // namespace pissa::cuda
