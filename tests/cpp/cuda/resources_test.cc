// What the CUDA backend costs besides arithmetic, which only the simulation can count: launches, waits, memory. What it
// does when a call of CUDA fails. And what a kernel computes for matrices that are too large for a test.
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <cusolverDn.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <future>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pissa/core/fused_linear.h"
#include "pissa/core/split.h"
#include "pissa/cuda/backend.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/device.h"
#include "pissa/cuda/products.h"
#include "pissa/cuda/split_many.h"
#include "sim/control.h"
#include "support/matrices.h"
#include "support/reference.h"
#include "support/split_layer.h"
#include "support/transferring_backend.h"

namespace pissa::test {
namespace {

Stored aligned(const Dense& values, Format format) {
  return Stored(values, format, Stored::kAligned, Stored::kAligned);
}

/// A QPiSSA layer on the device, and room for what it computes.
class DeviceLayer {
 public:
  DeviceLayer(std::int64_t tokens, std::int64_t out, std::int64_t in, std::int64_t r, float scaling = 1.0f)
      : at_(context_),
        x_(aligned(random_.dense(tokens, in), Format::bf16)),
        dy_(aligned(random_.dense(tokens, out), Format::bf16)),
        weight_(random_, out, in, 64, true),
        a_(random_.dense(r, in), Format::f32),
        b_(random_.dense(out, r), Format::f32),
        y_(context_, tokens, out, Format::bf16),
        xa_(context_, tokens, r, Format::f32),
        sums_(context_, r, in + out, Format::bf16),
        dx_(context_, tokens, in, Format::bf16),
        grad_a_(context_, r, in, Format::f32),
        grad_b_(context_, out, r, Format::f32),
        x(at_(x_.view())),
        dy(at_(dy_.view())),
        weight(at_(weight_.view())) {
    adapter.a = at_(a_.view());
    adapter.b = at_(b_.view());
    adapter.a0 = at_(a_.view());
    adapter.b0 = at_(b_.view());
    adapter.scaling = scaling;
    keeps_sums = FactorSums::kept<cuda::CudaBackend>(x, adapter);
    at_.finish();
  }
  void forward() {
    cuda::CudaBackend cuda(context_);
    linear_forward(cuda, x, weight, {}, adapter, y_.view(), xa_.view(), sums());
  }
  void backward() {
    cuda::CudaBackend cuda(context_);
    linear_backward(cuda, dy, x, weight, adapter, xa_.view(), dx_.view(), grad_a_.view(), grad_b_.view(), sums());
  }
  /// y, dx and the gradients of the factors, byte by byte; on the device 0xff from then on, which is NaN.
  std::vector<unsigned char> take_results() {
    std::vector<unsigned char> bytes;
    for (const cuda::Buffer* buffer : {&y_, &xa_, &dx_, &grad_a_, &grad_b_}) {
      const MutableMatrix matrix = buffer->view();
      const auto size = static_cast<std::size_t>(matrix.rows * matrix.cols * element_size(matrix.format));
      bytes.resize(bytes.size() + size);
      cudaMemcpyAsync(bytes.data() + bytes.size() - size, matrix.data, size, cudaMemcpyDeviceToHost, context_.stream);
      cudaStreamSynchronize(context_.stream);
      cudaMemsetAsync(matrix.data, 0xff, size, context_.stream);
    }
    return bytes;
  }

 private:
  FactorSums sums() const {
    return keeps_sums ? FactorSums::at(sums_.view().data, Format::bf16, adapter) : FactorSums{};
  }

  const cuda::Context& context_ = cuda::standalone_context();
  Random random_{1};
  Staging at_;
  Stored x_, dy_;
  StoredNf4 weight_;
  Stored a_, b_;
  cuda::Buffer y_, xa_, sums_, dx_, grad_a_, grad_b_;
  Matrix x, dy, weight;

