// Speed of NF4 quantisation and dequantisation of a bf16 weight [4096, 4096].
#include "bench.h"

namespace pissa::bench {
namespace {

constexpr std::int64_t kRows = 4096;
constexpr std::int64_t kCols = 4096;

// bf16 on one side, codes and scales on the other
constexpr double kBytes = kRows * kCols * (2 + 0.5 + 4.0 / 64);

template <class Target>
void nf4_quantize(benchmark::State& state) {
  const typename Target::Dense dense(kRows, kCols, Format::bf16);
  const typename Target::Dense codes(1,
                                     ceil_div(code_bytes(Format::nf4, kRows * kCols), 4));  // memory of the right size
  const typename Target::Dense absmax(1, kRows * kCols / 64);
  auto backend = Target::backend();
  const double time = Target::run(state, [&](int copy) {
    backend.gemm_quantized({}, dense.view(copy),
                           {Format::nf4, 64, static_cast<std::uint8_t*>(codes.view(copy).data),
                            static_cast<float*>(absmax.view(copy).data)});
  });
  Target::report_bytes(state, kBytes, time);
}

template <class Target>
void nf4_dequantize(benchmark::State& state) {
  const typename Target::Quantized quantized(kRows, kCols);
  const typename Target::Dense dense(kRows, kCols, Format::bf16);
  auto backend = Target::backend();
  const double time = Target::run(state, [&](int copy) { backend.copy(quantized.view(copy), dense.view(copy)); });
  Target::report_bytes(state, kBytes, time);
}

template <class Target>
void register_all() {
  Target::timed(benchmark::RegisterBenchmark("nf4_quantize", nf4_quantize<Target>)->Unit(benchmark::kMillisecond));
  Target::timed(benchmark::RegisterBenchmark("nf4_dequantize", nf4_dequantize<Target>)->Unit(benchmark::kMillisecond));
}

}  // namespace
}  // namespace pissa::bench

PISSA_BENCH_MAIN(pissa::bench::register_all)
