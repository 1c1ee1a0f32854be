// Speed of the randomised SVD of a bf16 weight [4096, 4096]: rank, passes, method.
#include "bench.h"
#include "pissa/rsvd.h"

namespace pissa::bench {
namespace {

void svd(benchmark::State& state, SvdMethod method) {
  static const RandomMatrix weight(4096, 4096, Codec::bf16);
  const SvdOptions options{method, state.range(1), 0};
  auto cpu = backend();
  for (auto _ : state) benchmark::DoNotOptimize(svd_lowrank(cpu, weight.view(), state.range(0), options));
  const std::int64_t steps = method == SvdMethod::krylov ? options.passes / 2 : 1;
  const double block = static_cast<double>(block_size(state.range(0), steps));
  report_flops(state, 2.0 * 4096 * 4096 * block * static_cast<double>(options.passes), true);  // of the passes alone
}

void sizes(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"r", "passes"})->ArgsProduct({{16, 128}, {8, 12}});
  benchmark->UseRealTime()->Unit(benchmark::kMillisecond);
}

BENCHMARK_CAPTURE(svd, krylov, SvdMethod::krylov)->Apply(sizes);
BENCHMARK_CAPTURE(svd, subspace, SvdMethod::subspace)->Apply(sizes);

}  // namespace
}  // namespace pissa::bench
