// AMX-BF16 in addition to AVX-512 with AVX512_BF16 (Intel, from Sapphire Rapids on): products of bf16 pairs in tiles of
// 16 x 16.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cpu/vec/avx512bf16.h"

namespace pissa::cpu::PISSA_ISA {

// During its lifetime, the thread's tile registers are: 0 to 3, c of 32 x 32; 4 and 5, a of 32 x 16 words; 6 and 7, b
// of 16 words x 32; each 16 rows of 64 bytes. Otherwise they are in their initial state, which a context switch need
// not save.
class Tiles {
 public:
  static constexpr bool kMultiply = true;
  static constexpr int kRows = 32;
  static constexpr int kDepth = 16;  // words; a product is over a multiple of them

  PISSA_INLINE Tiles() {
    alignas(64) std::uint8_t config[64] = {1};  // palette 1
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;  // bytes of a row, 16 bits
      config[48 + i] = 16;      // rows
    }
    written(config);
    _tile_loadconfig(config);
  }
  PISSA_INLINE ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  static PISSA_INLINE void arrange(std::int64_t, int, std::int64_t, std::int64_t, float*) {}

  // c[32, 32] = or += a[32, length] b[length, 32], in words; leading dimensions likewise, b's is 32
  PISSA_INLINE void multiply(std::int64_t, std::int64_t length, const float* a, std::int64_t ld_a, const float* b,
                             float* c, std::int64_t ld_c, bool accumulate) const {
    constexpr int kWord = sizeof(float);
    written(c);
    if (accumulate) {
      _tile_loadd(0, c, ld_c * kWord);
      _tile_loadd(1, c + 16, ld_c * kWord);
      _tile_loadd(2, c + 16 * ld_c, ld_c * kWord);
      _tile_loadd(3, c + 16 * ld_c + 16, ld_c * kWord);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (std::int64_t k = 0; k < length; k += kDepth, b += kDepth * 32) {
      _tile_loadd(4, a + k, ld_a * kWord);
      _tile_loadd(6, b, 32 * kWord);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 16, 32 * kWord);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * ld_a + k, ld_a * kWord);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ld_c * kWord);
    _tile_stored(1, c + 16, ld_c * kWord);
    _tile_stored(2, c + 16 * ld_c, ld_c * kWord);
    _tile_stored(3, c + 16 * ld_c + 16, ld_c * kWord);
  }

 private:
  // GCC's tile loads do not tell the compiler that they read memory, and in older versions neither does
  // _tile_loadconfig (GCC bug 114098). Stores to that memory could come later, or not at all.
  static PISSA_INLINE void written(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }
};

}  // namespace pissa::cpu::PISSA_ISA
