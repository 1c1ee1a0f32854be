// Arithmetic, bits and atomics of device code, as far as our kernels use them. Rounding is the host's, to nearest even,
// which is what the suffix _rn promises; the project is compiled without contraction.
#pragma once

#include <math.h>  // CUDA has fmaf and the like in the global namespace

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>

inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }

template <std::integral T>
T min(T a, T b) {
  return std::min(a, b);
}
template <std::integral T>
T max(T a, T b) {
  return std::max(a, b);
}
inline double max(double a, double b) { return std::fmax(a, b); }

// Atomics return the old value. Relaxed, as CUDA's are: they order nothing else, and ThreadSanitizer holds kernels to
// that.
inline unsigned atomicMax(unsigned* address, unsigned value) {
  unsigned old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, max(old, value), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline int atomicOr(int* address, int value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }
