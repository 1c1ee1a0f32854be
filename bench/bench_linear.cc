// Speed of the fused linear layer, forward and forward + backward: weight [4096, 4096] in NF4, with activations in
// bf16, or all in f32; rank 64.
#include "bench.h"
#include "pissa/fused_linear.h"

namespace pissa::bench {
namespace {

constexpr std::int64_t kOut = 4096;
constexpr std::int64_t kIn = 4096;
constexpr std::int64_t kRank = 64;

Matrix weight(bool nf4) {
  static const QuantizedMatrix quantized(kOut, kIn);
  static const RandomMatrix dense(kOut, kIn);
  return nf4 ? quantized.view() : Matrix(dense.view());
}

void linear(benchmark::State& state, bool nf4, bool with_backward) {
  const std::int64_t tokens = state.range(0);
  const Codec codec = nf4 ? Codec::bf16 : Codec::f32;
  const RandomMatrix x(tokens, kIn, codec);
  const RandomMatrix y(tokens, kOut, codec);
  const RandomMatrix dx(tokens, kIn, codec);
  const RandomMatrix xa(tokens, kRank);
  const RandomMatrix a(kRank, kIn);
  const RandomMatrix b(kOut, kRank);
  const RandomMatrix grad_a(kRank, kIn);
  const RandomMatrix grad_b(kOut, kRank);
  Adapter adapter;
  adapter.delta_a = a.view();
  adapter.delta_b = b.view();
  const Matrix w = weight(nf4);
  auto cpu = backend();
  for (auto _ : state) {
    linear_forward(cpu, x.view(), w, {}, adapter, y.view(), xa.view());
    if (with_backward) {
      linear_backward(cpu, y.view(), x.view(), w, adapter, xa.view(), dx.view(), grad_a.view(), grad_b.view());
    }
    benchmark::ClobberMemory();
  }
  const double weight_flops = 2.0 * tokens * kOut * kIn;
  const double adapter_flops = 2.0 * tokens * kRank * (kOut + kIn);
  report_flops(state, with_backward ? 2 * weight_flops + 3 * adapter_flops : weight_flops + adapter_flops, nf4);
}

BENCHMARK_CAPTURE(linear, nf4_forward, true, false)
    ->Arg(1)
    ->Arg(4)
    ->Arg(16)
    ->Arg(128)
    ->Arg(512)
    ->Arg(2048)
    ->UseRealTime();
BENCHMARK_CAPTURE(linear, nf4_forward_backward, true, true)->Arg(16)->Arg(128)->Arg(512)->UseRealTime();
BENCHMARK_CAPTURE(linear, f32_forward, false, false)->Arg(1)->Arg(16)->Arg(128)->Arg(512)->UseRealTime();
BENCHMARK_CAPTURE(linear, f32_forward_backward, false, true)->Arg(16)->Arg(128)->Arg(512)->UseRealTime();

}  // namespace
}  // namespace pissa::bench
