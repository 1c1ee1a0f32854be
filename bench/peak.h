// What the machine can do at most, measured: multiply-adds without memory, and reading memory. A benchmark's rate is
// reported as a fraction of it.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cpu/executor.h"

namespace pissa::bench {

template <class F>
double seconds(F f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Ten independent chains of one instruction, so that neither its latency nor anything else limits it.
#define PISSA_TEN(op, reg)                                                                                            \
  op " %%" reg "15, %%" reg "14, %%" reg "0\n" op " %%" reg "15, %%" reg "14, %%" reg "1\n" op " %%" reg "15, %%" reg \
     "14, %%" reg "2\n" op " %%" reg "15, %%" reg "14, %%" reg "3\n" op " %%" reg "15, %%" reg "14, %%" reg "4\n" op  \
     " %%" reg "15, %%" reg "14, %%" reg "5\n" op " %%" reg "15, %%" reg "14, %%" reg "6\n" op " %%" reg "15, %%" reg \
     "14, %%" reg "7\n" op " %%" reg "15, %%" reg "14, %%" reg "8\n" op " %%" reg "15, %%" reg "14, %%" reg "9\n"
#define PISSA_CHAINS(op, reg)                                                                                   \
  asm volatile("1:\n" PISSA_TEN(op, reg) "dec %0\n jnz 1b\n"                                                    \
               : "+r"(rounds)                                                                                   \
               :                                                                                                \
               : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm14", \
                 "xmm15")

/// GF/s of `threads` threads in the instructions that the kernels of this instruction set multiply with; 0 if unknown.
inline double peak_gflops(const std::string& isa, bool bf16, std::int64_t threads) {
#if defined(__x86_64__)
  constexpr std::int64_t kRounds = 20'000'000;
  const bool pairs = bf16 && isa == "avx512bf16";
  const int width = isa.starts_with("avx512") ? 16 : isa == "avx2" ? 8 : 0;
  if (width == 0) return 0;
  const auto chains = [&] {
    std::int64_t rounds = kRounds;
    if (pairs) PISSA_CHAINS("vdpbf16ps", "zmm");
    else if (width == 16) PISSA_CHAINS("vfmadd231ps", "zmm");
    else PISSA_CHAINS("vfmadd231ps", "ymm");
  };
  const double time = seconds([&] {
    std::vector<std::jthread> all;
    for (std::int64_t i = 0; i < threads; ++i) all.emplace_back(chains);
  });
  return 1e-9 * static_cast<double>(threads) * 10 * kRounds * width * (pairs ? 4 : 2) / time;
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
