// What the CUDA backend costs besides arithmetic, which only the simulation can count: launches, waits, memory. And
// what a kernel computes for matrices that are too large for a test.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "pissa/core/split.h"
#include "pissa/cuda/backend.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/device.h"
#include "pissa/cuda/lt_plan.h"
#include "pissa/cuda/products.h"
#include "pissa/cuda/split_many.h"
#include "sim/control.h"
#include "sim/ledger.h"
#include "support/device_layer.h"
#include "support/matrices.h"
#include "support/reference.h"
#include "support/split_layer.h"
#include "support/transferring_backend.h"

namespace pissa::test {
namespace {

/// What a pass of a layer costs: launches, and memory beside the layer's.
std::pair<std::int64_t, std::size_t> cost_of(void (DeviceLayer::*pass)(), DeviceLayer& layer) {
  const std::size_t before = cuda_sim::bytes_in_use();
  cuda_sim::reset_peak_bytes();
  cuda_sim::reset_launches();
  (layer.*pass)();
  return {cuda_sim::launches(), cuda_sim::peak_bytes() - before};
}

// Decoding one or more tokens: x A^T, and then all the rest in one kernel.
TEST(CudaResources, AFewTokensTakeTwoLaunchesAndNoMemory) {
  for (const std::int64_t tokens : {1, 4, 16}) {
    DeviceLayer layer(tokens, 64, 128, 8);
    EXPECT_EQ(cost_of(&DeviceLayer::forward, layer), (std::pair<std::int64_t, std::size_t>{2, 0}));
  }
}

// The second of these kernels prefetches its weight while the first computes x A^T, where a device can do that.
TEST(CudaResources, TheSecondLaunchMayStartEarly) {
  for (const auto& [major, minor, dependent] : {std::tuple{9, 0, true}, {8, 9, false}, {12, 0, true}}) {
    cuda_sim::set_compute_capability(major, minor);
    DeviceLayer layer(4, 64, 128, 8);
    cuda_sim::reset_ledger();
    layer.forward();
    std::vector<bool> launches;
    for (const cuda_sim::Entry& entry : cuda_sim::ledger()) {
      if (entry.kind == cuda_sim::Kind::launch) launches.push_back(entry.dependent);
    }
    EXPECT_EQ(launches, (std::vector<bool>{false, dependent})) << major << "." << minor;
  }
  cuda_sim::set_compute_capability(9, 0);
}

// What is loaded of x and codes, from memory or L2: every block of 16 or 32 columns loads all of x. A multiprocessor
// without a block would lose more than a second load of x.
TEST(CudaResources, BytesLoadedForAFewTokens) {
  const auto loaded = [](std::int64_t tokens, std::int64_t out, int multiprocessors) {
    cuda_sim::set_multiprocessors(multiprocessors);
    DeviceLayer layer(tokens, out, 128, 8);
    cuda_sim::reset_loaded_bytes();
    layer.forward();
    cudaStreamSynchronize(cuda::standalone_context().stream);
    cuda_sim::set_multiprocessors(cuda_sim::kMultiprocessors);
    return cuda_sim::loaded_bytes();
  };
  const auto expected = [](std::int64_t tokens, std::int64_t out, std::int64_t blocks) {
    return blocks * tokens * 128 * 2 + out * 128 / 2;
  };
  for (const std::int64_t tokens : {1, 16, 17, 64}) {
    EXPECT_EQ(loaded(tokens, 128, 4), expected(tokens, 128, 4)) << "a block of 32 each, or two of 16";
    EXPECT_EQ(loaded(tokens, 128, 8), expected(tokens, 128, 8)) << "of 32, four would have none";
  }
  EXPECT_EQ(loaded(1, 192, 4), expected(1, 192, 12)) << "three blocks of 16 each, or two of 32: one row is little";
  EXPECT_EQ(loaded(16, 192, 4), expected(16, 192, 6));
}

// Kernels and products. Up to 64 tokens: sums of factors, x A^T, the rest in one kernel. Above, the weight is decoded,
// and the tail is a product of its own. Backward: decoded, dy^T xa, dy B, (dy B)^T x, the tail, dy W. Nothing is
// converted.
TEST(CudaResources, LaunchesOfALayer) {
  const auto products_of = [](void (DeviceLayer::*pass)(), DeviceLayer& layer) {
    cuda_sim::reset_ledger();
    (layer.*pass)();
    return cuda_sim::sum_if([](const cuda_sim::Entry& entry) { return entry.kind == cuda_sim::Kind::library; }).calls;
  };
  for (const auto& [tokens, forward, forward_products, backward, backward_products] :
       {std::tuple{17, 2, 1, 1, 5}, {64, 2, 1, 1, 5}, {65, 2, 3, 1, 5}, {512, 2, 3, 1, 5}}) {
    DeviceLayer layer(tokens, 64, 128, 8);
    EXPECT_EQ(cost_of(&DeviceLayer::forward, layer).first, forward) << tokens;
    EXPECT_EQ(products_of(&DeviceLayer::forward, layer), forward_products) << tokens;
    EXPECT_EQ(cost_of(&DeviceLayer::backward, layer).first, backward) << tokens;
    EXPECT_EQ(products_of(&DeviceLayer::backward, layer), backward_products) << tokens;
  }
}

// The host asks cublasLt for three products, and nothing else, once their shapes have been met.
TEST(CudaResources, APlanIsFoundOnceForEachShape) {
  DeviceLayer layer(512, 64, 128, 8);
  const auto forward_with_calls = [&](int allowed) {
    cuda_sim::fail_next(CUBLAS_STATUS_EXECUTION_FAILED, allowed);
    layer.forward();
    const bool were_enough = cuda_sim::failure_pending();
    cuda_sim::clear_failures();
    return were_enough;
  };
  layer.forward();
  EXPECT_TRUE(forward_with_calls(3));
  cuda::LtPlan::forget(cuda::standalone_context());
  EXPECT_THROW(forward_with_calls(3), std::runtime_error);
  cuda_sim::clear_failures();
}

// Decoding with a mixture of experts: two launches for up to 128 of them, where one after the other has two for each.
TEST(CudaResources, LaunchesOfAGroup) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(12);
  Staging at(context);
  const StoredNf4 weight(random, 64, 128, 64, true);
  const Stored a(random.dense(8, 128), Format::f32), b(random.dense(64, 8), Format::f32);
  const Stored x(random.dense(300, 128), Format::bf16, Stored::kAligned, Stored::kAligned);
  GroupedLayer layer{at(weight.view()), {at(a.view()), at(b.view()), at(a.view()), at(b.view())}};
  const Matrix all = at(x.view());
  const cuda::Buffer y(context, 300, 64, Format::bf16), xa(context, 300, 8, Format::f32);
  at.finish();
  cuda::CudaBackend cuda(context);
  const auto cost_of_layers = [&](std::int64_t count, std::int64_t idle) {
    std::vector<GroupedLayer> layers(static_cast<std::size_t>(count), layer);
    for (std::int64_t i = 0; i < count; ++i)
      layers[i].rows = i < idle ? 0 : 1, layers[i].first = std::max<std::int64_t>(i - idle, 0);
    const std::size_t before = cuda_sim::bytes_in_use();
    cuda_sim::reset_peak_bytes();
    cuda_sim::reset_launches();
    grouped_linear_forward(cuda, all, layers, y.view(), xa.view());
    return std::pair{cuda_sim::launches(), cuda_sim::peak_bytes() - before};
  };
  using Cost = std::pair<std::int64_t, std::size_t>;
  EXPECT_EQ(cost_of_layers(128, 0), (Cost{2, 0}));
  EXPECT_EQ(cost_of_layers(130, 2), (Cost{2, 0}));
  EXPECT_EQ(cost_of_layers(300, 0), (Cost{6, 0}));
  // One by one, no launch but that of the sums of factors, one to decode and one to round x A^T for the product with B.
  layer.rows = 129;
  cuda_sim::reset_launches();
  grouped_linear_forward(cuda, rows_of(all, 0, 129), std::span(&layer, 1), y.view(), xa.view());
  EXPECT_EQ(cuda_sim::launches(), 3);
  cuda_sim::set_compute_capability(7, 5);  // whose tensor cores know no bf16
  EXPECT_GE(cost_of_layers(128, 0).first, 256);
  cuda_sim::set_compute_capability(9, 0);
}

// Whose tensor cores know no bf16.
TEST(CudaResources, ATuringCardDecodesForFewTokens) {
  cuda_sim::set_compute_capability(7, 5);
  DeviceLayer layer(16, 64, 128, 8);
  EXPECT_GT(cost_of(&DeviceLayer::forward, layer).first, 2);
  cuda_sim::set_compute_capability(9, 0);
}

// No operand is copied for it: dy alone would take 300 x 64 elements.
TEST(CudaResources, AScalingCostsNothing) {
  DeviceLayer plain(300, 64, 64, 8, 1.0f), scaled(300, 64, 64, 8, 0.3f);
  for (const auto pass : {&DeviceLayer::forward, &DeviceLayer::backward}) {
    EXPECT_EQ(cost_of(pass, scaled), cost_of(pass, plain));
  }
}

// Without memory for them each pass has a launch for the sum of a factor, and one to round it.
TEST(CudaResources, FactorsAreSummedOnceForBothPasses) {
  for (const bool implicit : {false, true}) {
    std::vector<std::int64_t> launches;
    for (const bool keeps : {false, true}) {
      DeviceLayer layer(80, 64, 128, 8);
      ASSERT_TRUE(layer.keeps_sums);
      layer.adapter.implicit = implicit;
      layer.keeps_sums = keeps;
      launches.push_back(cost_of(&DeviceLayer::forward, layer).first);
      launches.push_back(cost_of(&DeviceLayer::backward, layer).first);
    }
    // Of the change only A is summed; its backward puts A beside dA, which is a copy anyway.
    EXPECT_EQ(launches[0] - launches[2], implicit ? 1 : 3) << "forward";
    EXPECT_EQ(launches[1] - launches[3], implicit ? 1 : 4) << "backward";
  }
}

// A graph of it computes the same bits whenever it is launched: nothing waits, and nothing takes or gives back memory
// but in the order of the stream.
TEST(CudaResources, AGraphCanCaptureTheLinearLayer) {
  const cudaStream_t stream = cuda::standalone_context().stream;
  for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed}) {
    for (const std::int64_t tokens : {1, 16, 40}) {
      DeviceLayer layer(tokens, 64, 128, 8);
      layer.run();
      const std::vector<unsigned char> expected = layer.take_results();
      cudaStreamSynchronize(stream);
      const cudaGraphExec_t exec = layer.capture(mode);
      for (int i = 0; i < 2; ++i) {
        ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
        EXPECT_TRUE(layer.take_results() == expected) << tokens;
      }
      cudaGraphExecDestroy(exec);
    }
  }
}

