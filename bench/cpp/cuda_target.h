// The benchmarks' target on a GPU: matrices in its memory, time by its events. Included by bench.h.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <tuple>
#include <vector>

#include "pissa/cuda/backend.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/gemm.h"

namespace pissa::bench {

/// Copies of each matrix. Calls take turns with them, so that no cache holds the 4-bit weights, 8 MB each.
inline constexpr int kCudaCopies = 8;

/// The context of all benchmarks. Its pool of memory keeps what is freed, as torch's does.
inline const cuda::Context& cuda_context() {
  static const cuda::Context& context = [&]() -> const cuda::Context& {
    const cuda::Context& made = cuda::standalone_context();
    cudaMemPool_t pool = nullptr;
    std::uint64_t all = std::numeric_limits<std::uint64_t>::max();
    cuda::check(cudaDeviceGetDefaultMemPool(&pool, made.device), made, "cudaDeviceGetDefaultMemPool");
    cuda::check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all), made, "cudaMemPoolSetAttribute");
    return made;
  }();
  return context;
}

inline void wait() {
  cuda::check(cudaStreamSynchronize(cuda_context().stream), cuda_context(), "cudaStreamSynchronize");
}

inline void upload(const void* from, void* to, std::size_t bytes) {
  cuda::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, cuda_context().stream), cuda_context(),
              "cudaMemcpyAsync", "bytes", bytes);
  wait();
}

/// Equal matrices are made once: drawing the numbers takes longer than measuring.
template <class M, class... Arguments>
const M& made_once(const Arguments&... arguments) {
  static auto& made = *new std::map<std::tuple<Arguments...>, M>;
  return made.try_emplace(std::tuple(arguments...), arguments...).first->second;
}

class CudaMatrix {
 public:
  CudaMatrix(std::int64_t rows, std::int64_t cols, Format format = Format::f32) {
    const auto& host = made_once<RandomMatrix>(rows, cols, format);
    for (int i = 0; i < kCudaCopies; ++i) {
      copies_.emplace_back(cuda_context(), rows, cols, format);
      upload(host.bytes().data(), copies_.back().view().data, host.bytes().size());
    }
  }
  MutableMatrix view(int copy = 0) const { return copies_[static_cast<std::size_t>(copy)].view(); }

 private:
  std::deque<cuda::Buffer> copies_;
};

class CudaQuantizedMatrix {
 public:
  CudaQuantizedMatrix(std::int64_t rows, std::int64_t cols) : host_(made_once<QuantizedMatrix>(rows, cols)) {
    for (int i = 0; i < kCudaCopies; ++i) {
      codes_.emplace_back(cuda_context(), static_cast<std::int64_t>(host_.codes().size()));
      upload(host_.codes().data(), codes_.back().data(), host_.codes().size());
      absmax_.emplace_back(cuda_context(), static_cast<std::int64_t>(host_.absmax().size()));
      upload(host_.absmax().data(), absmax_.back().data(), host_.absmax().size() * sizeof(float));
    }
  }
  Matrix view(int copy = 0) const {
    Matrix result = host_.view();
    result.data = codes_[static_cast<std::size_t>(copy)].data();
    result.scales.absmax = absmax_[static_cast<std::size_t>(copy)].data();
    return result;
  }

 private:
  const QuantizedMatrix& host_;
  std::deque<cuda::Array<std::uint8_t>> codes_;
  std::deque<cuda::Array<float>> absmax_;
};

/// Seconds between two points of the stream.
class CudaTimer {
 public:
  CudaTimer() {
    cuda::check(cudaEventCreate(&start_), cuda_context(), "cudaEventCreate");
    cuda::check(cudaEventCreate(&end_), cuda_context(), "cudaEventCreate");
  }
  CudaTimer(const CudaTimer&) = delete;
  CudaTimer& operator=(const CudaTimer&) = delete;
  ~CudaTimer() {
    cudaEventDestroy(start_);
    cudaEventDestroy(end_);
  }
  template <class F>
  double operator()(F f) const {
    const cuda::Context& context = cuda_context();
    cuda::check(cudaEventRecord(start_, context.stream), context, "cudaEventRecord");
    f();
    cuda::check(cudaEventRecord(end_, context.stream), context, "cudaEventRecord");
    cuda::check(cudaEventSynchronize(end_), context, "cudaEventSynchronize");
    float milliseconds = 0;
    cuda::check(cudaEventElapsedTime(&milliseconds, start_, end_), context, "cudaEventElapsedTime");
    return 1e-3 * static_cast<double>(milliseconds);
  }

