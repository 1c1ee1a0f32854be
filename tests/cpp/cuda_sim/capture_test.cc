// Streams of the simulated runtime that are captured: what a graph does each time, and what ends a capture.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <future>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "support/cuda_sim_case.h"

namespace pissa::test {
namespace {

__global__ void add(float* to, float value) { to[0] += value; }
__global__ void copy_one(float* to, const float* from) { to[0] = from[0]; }

class CudaSimCapture : public CudaSimTest {
 protected:
  CudaSimCapture() { expect_success(cudaDeviceSynchronize()); }

  void begin(cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) const {
    expect_success(cudaStreamBeginCapture(stream_, mode));
  }
  void fork() const {
    expect_success(cudaEventRecord(forked_, stream_));
    expect_success(cudaStreamWaitEvent(side_, forked_));
  }
  void join() const {
    expect_success(cudaEventRecord(joined_, side_));
    expect_success(cudaStreamWaitEvent(stream_, joined_));
  }
  /// Ends the capture, runs what was captured, and returns what is then in the memory after each time.
  std::vector<std::vector<float>> launch_graph(int times) const {
    cudaGraph_t graph;
    expect_success(cudaStreamEndCapture(stream_, &graph));
    cudaGraphExec_t exec;
    expect_success(cudaGraphInstantiate(&exec, graph));
    expect_success(cudaGraphDestroy(graph));
    std::vector<std::vector<float>> results;
    for (int i = 0; i < times; ++i) {
      expect_success(cudaGraphLaunch(exec, stream_));
      expect_success(cudaStreamSynchronize(stream_));
      results.push_back(download(memory_, 2));
    }
    expect_success(cudaGraphExecDestroy(exec));
    return results;
  }
  void expect_end(cudaError_t error) const {
    cudaGraph_t graph = reinterpret_cast<cudaGraph_t>(16);
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), error);
    EXPECT_EQ(graph, nullptr);
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaErrorIllegalState) << "it has ended";
  }

  cudaStream_t stream_ = make_stream(), side_ = make_stream();
  cudaEvent_t forked_ = make_event(), joined_ = make_event();
  float* memory_ = upload(std::vector<float>{1, 10});
};

TEST_F(CudaSimCapture, WorkRunsWithEachLaunchAndNotBefore) {
  const std::size_t before = cuda_sim::bytes_in_use();
  begin();
  float* scratch;
  expect_success(launch(add, 1, 1, stream_, memory_, 1.0f));
  expect_success(cudaMallocAsync(&scratch, 4, stream_));
  expect_success(launch(copy_one, 1, 1, stream_, scratch, static_cast<const float*>(memory_)));
  expect_success(cudaMemsetAsync(memory_, 0, 4, stream_));
  expect_success(launch(copy_one, 1, 1, stream_, memory_, static_cast<const float*>(scratch)));
  expect_success(cudaFreeAsync(scratch, stream_));
  EXPECT_EQ(launch_graph(3), (std::vector<std::vector<float>>{{2, 10}, {3, 10}, {4, 10}}));
  EXPECT_EQ(cuda_sim::bytes_in_use(), before);
}

// What a graph has in its memory from the launch before, and what it has freed, is gone.
TEST_F(CudaSimCapture, MemoryIsFreshInEachLaunchAndGoneAfterItsEnd) {
  float* sum;
  begin();
  expect_success(cudaMallocAsync(&sum, 4, stream_));
  expect_success(launch(add, 1, 1, stream_, sum, 1.0f));
  expect_success(launch(copy_one, 1, 1, stream_, memory_, static_cast<const float*>(sum)));
  expect_success(cudaMemsetAsync(sum, 0, 4, stream_));
  EXPECT_TRUE(std::isnan(launch_graph(2)[1][0]));

  begin();
  expect_success(cudaMallocAsync(&sum, 4, stream_));
  expect_success(cudaMemsetAsync(sum, 0, 4, stream_));
  expect_success(cudaFreeAsync(sum, stream_));
  EXPECT_EQ(cudaMemsetAsync(sum, 0, 4, stream_), cudaErrorInvalidValue);
  expect_success(launch(copy_one, 1, 1, stream_, memory_, static_cast<const float*>(sum)));
  if (kUnderAsan) {
    EXPECT_DEATH(launch_graph(1), "use-after-poison");
    launch_graph(0);
  } else {
    EXPECT_TRUE(std::isnan(launch_graph(1)[0][0]));
  }
}

// A side stream goes as far as it is waited for. Where the consumer forgets to wait, it is too early in some launches.
TEST_F(CudaSimCapture, ForkAndJoin) {
  for (const bool waits : {true, false}) {
    begin();
    fork();
    expect_success(launch(add, 1, 1, side_, memory_, 1.0f));
    if (waits) join();
    expect_success(launch(copy_one, 1, 1, stream_, memory_ + 1, static_cast<const float*>(memory_)));
    if (!waits) join();
    bool early = false;
    for (const std::vector<float>& values : launch_graph(20)) early |= values[1] != values[0];
    EXPECT_EQ(early, !waits);
  }
}

