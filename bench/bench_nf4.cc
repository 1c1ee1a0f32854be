// Speed of NF4 quantisation and dequantisation of a bf16 weight [4096, 4096].
#include "bench.h"

namespace pissa::bench {
namespace {

constexpr std::int64_t kRows = 4096;
constexpr std::int64_t kCols = 4096;

void report_weights(benchmark::State& state) {
  state.counters["weights/s"] =
      benchmark::Counter(static_cast<double>(kRows * kCols), benchmark::Counter::kIsIterationInvariantRate);
}

void nf4_quantize(benchmark::State& state) {
  const RandomMatrix dense(kRows, kCols, Codec::bf16);
  std::vector<std::uint8_t> codes(nf4_bytes(kRows * kCols));
  std::vector<float> absmax(kRows * kCols / 64);
  for (auto _ : state) {
    backend().gemm_nf4({}, dense.view(), {64, codes.data(), absmax.data()});
    benchmark::ClobberMemory();
  }
  report_weights(state);
}

void nf4_dequantize(benchmark::State& state) {
  const QuantizedMatrix quantized(kRows, kCols);
  const RandomMatrix dense(kRows, kCols, Codec::bf16);
  for (auto _ : state) {
    backend().copy(quantized.view(), dense.view());
    benchmark::ClobberMemory();
  }
  report_weights(state);
}

BENCHMARK(nf4_quantize)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(nf4_dequantize)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace pissa::bench
