// One vector of f32, Vec, for the instruction set that kernels.cc is compiled for. kernels.cc is compiled once per
// instruction set; PISSA_ISA names the namespace, so that no two builds of a function share a symbol. Everything here
// is inlined by force, for the same reason.
//
// A further instruction set brings a file with a Vec, and a branch below:
// - Reg, kWidth f32 lanes, kRegisters of them; Reg64, half as many f64. kRows x (2 * kWidth) is the register tile of
// the
//   GEMM, chosen to fill the register file: AVX-512 14 x 32 (28 of 32 registers accumulate), AVX2 6 x 16 (12 of 16),
//   NEON 12 x 8 (24 of 32), portable 4 x 8.
// - kByLane, whether a multiply-add takes one factor from a lane of a register: then fma_lane<lane>(a, b, c), which is
//   a[lane] * b + c, and kRows is a multiple of kWidth. Otherwise a factor in memory is broadcast as it is loaded.
// - zero, broadcast, load, store, add, mul, fma (a * b + c), abs, reduce_add; max_bits, reduce_max_bits, the largest as
//   an unsigned integer: of absolute values, NaN is the largest
// - zero64, load64 (from f32), fma64, store64
// - load_f16, store_f16 (to nearest, ties to even); load_i8, kWidth signed bytes; load_f8, E4M3 / 256, not NaN
// - gather, map[index] for kWidth indices of a byte
// - store_codes, the NF4 codes of kWidth values, two a byte: each the number of thresholds below its value
// - table<blocks>, 16 levels times each of the scales of as many blocks, kMostBlocks at most; decode_split, the
// elements
//   of kWidth bytes in these blocks, of one size, those in the high nibbles and those in the low ones; interleave, the
//   two as a0 b0 a1 b1 ...
// - transpose, of kWidth x kWidth
// One that multiplies pairs of bf16 brings Pairs also (see product.h), in a file of its own; PISSA_HAS_BF16 says so.
// One that does so in tile registers brings Tiles beside it; PISSA_HAS_TILES says so.
#pragma once

#if defined(__AVX512F__)
#include "pissa/cpu/vec/avx512.h"
#elif defined(__AVX2__)
#include "pissa/cpu/vec/avx2.h"
#elif defined(__aarch64__)
#include "pissa/cpu/vec/neon.h"
#else
#include "pissa/cpu/vec/portable.h"
#endif

#if defined(__AVX512BF16__)
#define PISSA_HAS_BF16 1
#include "pissa/cpu/vec/avx512bf16.h"
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define PISSA_HAS_BF16 1
#include "pissa/cpu/vec/neonbf16.h"
#else
#define PISSA_HAS_BF16 0
#endif

#if defined(__AMX_BF16__)
#define PISSA_HAS_TILES 1
#include "pissa/cpu/vec/amxbf16.h"
#else
#define PISSA_HAS_TILES 0
#endif