 public:
  Adapter adapter;
  bool keeps_sums = false;
};

// Decoding one or more tokens: x A^T, and then all the rest in one kernel.
TEST(CudaResources, AFewTokensTakeTwoLaunchesAndNoMemory) {
  for (const std::int64_t tokens : {1, 4, 16}) {
    DeviceLayer layer(tokens, 64, 128, 8);
    const std::size_t before = cuda_sim::bytes_in_use();
    cuda_sim::reset_peak_bytes();
    cuda_sim::reset_launches();
    layer.forward();
    EXPECT_EQ(cuda_sim::launches(), 2);
    EXPECT_EQ(cuda_sim::peak_bytes(), before);
  }
}

// No operand is copied for it: dy alone would take 300 x 64 elements.
TEST(CudaResources, AScalingCostsNothing) {
  std::vector<std::pair<std::size_t, std::int64_t>> costs;
  for (const float scaling : {1.0f, 0.3f}) {
    DeviceLayer layer(300, 64, 64, 8, scaling);
    const std::size_t before = cuda_sim::bytes_in_use();
    cuda_sim::reset_launches();
    for (const auto pass : {&DeviceLayer::forward, &DeviceLayer::backward}) {
      cuda_sim::reset_peak_bytes();
      (layer.*pass)();
      costs.emplace_back(cuda_sim::peak_bytes() - before, cuda_sim::launches());
    }
  }
  EXPECT_EQ(costs[0], costs[2]) << "forward";
  EXPECT_EQ(costs[1], costs[3]) << "backward";
}

// Without memory for them each pass has a launch for the sum of a factor, and one to round it.
TEST(CudaResources, FactorsAreSummedOnceForBothPasses) {
  for (const bool implicit : {false, true}) {
    std::vector<std::int64_t> launches;
    for (const bool keeps : {false, true}) {
      DeviceLayer layer(40, 64, 128, 8);
      ASSERT_TRUE(layer.keeps_sums);
      layer.adapter.implicit = implicit;
      layer.keeps_sums = keeps;
      for (const auto pass : {&DeviceLayer::forward, &DeviceLayer::backward}) {
        cuda_sim::reset_launches();
        (layer.*pass)();
        launches.push_back(cuda_sim::launches());
      }
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
      layer.forward();
      layer.backward();
      const std::vector<unsigned char> expected = layer.take_results();
      cudaStreamSynchronize(stream);
      ASSERT_EQ(cudaStreamBeginCapture(stream, mode), cudaSuccess);
      layer.forward();
      layer.backward();
      cudaGraph_t graph;
      ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
      cudaGraphExec_t exec;
      ASSERT_EQ(cudaGraphInstantiate(&exec, graph), cudaSuccess);
      for (int i = 0; i < 2; ++i) {
        ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
        EXPECT_TRUE(layer.take_results() == expected) << tokens;
      }
      cudaGraphExecDestroy(exec);
      cudaGraphDestroy(graph);
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

TEST(CudaResources, ADecompositionWaitsTwice) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(2);
  const Stored weight(random.dense(40, 60), Format::bf16);
  Staging at(context);
  const Matrix w = at(weight.view());
  const cuda::Buffer a0(context, 4, 60, Format::f32), b0(context, 40, 4, Format::f32);
  at.finish();
  cuda::CudaBackend cuda(context);
  cuda_sim::reset_synchronizations();
  split(cuda, w, 1.0f, {}, a0.view(), b0.view());
  EXPECT_EQ(cuda_sim::synchronizations(), 2) << "for the largest element, and to know whether all went well";
}

// A stack of weights waits no more often than one of them: for their largest elements, if it is not told, and to know
// whether all went well.
TEST(CudaResources, AStackWaitsOnceForAll) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(3);
  const Stored weight(random.dense(40, 60), Format::bf16);
  Staging at(context);
  const Matrix w = at(weight.view());
  std::vector<cuda::Buffer> factors;
  std::vector<SplitTask> tasks;
  for (int i = 0; i < 10; ++i) {
    factors.emplace_back(context, 4, 60, Format::f32);
    factors.emplace_back(context, 40, 4, Format::f32);
    tasks.push_back({w, 1.0f, (factors.end() - 2)->view(), factors.back().view()});
  }
  at.finish();
  cuda_sim::reset_synchronizations();
  cuda_sim::reset_launches();
  cuda::split_many(tasks, {}, context);
  EXPECT_EQ(cuda_sim::synchronizations(), 2);
  const std::int64_t together = cuda_sim::launches();
  for (SplitTask& task : tasks) task.largest = 5.0f;
  cuda_sim::reset_synchronizations();
  cuda::split_many(tasks, {}, context);
  EXPECT_EQ(cuda_sim::synchronizations(), 1);
  cuda_sim::reset_launches();
  cuda::split_many(tasks, {}, context, 1);
  EXPECT_LT(2 * together, cuda_sim::launches()) << "one by one";
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
    Staging at(cuda::standalone_context());
    std::vector<SplitTask> tasks;
    for (SplitLayer& layer : layers) {
      const SplitTask task = layer.task();
      tasks.push_back({at(task.w), task.scaling, at(task.a0), at(task.b0), 5.0f});
    }
    cuda::Context context = cuda::standalone_context();
    context.allocator = &memory;
    cuda::split_many(tasks, {SvdMethod::krylov, 12, 5}, context);
    at.finish();
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

// ---- The side stream
// -------------------------------------------------------------------------------------------------

// Decoding is queued where nothing waits for it but the product.
TEST(CudaSideStream, AWeightIsDecodedBesideWhatIsQueuedNext) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(9);
  const StoredNf4 host(random, 40, 64, 64, true);
  Stored values = Stored::poisoned(40, 64, Format::bf16);
  {
    Staging at(context);
    cuda::CudaBackend cuda(context);
    const cuda::Weight ahead = cuda.decode_ahead(at(host.view()), Precision::bf16, 17);
    cudaStreamSynchronize(context.stream);
    EXPECT_EQ(cudaStreamQuery(context.side().stream), cudaErrorNotReady);
    ahead.wait();
    cuda.copy(ahead.view(), at(values.mutable_view()));
    at.finish();
  }
  EXPECT_EQ(values.values().values, Stored(host.values(), Format::bf16).values().values);
}

// Though the side stream runs as early as it may: behind the weight's upload, behind the product that read its memory.
TEST(CudaSideStream, DecodingWaitsForWhatItNeeds) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(10);
  for (const Op op : {Op::t, Op::n}) {
    const StoredNf4 host(random, 320, 320, 64, false);
    const Stored x(random.dense(20, 320), Format::bf16);
    Stored y = Stored::poisoned(20, 320, Format::f32);
    Staging at(context);
    const cuda::Weight weight = at(host.view());
    constexpr std::int64_t kChunk = 64 * 320 * 2;  // five of them
    cuda::weight_product(context, at(x.view()), weight, op, 1.0f, Precision::bf16, {}, {}, at(y.mutable_view()),
                         kChunk);
    cudaStreamSynchronize(context.side().stream);
    at.finish();
    const Dense w = oriented(Stored(host.values(), Format::bf16).values(), op);
    expect_close(y, {x.values() * w, absolute(x.values()) * absolute(w)}, 321);
  }
}

TEST(CudaSideStream, EveryThreadHasItsOwn) {
  const auto streams = [] {
    DeviceLayer layer(20, 40, 64, 3);
    for (int i = 0; i < 3; ++i) layer.forward(), layer.backward();
    return std::pair{cuda::standalone_context().side().stream, layer.take_results()};
  };
  const auto expected = streams();
  std::vector<std::future<decltype(streams())>> others;
  for (int i = 0; i < 4; ++i) others.push_back(std::async(std::launch::async, streams));
  std::set<cudaStream_t> different{expected.first};
  for (auto& other : others) {
    const auto [stream, results] = other.get();
    different.insert(stream);
    EXPECT_TRUE(results == expected.second);
  }
  EXPECT_EQ(different.size(), 5u);
}

// ---- Failures -------------------------------------------------------------------------------------------------------

class CudaFailures : public ::testing::Test {
 protected:
  void TearDown() override {
    cuda_sim::clear_failures();
    cuda_sim::reset_libraries();
  }

