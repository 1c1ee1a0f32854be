// Work beside the context's stream: that it waits for what it needs, and is waited for.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <future>
#include <latch>
#include <set>
#include <utility>
#include <vector>

#include "pissa/cuda/backend.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/products.h"
#include "support/device_layer.h"
#include "support/matrices.h"
#include "support/reference.h"
#include "support/transferring_backend.h"

namespace pissa::test {
namespace {

// Decoding is queued where nothing waits for it but the product.
TEST(CudaSideStream, AWeightIsDecodedBesideWhatIsQueuedNext) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(9);
  const StoredNf4 host(random, 40, 64, 64, true);
  Stored values = Stored::poisoned(40, 64, Format::bf16);
  {
    Staging at(context);
    cuda::CudaBackend cuda(context);
    const cuda::Weight ahead = cuda.decode_ahead(at(host.view()), Op::t, Precision::bf16, 65);
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

cudaStream_t stream_of_thread() { return cuda::standalone_context().side().stream; }

TEST(CudaSideStream, EveryThreadHasItsOwn) {
  constexpr int kThreads = 4;
  std::latch all_have_one(kThreads);
  const auto run = [&](bool wait) {
    const cudaStream_t stream = stream_of_thread();
    if (wait) all_have_one.arrive_and_wait();
    DeviceLayer layer(20, 40, 64, 3);
    for (int i = 0; i < 3; ++i) layer.run();
    EXPECT_EQ(stream_of_thread(), stream);
    return std::pair{stream, layer.take_results()};
  };
  const auto expected = run(false);
  std::vector<std::future<decltype(run(true))>> others;
  for (int i = 0; i < kThreads; ++i) others.push_back(std::async(std::launch::async, run, true));
  std::set<cudaStream_t> different{expected.first};
  for (auto& other : others) {
    const auto [stream, results] = other.get();
    different.insert(stream);
    EXPECT_TRUE(results == expected.second);
  }
  EXPECT_EQ(different.size(), 1u + kThreads);
}

// A program that starts a thread for each of its tasks makes no more streams than threads that live at once.
TEST(CudaSideStream, AThreadTakesOverFromOneThatHasEnded) {
  const auto in_a_thread = [] { return std::async(std::launch::async, stream_of_thread).get(); };
  const cudaStream_t first = in_a_thread();
  EXPECT_NE(first, stream_of_thread());
  EXPECT_EQ(in_a_thread(), first);
}

// A thread's first layer may be one that is captured: on a device where no thread that has ended left a stream.
TEST(CudaSideStream, ItsFirstUseMayBeInACapture) {
  const auto in_a_thread = [] {
    ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
    const cuda::Context& context = cuda::standalone_context();
    DeviceLayer layer(20, 40, 64, 3);
    const cudaGraphExec_t exec = layer.capture(cudaStreamCaptureModeGlobal);
    EXPECT_EQ(cudaGraphLaunch(exec, context.stream), cudaSuccess);
    const std::vector<unsigned char> captured = layer.take_results();
    cudaGraphExecDestroy(exec);
    layer.run();
    EXPECT_TRUE(layer.take_results() == captured);
  };
  std::async(std::launch::async, in_a_thread).get();
}

}  // namespace
}  // namespace pissa::test