// The codes; the nested scales, and before them what their mean is of, where it is not given.
TEST(CudaResources, QuantisingTakesALaunchOrThreeAndNeverWaits) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(9);
  const Stored weight(random.dense(40, 320), Format::bf16);
  const float given = 1.0f;
  Staging at(context);
  const Matrix w = at(weight.view());
  const float* offset = at.upload(&given, 1);
  const cuda::Array<std::uint8_t> codes(context, 20 * 320), codes8(context, 200);
  const cuda::Array<float> absmax(context, 200), nested(context, 1), mean(context, 1);
  at.finish();
  cuda::CudaBackend cuda(context);
  for (const float* known : {offset, static_cast<const float*>(nullptr)}) {
    cuda_sim::reset_synchronizations();
    cuda_sim::reset_launches();
    cuda.gemm_quantized({}, w, {Format::nf4, 64, codes.data(), absmax.data()});
    EXPECT_EQ(cuda_sim::launches(), 1);
    cuda.quantize_absmax(absmax.data(), 200, known, codes8.data(), nested.data(), mean.data());
    EXPECT_EQ(cuda_sim::launches(), known ? 2 : 3);
    EXPECT_EQ(cuda_sim::synchronizations(), 0);
  }
}

TEST(CudaResources, NothingAssumedIsNothingToWaitFor) {
  cuda::CudaBackend cuda(cuda::standalone_context());
  cuda_sim::reset_synchronizations();
  EXPECT_TRUE(cuda.had_full_rank());
  EXPECT_EQ(cuda_sim::synchronizations(), 0);
}