  /// Makes each call of one library fail in turn: `run` throws naming it, leaves no memory behind, and nothing on the
  /// side stream that would still use it.
  template <class Status>
  void fail_each(Status status, const std::string& status_name, const std::function<void()>& run) const {
    const cuda::Context& context = cuda::standalone_context();
    run();
    cudaStreamSynchronize(context.stream);
    const std::size_t before = cuda_sim::bytes_in_use();
    int calls = 0;
    for (;; ++calls) {
      cuda_sim::fail_next(status, calls);
      try {
        run();
      } catch (const std::runtime_error& error) {
        const std::string text = error.what();
        EXPECT_NE(text.find(status_name), std::string::npos) << text;
        EXPECT_EQ(text.rfind("cu", 0) == 0 || text.find(" failed on CUDA device 0: ") != std::string::npos, true)
            << text;
      }
      const bool no_more_calls = cuda_sim::failure_pending();
      cuda_sim::clear_failures();
      cudaStreamSynchronize(context.stream);
      ASSERT_EQ(cuda_sim::bytes_in_use(), before) << "call " << calls << " left memory behind";
      ASSERT_EQ(cudaStreamQuery(context.side().stream), cudaSuccess) << "call " << calls << " left work on the side";
      if (no_more_calls) break;
    }
    EXPECT_GT(calls, 0);
    run();  // works again
  }
};

TEST_F(CudaFailures, EveryCallOfALinearLayer) {
  for (const std::int64_t tokens : {2, 20}) {
    DeviceLayer layer(tokens, 40, 64, 3);
    const auto run = [&] {
      layer.forward();
      layer.backward();
    };
    fail_each(cudaErrorLaunchFailure, "cudaErrorLaunchFailure", run);
    fail_each(CUBLAS_STATUS_EXECUTION_FAILED, "CUBLAS_STATUS_EXECUTION_FAILED", run);
  }
}

TEST_F(CudaFailures, EveryCallOfAProductInChunks) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(11);
  Staging at(context);
  const StoredNf4 host(random, 200, 64, 64, false);
  const Stored x_host(random.dense(20, 64), Format::bf16);
  const Matrix weight = at(host.view()), x = at(x_host.view());
  const cuda::Buffer y(context, 20, 200, Format::bf16);
  at.finish();
  const auto run = [&] { cuda::weight_product(context, x, weight, Op::t, 1.0f, Precision::bf16, {}, {}, y.view(), 1); };
  fail_each(cudaErrorLaunchFailure, "cudaErrorLaunchFailure", run);
  fail_each(CUBLAS_STATUS_EXECUTION_FAILED, "CUBLAS_STATUS_EXECUTION_FAILED", run);
}

TEST_F(CudaFailures, EveryCallOfADecomposition) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(6);
  for (const std::int64_t rank : {2, 20}) {  // with and without the careful way
    const Stored weight(random.dense(20, rank) * random.dense(rank, 30), Format::f32);
    Staging at(context);
    const Matrix w = at(weight.view());
    const cuda::Buffer a0(context, 4, 30, Format::f32), b0(context, 20, 4, Format::f32);
    at.finish();
    const auto run = [&] {
      cuda::CudaBackend cuda(context);
      split(cuda, w, 1.0f, {SvdMethod::krylov, 2, 0}, a0.view(), b0.view());
    };
    fail_each(cudaErrorLaunchFailure, "cudaErrorLaunchFailure", run);
    fail_each(CUBLAS_STATUS_EXECUTION_FAILED, "CUBLAS_STATUS_EXECUTION_FAILED", run);
    fail_each(CUSOLVER_STATUS_INTERNAL_ERROR, "cusolverStatus_t", run);
  }
}

