// What the benchmarks share: random matrices and a backend with a fixed number of threads.
#pragma once

#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "backend.h"
#include "isa.h"
#include "peak.h"
#include "pissa/nf4.h"
#include "pissa/types.h"

namespace pissa::bench {

/// Threads of every benchmark; pin them with taskset to compare runs.
inline constexpr std::int64_t kThreads = 2;

inline cpu::CpuBackend backend() {
  static const cpu::ThreadExecutor executor(kThreads);
  return {executor, cpu::kernels()};
}

/// A dense matrix with entries N(0, 1 / cols), in f32 or bf16.
class RandomMatrix {
 public:
  RandomMatrix(std::int64_t rows, std::int64_t cols, Codec codec = Codec::f32)
      : view_{nullptr, rows, cols, cols, codec} {
    std::mt19937 generator(static_cast<std::uint32_t>(rows * 31 + cols));
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(cols)));
    bytes_.resize(static_cast<std::size_t>(rows * cols * element_size(codec)));
    for (std::int64_t i = 0; i < rows * cols; ++i) {
      const float value = normal(generator);
      cpu::kernels().encode(&value, 1, codec, bytes_.data() + i * element_size(codec));
    }
    view_.data = bytes_.data();
  }
  MutableMatrix view() const { return view_; }

 private:
  std::vector<char> bytes_;
  MutableMatrix view_;
};

/// The same quantised to NF4, plain scales, blocks of 64.
class QuantizedMatrix {
 public:
  QuantizedMatrix(std::int64_t rows, std::int64_t cols)
      : codes_(nf4_bytes(rows * cols)), absmax_(ceil_div(rows * cols, 64)) {
    const RandomMatrix dense(rows, cols, Codec::bf16);
    backend().gemm_nf4({}, dense.view(), {64, codes_.data(), absmax_.data()});
    view_ = {codes_.data(), rows, cols, cols, Codec::nf4};
    view_.scales.blocksize = 64;
    view_.scales.absmax = absmax_.data();
  }
  Matrix view() const { return view_; }

 private:
  std::vector<std::uint8_t> codes_;
  std::vector<float> absmax_;
  Matrix view_;
};

/// Counters GF/s and the fraction of what the instructions used can do at most, measured once.
inline void report_flops(benchmark::State& state, double flops, bool bf16) {
  static const std::string isa = cpu::kernels().isa;
  static const double peak[] = {peak_gflops(isa, false, kThreads), peak_gflops(isa, true, kThreads)};
  state.counters["GF/s"] = benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  if (peak[bf16] == 0) return;
  state.counters["of_peak"] =
      benchmark::Counter(flops * 1e-9 / peak[bf16], benchmark::Counter::kIsIterationInvariantRate);
}

/// Counters GB/s, of the bytes that have to be read and written once, and the fraction of the reading speed measured.
inline void report_bytes(benchmark::State& state, double bytes) {
  static const double peak = peak_gbytes(kThreads);
  state.counters["GB/s"] = benchmark::Counter(bytes * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["of_peak"] = benchmark::Counter(bytes * 1e-9 / peak, benchmark::Counter::kIsIterationInvariantRate);
}

}  // namespace pissa::bench
