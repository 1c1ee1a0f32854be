// Speed of the fused linear layer, forward and forward + backward: weight [4096, 4096] in NF4, with activations in
// bf16, the same in integers (Precision::int8), or all in f32; rank 64.
#include "bench.h"
#include "pissa/core/fused_linear.h"

namespace pissa::bench {
namespace {

constexpr std::int64_t kOut = 4096;
constexpr std::int64_t kIn = 4096;
constexpr std::int64_t kRank = 64;

// Never freed: on a GPU the driver ends before static objects do.
template <class M>
const M& weight() {
  static const M& matrix = *new M(kOut, kIn);
  return matrix;
}

template <class Target>
void linear(benchmark::State& state, bool nf4, bool with_backward, bool int8) {
  using Dense = typename Target::Dense;
  const std::int64_t tokens = state.range(0);
  const Format format = nf4 ? Format::bf16 : Format::f32;
  const Dense x(tokens, kIn, format);
  const Dense y(tokens, kOut, format);
  const Dense dx(tokens, kIn, format);
  const Dense xa(tokens, kRank);
  const Dense a(kRank, kIn);
  const Dense b(kOut, kRank);
  const Dense grad_a(kRank, kIn);
  const Dense grad_b(kOut, kRank);
  auto backend = Target::backend();
  const auto weight_of = [nf4](int copy) {
    return nf4 ? weight<typename Target::Quantized>().view(copy) : Matrix(weight<Dense>().view(copy));
  };
  weight_of(0);  // made now
  const double time = Target::run(state, [&](int copy) {
    const Matrix w = weight_of(copy);
    Adapter adapter;
    adapter.a = a.view(copy);
    adapter.b = b.view(copy);
    linear_forward(backend, x.view(copy), w, {}, adapter, y.view(copy), xa.view(copy), {}, int8);
    if (with_backward) {
      linear_backward(backend, y.view(copy), x.view(copy), w, adapter, xa.view(copy), dx.view(copy), grad_a.view(copy),
                      grad_b.view(copy), {}, int8);
    }
  });
  const double weight_flops = 2.0 * tokens * kOut * kIn;
  const double adapter_flops = 2.0 * tokens * kRank * (kOut + kIn);
  Target::report_flops(state, with_backward ? 2 * weight_flops + 3 * adapter_flops : weight_flops + adapter_flops, time,
                       nf4);
}

template <class Target>
void register_all() {
  const auto add = [](const char* name, bool nf4, bool with_backward, const std::vector<std::int64_t>& tokens,
                      bool int8 = false) {
    auto* benchmark = Target::timed(benchmark::RegisterBenchmark(name, linear<Target>, nf4, with_backward, int8));
    for (const std::int64_t count : tokens) benchmark->Arg(count);
  };
  add("linear/nf4_forward", true, false, {1, 4, 16, 128, 512, 2048});
  add("linear/nf4_forward_backward", true, true, {16, 128, 512});
  add("linear/nf4_forward_int8", true, false, {64, 128, 512}, true);
  add("linear/nf4_forward_backward_int8", true, true, {64, 128, 512}, true);
  add("linear/f32_forward", false, false, {1, 16, 128, 512});
  add("linear/f32_forward_backward", false, true, {16, 128, 512});
}

}  // namespace
}  // namespace pissa::bench

PISSA_BENCH_MAIN(pissa::bench::register_all)