 private:
  cudaEvent_t start_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

/// The shortest of a few times; the first call does not count.
template <class F>
double best_seconds(F f) {
  const CudaTimer timer;
  timer(f);
  double best = timer(f);
  for (int i = 0; i < 4; ++i) best = std::min(best, timer(f));
  return best;
}

/// GF/s of a square product by cuBLAS.
inline double cuda_peak_gflops(std::int64_t side, Format format) {
  const cuda::Context& context = cuda_context();
  const cuda::Buffer a(context, side, side, format), b(context, side, side, format), out(context, side, side, format);
  const RandomMatrix some(64, side, format);
  for (const MutableMatrix& matrix : {a.view(), b.view()}) {
    for (std::int64_t row = 0; row < side; row += 64) {
      const std::size_t bytes =
          std::min(some.bytes().size(), static_cast<std::size_t>((side - row) * side * element_size(format)));
      upload(some.bytes().data(), rows_of(matrix, row, std::min<std::int64_t>(64, side - row)).data, bytes);
    }
  }
  const double size = static_cast<double>(side);
  return 2e-9 * size * size * size /
         best_seconds([&] { cuda::matmul(context, {.a = a.view(), .b = b.view(), .out = out.view()}); });
}

/// GB/s, read and written together, of a copy within the GPU's memory.
inline double cuda_peak_gbytes(std::int64_t bytes) {
  const cuda::Context& context = cuda_context();
  const cuda::Array<char> from(context, bytes), to(context, bytes);
  return 2e-9 * static_cast<double>(bytes) / best_seconds([&] {
           cuda::check(cudaMemcpyAsync(to.data(), from.data(), static_cast<std::size_t>(bytes),
                                       cudaMemcpyDeviceToDevice, context.stream),
                       context, "cudaMemcpyAsync", "bytes", bytes);
         });
}

#if !defined(PISSA_BENCH_PEAK_SIDE)
#define PISSA_BENCH_PEAK_SIDE 8192
#endif

struct Cuda {
  using Dense = CudaMatrix;
  using Quantized = CudaQuantizedMatrix;
  static constexpr int kCopies = kCudaCopies;

  static cuda::CudaBackend backend() { return cuda::CudaBackend(cuda_context()); }
  static benchmark::internal::Benchmark* timed(benchmark::internal::Benchmark* benchmark) {
    return benchmark->UseManualTime();
  }
  template <class F>
  static double run(benchmark::State& state, F f) {
    const auto every = [&] {
      for (int copy = 0; copy < kCopies; ++copy) f(copy);
    };
    every();
    wait();
    const CudaTimer timer;
    double time = 0;
    while (state.KeepRunningBatch(kCopies)) {
      const double all = timer(every);
      state.SetIterationTime(all);
      time += all;
    }
    return time / static_cast<double>(state.iterations());
  }
  static void report_flops(benchmark::State& state, double flops, double time, bool bf16) {
    constexpr std::int64_t kSide = PISSA_BENCH_PEAK_SIDE;
    static const double peak[] = {cuda_peak_gflops(kSide / 2, Format::f32), cuda_peak_gflops(kSide, Format::bf16)};
    report_rate(state, "GF/s", flops, time, peak[bf16]);
  }
  static void report_bytes(benchmark::State& state, double bytes, double time) {
    constexpr std::int64_t kSide = PISSA_BENCH_PEAK_SIDE;
    static const double peak = cuda_peak_gbytes(kSide * kSide * 16);
    report_rate(state, "GB/s", bytes, time, peak);
  }
};

}  // namespace pissa::bench
