// One vector of f32, Vec, for the instruction set for which kernels.cc is compiled. kernels.cc is compiled once per
// instruction set; PISSA_ISA names the namespace, so that no two builds of a function share a symbol. For the same
// reason, everything here is inlined by force.
//
// Another instruction set needs a file with a Vec, and a branch below:
// - Reg: kWidth f32 lanes, kRegisters of them; Reg64: half as many f64. kRows x (2 * kWidth) is the GEMM's register
//   tile, chosen to fill the register file: AVX-512 14 x 32 (28 of 32 registers accumulate), AVX2 6 x 16 (12 of 16),
//   NEON 12 x 8 (24 of 32), portable 4 x 8.
// - kByLane: whether a multiply-add takes one factor from a lane of a register. If so, fma_lane<lane>(a, b, c) is
//   a[lane] * b + c, and kRows is a multiple of kWidth. Otherwise a factor in memory is broadcast when it is loaded.
// - zero, broadcast, load, store, add, mul, fma (a * b + c), abs, reduce_add; max_bits, reduce_max_bits: the largest as
//   an unsigned integer; of absolute values, NaN is the largest
// - zero64, load64 (from f32), fma64, store64
// - load_f16, store_f16 (to nearest, ties to even); load_half: one f16, at any address; load_i8: kWidth signed bytes;
// load_f8: E4M3 / 256, not NaN
// - store_five_bits and store_six_bits, if they are faster than loops: 32 codes of five bits, less a bias, of 16 bytes
//   of nibbles and a fifth bit for each; the eight scales of a block of GGUF (GgufSixBits), then its eight minima
// - gather: map[index] for kWidth indices of a byte
// - store_codes: the NF4 codes of kWidth values, two a byte; each is the number of thresholds below its value
// - table<blocks>: 16 levels times each of the scales of that many blocks, at most kMostBlocks; table_from: 16 levels
//   times one scale plus a minimum, where the product is exact; decode_split: the
//   elements of kWidth bytes in these blocks, of one size, those in the high nibbles and those in the low ones;
//   interleave: the two as a0 b0 a1 b1 ...
// - kLoadsLanes: whether it has load_lanes, 16 bytes of kWidth rows as four registers of 32-bit words, a lane for each
//   row; shift_right of such words; and look_up, the table's level for the low four bits of each lane
// - transpose: of kWidth x kWidth
// A set that multiplies pairs of bf16 also needs Pairs (see product.h), in its own file; PISSA_HAS_BF16 declares it.
// A set that multiplies four bytes a word also needs Quads (see product.h); PISSA_HAS_BYTES declares it.
// One that multiplies matrices of them (AMX, BFMMLA) also needs Tiles; PISSA_HAS_TILES declares it:
// - kRows of a tile of the output; kDepth, of which a product's words are a multiple
// - arrange: words of strips of that width, from the order of micro_kernel.h to that of multiply, in place
// - multiply: c = or += a b, for at least the given number of rows
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

// Not beside tiles, because those of bf16 are about as fast.
#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define PISSA_HAS_BYTES 1
#include "pissa/cpu/vec/quads_x86.h"
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define PISSA_HAS_BYTES 1
#include "pissa/cpu/vec/quads_neon.h"
#else
#define PISSA_HAS_BYTES 0
#endif

#if defined(__AMX_BF16__)
#define PISSA_HAS_TILES 1
#include "pissa/cpu/vec/amxbf16.h"
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define PISSA_HAS_TILES 1
#include "pissa/cpu/vec/bfmmla.h"
#else
#define PISSA_HAS_TILES 0
#endif
