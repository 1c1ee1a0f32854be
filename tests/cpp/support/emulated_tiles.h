// AMX's tile registers and the instructions on them that vec/amxbf16.h uses, in plain C++, after Intel's manual (volume
// 2, TDPBF16PS). Included before kernels.cc, where no processor here has them: what it cannot tell is whether hardware
// does what the manual says.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pissa::test::tiles {

struct State {
  float word[8][16][16];
  bool configured;
};
inline thread_local State state;

inline void load_config(const void* config) {
  const auto* bytes = static_cast<const std::uint8_t*>(config);
  bool right = bytes[0] == 1;
  for (int i = 0; i < 8; ++i) right &= bytes[16 + 2 * i] == 64 && bytes[17 + 2 * i] == 0 && bytes[48 + i] == 16;
  for (int i = 1; i < 16; ++i) right &= bytes[i] == 0;
  if (!right) __builtin_trap();  // as the hardware: an invalid palette, or sizes that the kernel does not mean
  state = {};
  state.configured = true;
}
inline void release() { state.configured = false; }

inline void check() {
  if (!state.configured) __builtin_trap();  // undefined instruction
}
inline void zero(int tile) {
  check();
  __builtin_memset(state.word[tile], 0, sizeof state.word[tile]);
}
inline void load(int tile, const void* from, std::int64_t stride) {
  check();
  for (int i = 0; i < 16; ++i) __builtin_memcpy(state.word[tile][i], static_cast<const char*>(from) + i * stride, 64);
}
inline void store(int tile, void* to, std::int64_t stride) {
  check();
  for (int i = 0; i < 16; ++i) __builtin_memcpy(static_cast<char*>(to) + i * stride, state.word[tile][i], 64);
}
// The products of the lower and of the upper halves are added up apart, over the tile. Denormals are taken for zero by
// the hardware, not here.
inline void multiply_bf16(int c, int a, int b) {
  check();
  const auto half = [](float word, int index) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &word, sizeof bits);
    bits = index == 0 ? bits << 16 : bits & 0xffff0000u;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sums[2] = {};
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 2; ++i) sums[i] += half(state.word[a][m][k], i) * half(state.word[b][k][n], i);
      }
      state.word[c][m][n] += sums[0] + sums[1];
    }
  }
}

}  // namespace pissa::test::tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig ::pissa::test::tiles::load_config
#define _tile_release ::pissa::test::tiles::release
#define _tile_zero ::pissa::test::tiles::zero
#define _tile_loadd ::pissa::test::tiles::load
#define _tile_stored ::pissa::test::tiles::store
#define _tile_dpbf16ps ::pissa::test::tiles::multiply_bf16