struct SplitCost {
  std::int64_t waits, launches;
};

/// Of a start of these weights; copies from and to the host do not count, each of which waits once.
SplitCost cost_of_split(int full, int deficient, std::optional<float> largest = {},
                        std::int64_t stack_bytes = cuda::kStackBytes) {
  Random random(11);
  std::vector<SplitLayer> layers;
  for (int i = 0; i < full; ++i) layers.emplace_back(random.dense(20, 30), Format::f32, 4, 1.0f);
  const Dense of_rank_2 = random.dense(20, 2) * random.dense(2, 30);
  for (int i = 0; i < deficient; ++i) layers.emplace_back(of_rank_2, Format::f32, 4, 1.0f);
  cuda_sim::reset_synchronizations();
  cuda_sim::reset_launches();
  split_on_device(layers, cuda::standalone_context(), {}, largest, stack_bytes);
  return {cuda_sim::synchronizations() - 2, cuda_sim::launches()};
}

// A stack of weights waits no more often than one of them: for their largest elements, if it is not told, and to know
// whether all went well.
TEST(CudaResources, AStackWaitsOnceForAll) {
  EXPECT_EQ(cost_of_split(1, 0).waits, 2);
  EXPECT_EQ(cost_of_split(10, 0).waits, 2);
  EXPECT_EQ(cost_of_split(10, 0, 5.0f).waits, 1);
  EXPECT_LT(2 * cost_of_split(10, 0).launches, cost_of_split(10, 0, 5.0f, 1).launches) << "one by one";
}