TEST_F(CudaSimCapture, ASideStreamMustBeJoined) {
  for (const bool once : {false, true}) {
    begin();
    fork();
    expect_success(launch(add, 1, 1, side_, memory_, 1.0f));
    if (once) join();
    if (once) expect_success(launch(add, 1, 1, side_, memory_, 1.0f));
    expect_end(cudaErrorStreamCaptureUnjoined);
  }
  EXPECT_EQ(download(memory_, 1)[0], 1);
}

TEST_F(CudaSimCapture, WhatEndsACapture) {
  float host = 0;
  float* before;
  expect_success(cudaMallocAsync(&before, 4, stream_));
  const cudaEvent_t outside = make_event(), inside = make_event();
  expect_success(cudaEventRecord(outside, side_));
  const std::pair<std::function<cudaError_t()>, cudaError_t> in_any_mode[] = {
      {[&] { return cudaStreamSynchronize(stream_); }, cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaStreamQuery(stream_); }, cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaDeviceSynchronize(); }, cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaMemcpyAsync(&host, memory_, 4, cudaMemcpyDeviceToHost, stream_); },
       cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaMemcpyAsync(memory_, &host, 4, cudaMemcpyHostToDevice, stream_); },
       cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaStreamWaitEvent(nullptr, inside); }, cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaFreeAsync(before, stream_); }, cudaErrorInvalidValue},
      {[&] { return cudaStreamWaitEvent(stream_, outside); }, cudaErrorStreamCaptureIsolation}};
  const auto expect_ends = [&](cudaStreamCaptureMode mode, const auto& call, cudaError_t error) {
    begin(mode);
    expect_success(cudaEventRecord(inside, stream_));
    EXPECT_EQ(call(), error);
    EXPECT_EQ(launch(add, 1, 1, stream_, memory_, 1.0f), cudaErrorStreamCaptureInvalidated);
    expect_end(cudaErrorStreamCaptureInvalidated);
    EXPECT_EQ(cudaStreamWaitEvent(side_, inside), cudaErrorCapturedEvent);
  };
  for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed}) {
    for (const auto& [call, error] : in_any_mode) expect_ends(mode, call, error);
  }
  // Potentially unsafe calls.
  cudaStream_t stream;
  cudaEvent_t event;
  const std::function<cudaError_t()> unsafe[] = {
      [&] { return cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking); },
      [&] { return cudaEventCreateWithFlags(&event, cudaEventDisableTiming); }};
  for (const auto& call : unsafe) {
    expect_ends(cudaStreamCaptureModeGlobal, call, cudaErrorStreamCaptureUnsupported);
    begin(cudaStreamCaptureModeRelaxed);
    expect_success(call());
    launch_graph(1);
  }
}

TEST_F(CudaSimCapture, WhereItBeginsAndEnds) {
  EXPECT_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
  begin();
  EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), cudaErrorIllegalState);
  fork();
  cudaGraph_t graph;
  EXPECT_EQ(cudaStreamEndCapture(side_, &graph), cudaErrorIllegalState);
  join();
  launch_graph(1);
  begin();
  expect_success(cudaStreamBeginCapture(side_, cudaStreamCaptureModeGlobal));
  expect_success(cudaEventRecord(forked_, stream_));
  EXPECT_EQ(cudaStreamWaitEvent(side_, forked_), cudaErrorStreamCaptureMerge);
  expect_end(cudaErrorStreamCaptureInvalidated);
  EXPECT_EQ(cudaStreamEndCapture(side_, &graph), cudaErrorStreamCaptureInvalidated);
}

// A thread that is relaxed may make unsafe calls within a capture, and beside another thread's; others may not.
TEST_F(CudaSimCapture, AThreadIsRelaxed) {
  const auto make_one = [] {
    cudaEvent_t event;
    return cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  };
  const auto make_elsewhere = [&](cudaStreamCaptureMode mode) {
    return std::async(std::launch::async,
                      [&, mode]() mutable {
                        expect_success(cudaThreadExchangeStreamCaptureMode(&mode));
                        EXPECT_EQ(mode, cudaStreamCaptureModeGlobal);
                        return make_one();
                      })
        .get();
  };
  begin();
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  expect_success(cudaThreadExchangeStreamCaptureMode(&mode));
  expect_success(make_one());
  for (const auto other : {cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed}) {
    expect_success(make_elsewhere(other));
  }
  expect_success(cudaThreadExchangeStreamCaptureMode(&mode));
  EXPECT_EQ(mode, cudaStreamCaptureModeRelaxed);
  EXPECT_EQ(make_elsewhere(cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
  expect_end(cudaErrorStreamCaptureInvalidated);
}

}  // namespace
}  // namespace pissa::test