// Of a stack: rows that depend on one another are no failure, eigenvalues of another matrix that do not converge are;
// and both of one matrix, which follow from the rows, are none.
TEST_F(CudaFailures, EigenvaluesThatDoNotConverge) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(7);
  const std::int64_t count = 2, rows = 3, cols = 20;
  for (const std::int64_t dependent : {0, 1, 2}) {  // 2: none
    for (const std::int64_t not_finite : {0, 1, 2}) {
      Dense basis_values = random.dense(count * rows, cols), values = basis_values;
      for (std::int64_t j = 0; dependent < 2 && j < cols; ++j) basis_values(dependent * rows, j) = 0;
      if (not_finite < 2) values(not_finite * rows + 1, 3) = std::nan("");
      Stored basis_host(basis_values, Format::f32), rows_host(values, Format::f32);
      Staging at(context);
      const auto each = [&](MutableMatrix matrix) {
        matrix.rows /= count;
        matrix.stride = matrix.rows * matrix.ld;
        return matrix;
      };
      const MutableMatrix basis = each(at(basis_host.mutable_view())), gram_of = each(at(rows_host.mutable_view()));
      const std::vector<Matrix> weights(count, gram_of);
      cuda::CudaBackend cuda(context, weights);
      const cuda::Buffer s = cuda.alloc(1, rows, Format::f32), vectors = cuda.alloc(rows, rows, Format::f32);
      cuda.orthonormalize(basis, 0, rows, Rank::assumed_full);
      cuda.gram_svd(gram_of, 1.0f, s.view(), vectors.view());
      if (not_finite < 2 && not_finite != dependent) {
        EXPECT_THROW(cuda.had_full_rank(), std::runtime_error) << dependent << ", " << not_finite;
      } else {
        EXPECT_EQ(cuda.had_full_rank(), dependent == 2) << dependent << ", " << not_finite;
      }
      EXPECT_TRUE(cuda.had_full_rank()) << "asked once, cleared";
    }
  }
}