// The careful way waits after each step, so the number of waits tells how many weights took it.
TEST(CudaResources, OnlyAWeightWithoutFullRankIsDecomposedAgain) {
  const auto waits = [](int full, int deficient) { return cost_of_split(full, deficient, 5.0f).waits; };
  EXPECT_EQ(waits(3, 0), 1);
  const std::int64_t careful = waits(1, 1) - 1;
  EXPECT_GT(careful, 1);
  EXPECT_EQ(waits(3, 1), 1 + careful);
  EXPECT_EQ(waits(3, 2), 1 + 2 * careful);
}

// All weights of a 7B model take four launches, and nothing waits for them.
TEST(CudaResources, TheLargestElementsOfAllWeightsTakeFewLaunches) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(9);
  const Stored weight(random.dense(8, 16), Format::bf16);
  Staging at(context);
  const std::vector<Matrix> weights(224, at(weight.view()));
  const cuda::Buffer largest(context, 1, 224, Format::f32);
  at.finish();
  const cuda::CudaBackend cuda(context);
  cuda_sim::reset_synchronizations();
  cuda_sim::reset_launches();
  cuda.max_abs(weights, largest.data<float>());
  EXPECT_EQ(cuda_sim::launches(), 4);
  EXPECT_EQ(cuda_sim::synchronizations(), 0);
}

// A weight of 8 MB in bf16 takes two chunks of the size allowed, not a copy of all of it, and the product's workspace.
TEST(CudaResources, AWeightIsDecodedInBoundedMemory) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(4);
  Staging at(context);
  const StoredNf4 weight(random, 2048, 2048, 64, false);
  const Matrix w = at(weight.view());
  const Stored x_host(random.dense(17, 2048), Format::bf16);
  const Matrix x = at(x_host.view());
  const cuda::Buffer y(context, 17, 2048, Format::bf16);
  at.finish();
  const std::size_t before = cuda_sim::bytes_in_use();
  cuda_sim::reset_peak_bytes();
  constexpr std::int64_t kChunk = 1 << 20;
  cuda::weight_product(context, x, w, Op::t, 1.0f, Precision::bf16, {}, {}, y.view(), kChunk);
  EXPECT_LE(cuda_sim::peak_bytes() - before, 2 * kChunk + (std::size_t{1} << 17));
  EXPECT_EQ(cuda_sim::bytes_in_use(), before);
}

