// What the machine can do at most, measured: multiply-adds without memory, and reading memory. A benchmark's rate is
// reported as a fraction of it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "pissa/cpu/executor.h"

namespace pissa::bench {

template <class F>
double seconds(F f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// `rounds` rounds of one multiply-add for every register in `sums`, a list of numbers. `x` and `y` are the registers of
// the factors, set to `factor`: an ordinary number, for zeros may take less power and denormals more time.
#define PISSA_MULTIPLY_ADDS(op, reg, x, y, sums)                                                                      \
  asm volatile("vbroadcastss %1, %%" reg x "\n vbroadcastss %1, %%" reg y "\n1:\n.irp sum, " sums "\n" op " %%" reg x \
               ", %%" reg y ", %%" reg "\\sum\n.endr\n dec %0\n jnz 1b\n"                                             \
               : "+r"(rounds)                                                                                         \
               : "m"(factor)                                                                                          \
               : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",       \
                 "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")  // the others are not known to the compiler here
// Each sum waits for itself only, so that p pipes are full with p * latency of them, and a few more where the pipes are
// not dealt out evenly. bf16 products take 6 cycles on Zen 4, f32 4; two pipes of 512 bits, as on Zen 5, need more than
// 12 sums. These are all registers but the factors'.
#define PISSA_SUMS_16 "0,1,2,3,4,5,6,7,8,9,10,11,12,13"
#define PISSA_SUMS_32 PISSA_SUMS_16 ",14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29"

// `rounds` rounds of one product of 16 x 32 by 32 x 16 bf16 for each of the tile registers but the factors'. Their sums
// are ready after 52 cycles, and a product begins every 16.
constexpr int kTileSums = 6;
inline void multiply_tiles(std::int64_t rounds, float factor) {
  alignas(64) std::uint8_t config[64] = {1};                                 // palette 1
  for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;  // bytes of a row; rows
  float tile[256];
  std::fill_n(tile, 256, factor);
  asm volatile(
      "ldtilecfg %1\n.irp sum, 0,1,2,3,4,5\n tilezero %%tmm\\sum\n.endr\n"
      "tileloadd (%3,%4), %%tmm6\n tileloadd (%3,%4), %%tmm7\n"
      "1:\n.irp sum, 0,1,2,3,4,5\n tdpbf16ps %%tmm7, %%tmm6, %%tmm\\sum\n.endr\n dec %0\n jnz 1b\n tilerelease"
      : "+r"(rounds)
      : "m"(config), "m"(tile), "r"(tile), "r"(std::int64_t{64})
      : "cc");
}

/// GF/s of `threads` threads in the instructions that the kernels of this instruction set multiply with; 0 if unknown.
inline double peak_gflops(const std::string& isa, bool bf16, std::int64_t threads) {
#if defined(__x86_64__)
  constexpr std::int64_t kRounds = 2'000'000;
  const bool pairs = bf16 && isa == "avx512bf16", tiles = bf16 && isa == "amxbf16";
  const int width = isa.starts_with("avx512") || isa == "amxbf16" ? 16 : isa.starts_with("avx") ? 8 : 0;
  if (width == 0) return 0;
  const int sums = width == 16 ? 30 : 14;
  const std::int64_t flops = tiles ? kTileSums * 16 * 32 * 16 * 2 : sums * width * (pairs ? 4 : 2);  // of a round
  const auto multiply_add = [&] {
    std::int64_t rounds = kRounds;
    const float factor = 0.5f;  // as a pair of bf16: 0 and 0.5
    if (tiles) multiply_tiles(rounds, factor);
    else if (pairs) PISSA_MULTIPLY_ADDS("vdpbf16ps", "zmm", "30", "31", PISSA_SUMS_32);
    else if (width == 16) PISSA_MULTIPLY_ADDS("vfmadd231ps", "zmm", "30", "31", PISSA_SUMS_32);
    else PISSA_MULTIPLY_ADDS("vfmadd231ps", "ymm", "14", "15", PISSA_SUMS_16);
  };
  double best = 0;  // of a few: the first may find a clock that has yet to rise
  for (int repeat = 0; repeat < 10; ++repeat) {
    const double time = seconds([&] {
      std::vector<std::jthread> all;
      for (std::int64_t i = 0; i < threads; ++i) all.emplace_back(multiply_add);
    });
    best = std::max(best, 1e-9 * static_cast<double>(threads * kRounds * flops) / time);
  }
  return best;
#else
  return 0;
#endif
}

/// GB/s at which `threads` threads read memory, 512 MB of it, which no cache holds.
inline double peak_gbytes(std::int64_t threads) {
  std::vector<std::uint64_t> memory(std::size_t{1} << 26, 1);
  const cpu::ThreadExecutor executor(threads);
  std::vector<std::uint64_t> sums(threads);
  double best = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const double time = seconds([&] {
      executor.parallel_for(threads, [&](std::int64_t thread) {
        const std::size_t each = memory.size() / threads;
        std::uint64_t sum = 0;
        for (std::size_t i = each * thread; i < each * (thread + 1); ++i) sum += memory[i];
        sums[thread] = sum;
      });
    });
    best = std::max(best, 1e-9 * static_cast<double>(memory.size() * sizeof(memory[0])) / time);
  }
  return best;
}

}  // namespace pissa::bench
