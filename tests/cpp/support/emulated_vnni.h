// AVX-VNNI's product, as vec/quads_x86.h uses it, in plain C++, after Intel's manual (volume 2, VPDPBUSD). Included
// before kernels.cc.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pissa::test {

template <class Register>
Register dpbusd(Register sum, Register unsigned_bytes, Register signed_bytes) {
  std::int32_t sums[8];
  std::uint8_t u[32];
  std::int8_t s[32];
  __builtin_memcpy(sums, &sum, sizeof sums);
  __builtin_memcpy(u, &unsigned_bytes, sizeof u);
  __builtin_memcpy(s, &signed_bytes, sizeof s);
  for (int i = 0; i < 32; ++i) sums[i / 4] += u[i] * s[i];
  __builtin_memcpy(&sum, sums, sizeof sums);
  return sum;
}

}  // namespace pissa::test

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 ::pissa::test::dpbusd