// What is left for had_full_rank stays, though rows of any rank are looked at in between.
TEST_F(CudaFailures, RowsOfAnyRankHideNone) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(8);
  Dense values = random.dense(3, 20);
  values(1, 3) = std::nan("");
  const Stored not_finite(values, Format::f32);
  Stored zeros(Dense(3, 20), Format::f32), rows(random.dense(3, 20), Format::f32);
  Staging at(context);
  cuda::CudaBackend cuda(context);
  const cuda::Buffer s = cuda.alloc(1, 3, Format::f32), vectors = cuda.alloc(3, 3, Format::f32);
  cuda.orthonormalize(at(zeros.mutable_view()), 0, 3, Rank::assumed_full);
  cuda.orthonormalize(at(rows.mutable_view()), 0, 3, Rank::any);
  EXPECT_FALSE(cuda.had_full_rank());
  cuda.gram_svd(at(not_finite.view()), 1.0f, s.view(), vectors.view());
  cuda.orthonormalize(at(rows.mutable_view()), 0, 3, Rank::any);
  EXPECT_THROW(cuda.had_full_rank(), std::runtime_error);
}

// Whatever a solver does that is given NaN, or whose answer is none, none is: weights without full rank go the careful
// way, alone and in a stack, to the same factors.
TEST_F(CudaFailures, NoSolverIsGivenNan) {
  Random random(11);
  const std::vector<Dense> values = {random.dense(40, 60), Dense(40, 60), random.dense(40, 3) * random.dense(3, 60),
                                     random.dense(40, 60)};
  std::vector<std::vector<unsigned char>> expected;
  for (const cuda_sim::OnNaN mode : {cuda_sim::OnNaN::info, cuda_sim::OnNaN::info_zero,
                                     cuda_sim::OnNaN::status_invalid_value, cuda_sim::OnNaN::status_execution_failed}) {
    cuda_sim::set_solver_on_nan(mode);
    for (const Format format : {Format::f32, Format::bf16}) {
      std::vector<SplitLayer> layers;
      for (const Dense& dense : values) layers.emplace_back(dense, format, 4, 1.0f);
      Staging at(cuda::standalone_context());
      std::vector<SplitTask> tasks;
      for (SplitLayer& layer : layers) {
        const SplitTask task = layer.task();
        tasks.push_back({at(task.w), task.scaling, at(task.a0), at(task.b0)});
      }
      cuda::split_many(tasks, {}, cuda::standalone_context());
      at.finish();
      for (const SplitLayer& layer : layers) {
        if (mode == cuda_sim::OnNaN::info) {
          EXPECT_LE(norm(layer.a0.values()), 100.0) << "NaN";
          expected.push_back(layer.a0.bytes());
        } else {
          EXPECT_TRUE(
              layer.a0.bytes() ==
              expected[static_cast<std::size_t>(&layer - layers.data()) + (format == Format::f32 ? 0 : values.size())]);
        }
      }
    }
  }
}

// A message says the call, the device, the status, and how large the problem was.
TEST_F(CudaFailures, AMessageHasTheSizes) {
  DeviceLayer layer(20, 40, 64, 3);
  cuda_sim::fail_next(CUBLAS_STATUS_EXECUTION_FAILED, 1000);
  cuda_sim::clear_failures();
  std::string text;
  for (int call = 0; call < 200 && text.find("cublasLtMatmul failed") != 0; ++call) {
    cuda_sim::fail_next(CUBLAS_STATUS_EXECUTION_FAILED, call);
    try {
      layer.forward();
    } catch (const std::runtime_error& error) {
      text = error.what();
    }
  }
  EXPECT_EQ(text.rfind("cublasLtMatmul failed on CUDA device 0: CUBLAS_STATUS_EXECUTION_FAILED (13) (m ", 0), 0u)
      << text;
}

TEST_F(CudaFailures, ACardThatIsTooOldIsRefusedWithTheListOfThoseThatAreNot) {
  const auto refused = [](int major, int minor) -> std::string {
    cuda_sim::set_compute_capability(major, minor);
    try {
      cuda::check_supported(0);
      return "";
    } catch (const std::runtime_error& error) {
      return error.what();
    }
  };
  const std::string text = refused(7, 5);
  EXPECT_NE(text.find("got compute capability 7.5; this build runs on 8.0, 9.0 and newer"), std::string::npos) << text;
  for (const auto& [major, minor] : {std::pair{8, 0}, {8, 6}, {8, 9}, {9, 0}, {10, 0}, {12, 0}}) {
    EXPECT_EQ(refused(major, minor), "") << major << "." << minor;
  }
  cuda_sim::set_compute_capability(9, 0);
}

}  // namespace
}  // namespace pissa::test
