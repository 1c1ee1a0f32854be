// Speed of the randomised SVD of a bf16 weight [4096, 4096]: rank, passes, method.
#include "bench.h"
#include "pissa/core/rsvd.h"

namespace pissa::bench {
namespace {

template <class Target>
void svd(benchmark::State& state, SvdMethod method) {
  static const auto& weight =
      *new typename Target::Dense(4096, 4096, Format::bf16);  // never freed: the driver ends first
  const std::int64_t passes = state.range(1);
  const SvdOptions options{method, passes, 0};
  auto backend = Target::backend();
  const double time = Target::run(state, [&](int copy) {
    benchmark::DoNotOptimize(svd_lowrank(backend, weight.view(copy), state.range(0), options));
  });
  const std::int64_t steps = method == SvdMethod::krylov ? passes / 2 : 1;
  const double block = static_cast<double>(block_size(state.range(0), steps));
  // Of the passes.
  Target::report_flops(state, 2.0 * 4096 * 4096 * block * static_cast<double>(passes), time, true);
}

template <class Target>
void register_all() {
  for (const auto& [name, method] :
       {std::pair("svd/krylov", SvdMethod::krylov), {"svd/subspace", SvdMethod::subspace}}) {
    auto* benchmark = benchmark::RegisterBenchmark(name, svd<Target>, method);
    benchmark->ArgNames({"r", "passes"})->ArgsProduct({{16, 128}, {8, 12}});
    Target::timed(benchmark->Unit(benchmark::kMillisecond));
  }
}

}  // namespace
}  // namespace pissa::bench

PISSA_BENCH_MAIN(pissa::bench::register_all)
