// Speed of NF4 quantisation and dequantisation of a bf16 weight [4096, 4096].
#include "bench.h"

namespace pissa::bench {
namespace {

constexpr std::int64_t kRows = 4096;
constexpr std::int64_t kCols = 4096;

// bf16 on one side, codes and scales on the other
constexpr double kBytes = kRows * kCols * (2 + 0.5 + 4.0 / 64);

void nf4_quantize(benchmark::State& state) {
  const RandomMatrix dense(kRows, kCols, Codec::bf16);
  std::vector<std::uint8_t> codes(nf4_bytes(kRows * kCols));
  std::vector<float> absmax(kRows * kCols / 64);
  for (auto _ : state) {
    backend().gemm_nf4({}, dense.view(), {64, codes.data(), absmax.data()});
    benchmark::ClobberMemory();
  }
  report_bytes(state, kBytes);
}

void nf4_dequantize(benchmark::State& state) {
  const QuantizedMatrix quantized(kRows, kCols);
  const RandomMatrix dense(kRows, kCols, Codec::bf16);
  for (auto _ : state) {
    backend().copy(quantized.view(), dense.view());
    benchmark::ClobberMemory();
  }
  report_bytes(state, kBytes);
}

BENCHMARK(nf4_quantize)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(nf4_dequantize)->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace pissa::bench