// Memory that runs out above so many bytes in use.
class LimitedMemory final : public cuda::Allocator {
 public:
  explicit LimitedMemory(std::int64_t limit) : limit_(limit) {}
  void* allocate(std::int64_t bytes, cudaStream_t stream) const override {
    if (used_ + bytes > limit_) {
      ++refusals;
      throw cuda::OutOfMemory("none left");
    }
    void* data = cuda::stream_ordered_allocator().allocate(bytes, stream);
    used_ += sizes_[data] = bytes;
    return data;
  }
  void free(void* data, cudaStream_t stream) const noexcept override {
    used_ -= sizes_.at(data);
    cuda::stream_ordered_allocator().free(data, stream);
  }
  std::int64_t used() const { return used_; }
  mutable int refusals = 0;

 private:
  std::int64_t limit_;
  mutable std::int64_t used_ = 0;
  mutable std::map<void*, std::int64_t> sizes_;
};

// Where memory runs out half as many weights are a stack, and again, down to one; what a stack that failed had is given
// back. With too little for one, nothing is written.
TEST(CudaResources, FewerWeightsAtOnceWhereMemoryRunsOut) {
  const auto split_within = [](const LimitedMemory& memory, std::vector<SplitLayer>& layers) {
    cuda::Context context = cuda::standalone_context();
    context.allocator = &memory;
    split_on_device(layers, context, {SvdMethod::krylov, 12, 5}, 5.0f);
  };
  const auto make = [] {
    Random random(10);
    std::vector<SplitLayer> layers;
    for (int i = 0; i < 7; ++i) layers.emplace_back(random.dense(40, 60), Format::bf16, 4, 1.0f);
    return layers;
  };
  const auto product_of = [](const SplitLayer& layer) { return layer.b0.values() * layer.a0.values(); };
  std::vector<SplitLayer> expected = make();
  split_within(LimitedMemory(std::int64_t{1} << 40), expected);
  std::set<int> refusals;
  bool one_fits = true;
  for (std::int64_t limit = 4 << 20; one_fits; limit -= limit / 5) {
    std::vector<SplitLayer> layers = make();
    const LimitedMemory memory(limit);
    try {
      split_within(memory, layers);
      refusals.insert(memory.refusals);
    } catch (const cuda::OutOfMemory&) {
      one_fits = false;
    }
    EXPECT_EQ(memory.used(), 0);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      if (one_fits) {
        EXPECT_LE(norm(product_of(layers[i]) - product_of(expected[i])), 64 * kEps32 * norm(product_of(expected[i])));
      } else {
        EXPECT_TRUE(std::isnan(layers[i].a0.values()(0, 0)));
      }
    }
  }
  for (const int halvings : {0, 1, 2, 3}) EXPECT_TRUE(refusals.contains(halvings)) << halvings;
}

TEST(CudaResources, ManyWordsAreReadBackInPieces) {
  const cuda::Context& context = cuda::standalone_context();
  std::vector<int> words(2500), result(2500);
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = static_cast<int>(i);
  Staging at(context);
  cuda::read_back(context, at.upload(words.data(), 2500), result.data(), 2500 * sizeof(int));
  EXPECT_EQ(result, words);
}

// Rows and columns of elements whose number takes more than 31 bits.
TEST(CudaDivide, AnySize) {
  constexpr std::int64_t kLimit = std::int64_t{1} << 31;
  for (const std::int64_t a : {std::int64_t{0}, kLimit - 1, kLimit, 5 * kLimit + 7, kLimit * kLimit - 1}) {
    for (const std::int64_t b : {std::int64_t{1}, std::int64_t{3}, kLimit - 1, kLimit, 4 * kLimit + 1}) {
      std::int64_t remainder = -1;
      EXPECT_EQ(cuda::divide(a, b, remainder), a / b) << a << " / " << b;
      EXPECT_EQ(remainder, a % b) << a << " / " << b;
    }
  }
}

}  // namespace
}  // namespace pissa::test
