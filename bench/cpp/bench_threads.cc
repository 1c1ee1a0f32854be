// Time of the fused linear layer and of attention on more threads than this machine has, simulated: one thread runs
// every task, each is timed, and the times are dealt to T threads as an executor deals tasks. A lower bound, for it
// knows neither a shared memory's bandwidth nor caches. `hybrid`: half of the threads at half speed.
#include <algorithm>
#include <chrono>
#include <limits>
#include <queue>

#include "bench.h"
#include "pissa/core/fused_linear.h"
#include "pissa/cpu/attention.h"

namespace pissa::bench {
namespace {

// In seconds.
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

class SimulatedThreads final : public cpu::Executor {
 public:
  SimulatedThreads(std::int64_t threads, bool hybrid) : threads_(threads), hybrid_(hybrid) {}
  std::int64_t threads() const override { return threads_; }
  bool uneven() const override { return hybrid_; }

  // The seconds of f(), whose tasks are the same each time. Each counts with its shortest of several times.
  template <class F>
  double seconds(F f) {
    constexpr int kRepetitions = 9;
    loops_.clear();
    double alone = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kRepetitions; ++i) {
      loop_ = 0;
      in_tasks_ = 0;
      const double start = now();
      f();
      alone = std::min(alone, now() - start - in_tasks_);
    }
    double sum = alone;
    for (const std::vector<double>& times : loops_) sum += dealt(times);
    return sum;
  }

 private:
  void run(std::int64_t count, const std::function<void(std::int64_t)>& task) const override {
    if (loop_ == loops_.size()) loops_.emplace_back(count, std::numeric_limits<double>::infinity());
    std::vector<double>& times = loops_[loop_++];
    for (std::int64_t i = 0; i < count; ++i) {
      const double start = now();
      task(i);
      const double time = now() - start;
      in_tasks_ += time;
      double& shortest = times[static_cast<std::size_t>(i)];
      shortest = std::min(shortest, time);
    }
  }

  // When the last of a loop's tasks ends, if each goes to the thread that is free first.
  double dealt(const std::vector<double>& times) const {
    using Thread = std::pair<double, double>;  // free at, seconds for one of a fast thread's
    std::priority_queue<Thread, std::vector<Thread>, std::greater<>> threads;
    for (std::int64_t i = 0; i < threads_; ++i) threads.emplace(0.0, hybrid_ && i >= threads_ / 2 ? 2.0 : 1.0);
    double last = 0;
    for (const double time : times) {
      const auto [free, slowness] = threads.top();
      threads.pop();
      last = std::max(last, free + time * slowness);
      threads.emplace(free + time * slowness, slowness);
    }
    return last;
  }

  std::int64_t threads_;
  bool hybrid_;
  mutable std::vector<std::vector<double>> loops_;
  mutable std::size_t loop_ = 0;
  mutable double in_tasks_ = 0;
};

void linear(benchmark::State& state, bool backward) {
  const std::int64_t out = state.range(0), in = state.range(1), tokens = state.range(2);
  constexpr std::int64_t kRank = 16;
  SimulatedThreads threads(state.range(3), state.range(4) != 0);
  const cpu::CpuBackend backend(threads, cpu::kernels());
  const QuantizedMatrix w(out, in);
  const RandomMatrix x(tokens, in, Format::bf16), y(tokens, out, Format::bf16), dx(tokens, in, Format::bf16);
  const RandomMatrix xa(tokens, kRank), a(kRank, in), b(out, kRank), grad_a(kRank, in), grad_b(out, kRank);
  Adapter adapter;
  adapter.a = a.view();
  adapter.b = b.view();
  const double time = threads.seconds([&] {
    if (backward) {
      linear_backward(backend, y.view(), x.view(), w.view(), adapter, xa.view(), dx.view(), grad_a.view(),
                      grad_b.view());
    } else {
      linear_forward(backend, x.view(), w.view(), {}, adapter, y.view(), xa.view());
    }
  });
  for (auto _ : state) state.SetIterationTime(time);
}

void attention(benchmark::State& state, bool backward) {
  const std::int64_t batch = state.range(0), heads = state.range(1), shared = state.range(2), length = state.range(3);
  const std::int64_t dim = state.range(4);
  SimulatedThreads threads(state.range(5), state.range(6) != 0);
  const auto random = [&](std::int64_t count) { return RandomMatrix(batch * count * length, dim, Format::bf16); };
  const auto view = [&](const RandomMatrix& all, std::int64_t count) {
    return Heads{all.view().data, batch, count, length, dim, count * length * dim, length * dim, dim, Format::bf16};
  };
  const RandomMatrix q = random(heads), k = random(shared), v = random(shared), out = random(heads);
  const RandomMatrix dq = random(heads), dk = random(shared), dv = random(shared);
  const RandomMatrix log_sums(batch * heads, length);
  const Attention problem{view(q, heads), view(k, shared), view(v, shared), 0.125f, true};
  auto* sums = static_cast<float*>(log_sums.view().data);
  const auto forward = [&] { cpu::attention_forward(threads, cpu::kernels(), problem, view(out, heads), sums); };
  forward();
  const double time = threads.seconds([&] {
    if (!backward) return forward();
    cpu::attention_backward(threads, cpu::kernels(), problem, view(out, heads), sums, view(out, heads), view(dq, heads),
                            view(dk, shared), view(dv, shared));
  });
  for (auto _ : state) state.SetIterationTime(time);
}

void register_all() {
  const auto add = [](const char* name, void (*run)(benchmark::State&, bool), bool backward,
                      const std::vector<std::string>& names, const std::vector<std::vector<std::int64_t>>& shapes) {
    auto* benchmark = benchmark::RegisterBenchmark(name, run, backward);
    benchmark->ArgNames(names)->UseManualTime()->Iterations(1)->Unit(benchmark::kMillisecond);
    for (std::vector<std::int64_t> shape : shapes) {
      for (const std::int64_t hybrid : {0, 1}) {
        for (const std::int64_t threads : {1, 2, 8, 16}) {
          if (hybrid && threads < 8) continue;
          std::vector<std::int64_t> arguments = shape;
          arguments.insert(arguments.end(), {threads, hybrid});
          benchmark->Args(arguments);
        }
      }
    }
  };
  for (const bool backward : {false, true}) {
    add(backward ? "linear/backward" : "linear/forward", linear, backward, {"out", "in", "tokens", "threads", "hybrid"},
        {{4096, 4096, 128}, {4096, 4096, 512}, {2048, 2048, 512}, {576, 576, 508}, {1536, 576, 508}});
    add(backward ? "attention/backward" : "attention/forward", attention, backward,
        {"batch", "heads", "shared", "length", "dim", "threads", "hybrid"},
        {{1, 32, 8, 2048, 64}, {1, 9, 3, 512, 64}, {4, 9, 3, 127, 64}});
  }
}

}  // namespace
}  // namespace pissa::bench

int main(int argc, char** argv) { return pissa::bench::bench_main(argc, argv, pissa::bench::register_all, nullptr); }
