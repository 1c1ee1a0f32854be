// Shared by the benchmarks: a target (the CPU or a GPU) with its matrices and its clock, and the main function.
//
// A target has
//   Backend backend()           on a fixed number of threads, or on a stream
//   Dense, Quantized            random matrices; view(copy), copy < kCopies: equal ones at different addresses
//   run(state, f)               measures f(copy); returns the mean time of a call in seconds
//   report_flops, report_bytes  as rates, and as fractions of what the machine can do at most, measured
#pragma once

#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "peak.h"
#include "pissa/core/quantized.h"
#include "pissa/core/types.h"
#include "pissa/cpu/backend.h"
#include "pissa/cpu/isa.h"
#include "pissa/cpu/kernels.h"

namespace pissa::bench {

/// Threads of every benchmark on the CPU; pin them with taskset to compare runs.
inline constexpr std::int64_t kThreads = 2;

inline cpu::CpuBackend cpu_backend() {
  static const cpu::ThreadExecutor executor(kThreads);
  return {executor, cpu::kernels()};
}

/// A dense matrix with entries N(0, 1 / cols), in f32 or bf16.
class RandomMatrix {
 public:
  RandomMatrix(std::int64_t rows, std::int64_t cols, Format format = Format::f32)
      : view_{nullptr, rows, cols, cols, format} {
    std::mt19937 generator(static_cast<std::uint32_t>(rows * 31 + cols));
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(cols)));
    bytes_.resize(static_cast<std::size_t>(rows * cols * element_size(format)));
    for (std::int64_t i = 0; i < rows * cols; ++i) {
      const float value = normal(generator);
      cpu::kernels().encode(&value, 1, format, bytes_.data() + i * element_size(format));
    }
    view_.data = bytes_.data();
  }
  MutableMatrix view(int = 0) const { return view_; }
  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
  MutableMatrix view_;
};

/// The same quantised to NF4, plain scales, blocks of 64.
class QuantizedMatrix {
 public:
  QuantizedMatrix(std::int64_t rows, std::int64_t cols)
      : codes_(code_bytes(Format::nf4, rows * cols)), absmax_(ceil_div(rows * cols, 64)) {
    const RandomMatrix dense(rows, cols, Format::bf16);
    cpu_backend().gemm_quantized({}, dense.view(), {Format::nf4, 64, codes_.data(), absmax_.data()});
    view_ = {codes_.data(), rows, cols, cols, Format::nf4};
    view_.scales.blocksize = 64;
    view_.scales.absmax = absmax_.data();
  }
  Matrix view(int = 0) const { return view_; }
  const std::vector<std::uint8_t>& codes() const { return codes_; }
  const std::vector<float>& absmax() const { return absmax_; }

 private:
  std::vector<std::uint8_t> codes_;
  std::vector<float> absmax_;
  Matrix view_;
};

/// Counts a rate, in 1e9 a second, and the fraction of a peak, if one is known. Both are plain numbers: Google
/// Benchmark would print "/s" after a rate that it computes itself.
inline void report_rate(benchmark::State& state, const char* unit, double amount, double time, double peak) {
  const double rate = 1e-9 * amount / time;
  state.counters[unit] = rate;
  if (peak != 0) state.counters["of_peak"] = rate / peak;
}

struct Cpu {
  using Dense = RandomMatrix;
  using Quantized = QuantizedMatrix;
  static constexpr int kCopies = 1;

  static cpu::CpuBackend backend() { return cpu_backend(); }
  static benchmark::internal::Benchmark* timed(benchmark::internal::Benchmark* benchmark) {
    return benchmark->UseRealTime();
  }
  template <class F>
  static double run(benchmark::State& state, F f) {
    const double time = seconds([&] {
      for (auto _ : state) {
        f(0);
        benchmark::ClobberMemory();
      }
    });
    return time / static_cast<double>(state.iterations());
  }
  /// The peak is that of the instructions that the kernels use.
  static void report_flops(benchmark::State& state, double flops, double time, bool bf16) {
    static const std::string isa = cpu::kernels().isa;
    static const double peak[] = {peak_gflops(isa, false, kThreads), peak_gflops(isa, true, kThreads)};
    report_rate(state, "GF/s", flops, time, peak[bf16]);
  }
  /// `bytes` are those that have to be read and written once; the peak is the speed of reading.
  static void report_bytes(benchmark::State& state, double bytes, double time) {
    static const double peak = peak_gbytes(kThreads);
    report_rate(state, "GB/s", bytes, time, peak);
  }
};

/// The main function: it takes `--backend=cpu` or `--backend=cuda` and Google Benchmark's own options. `on_cuda` is
/// null in a build without CUDA.
inline int bench_main(int argc, char** argv, void (*on_cpu)(), void (*on_cuda)()) {
  constexpr std::string_view kOption = "--backend=";
  std::string_view backend = "cpu";
  std::vector<char*> others;
  for (int i = 0; i < argc; ++i) {
    if (std::string_view(argv[i]).starts_with(kOption)) backend = std::string_view(argv[i]).substr(kOption.size());
    else others.push_back(argv[i]);
  }
  if (backend != "cpu" && backend != "cuda") {
    std::fprintf(stderr, "--backend: got %.*s; allowed: cpu, cuda\n", static_cast<int>(backend.size()), backend.data());
    return 2;
  }
  if (backend == "cuda" && on_cuda == nullptr) {
    std::fputs("--backend=cuda: this build has no CUDA backend; configure with -DPISSA_CUDA=ON\n", stderr);
    return 2;
  }
  (backend == "cuda" ? on_cuda : on_cpu)();
  int count = static_cast<int>(others.size());
  others.push_back(nullptr);
  benchmark::Initialize(&count, others.data());
  if (benchmark::ReportUnrecognizedArguments(count, others.data())) return 2;
  try {
    benchmark::RunSpecifiedBenchmarks();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  benchmark::Shutdown();
  return 0;
}

}  // namespace pissa::bench

#if defined(PISSA_BENCH_CUDA)
#include "cuda_target.h"
#define PISSA_BENCH_MAIN(register_on)                                                                             \
  int main(int argc, char** argv) {                                                                               \
    return pissa::bench::bench_main(argc, argv, register_on<pissa::bench::Cpu>, register_on<pissa::bench::Cuda>); \
  }
#else
#define PISSA_BENCH_MAIN(register_on)                                                     \
  int main(int argc, char** argv) {                                                       \
    return pissa::bench::bench_main(argc, argv, register_on<pissa::bench::Cpu>, nullptr); \
  }
#endif
