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

cudaStream_t make_stream(unsigned flags = cudaStreamNonBlocking) {
  cudaStream_t stream;
  expect_success(cudaStreamCreateWithFlags(&stream, flags));
  return stream;
}

class CudaSimCapture : public CudaSimTest {
 protected:
  CudaSimCapture() {
    expect_success(cudaEventCreate(&forked_));
    expect_success(cudaEventCreate(&joined_));
    expect_success(cudaDeviceSynchronize());
  }
  ~CudaSimCapture() override {
    for (const cudaEvent_t event : {forked_, joined_}) expect_success(cudaEventDestroy(event));
    for (const cudaStream_t stream : {stream_, side_}) expect_success(cudaStreamDestroy(stream));
  }

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
  /// Ends the capture and runs what was captured.
  void launch_graph(int times) const {
    cudaGraph_t graph;
    expect_success(cudaStreamEndCapture(stream_, &graph));
    cudaGraphExec_t exec;
    expect_success(cudaGraphInstantiate(&exec, graph));
    expect_success(cudaGraphDestroy(graph));
    for (int i = 0; i < times; ++i) expect_success(cudaGraphLaunch(exec, stream_));
    expect_success(cudaGraphExecDestroy(exec));
    expect_success(cudaStreamSynchronize(stream_));
  }
  void expect_end(cudaError_t error) const {
    cudaGraph_t graph = reinterpret_cast<cudaGraph_t>(16);
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), error);
    EXPECT_EQ(graph, nullptr);
    EXPECT_EQ(status(), cudaStreamCaptureStatusNone);
  }
  cudaStreamCaptureStatus status() const {
    cudaStreamCaptureStatus result;
    expect_success(cudaStreamIsCapturing(stream_, &result));
    return result;
  }

  cudaStream_t stream_ = make_stream(), side_ = make_stream();
  cudaEvent_t forked_, joined_;
  float* memory_ = upload(std::vector<float>{1, 10});
};

TEST_F(CudaSimCapture, WorkRunsWithEachLaunchAndNotBefore) {
  const std::size_t before = cuda_sim::bytes_in_use();
  for (const int launches : {0, 3}) {
    begin();
    EXPECT_EQ(status(), cudaStreamCaptureStatusActive);
    float* scratch;
    expect_success(launch(add, 1, 1, stream_, memory_, 1.0f));
    expect_success(cudaMallocAsync(&scratch, 4, stream_));
    expect_success(launch(copy_one, 1, 1, stream_, scratch, static_cast<const float*>(memory_)));
    expect_success(cudaMemsetAsync(memory_, 0, 4, stream_));
    expect_success(launch(copy_one, 1, 1, stream_, memory_, static_cast<const float*>(scratch)));
    expect_success(cudaFreeAsync(scratch, stream_));
    launch_graph(launches);
    EXPECT_EQ(download(memory_, 1)[0], 1 + static_cast<float>(launches));
    EXPECT_EQ(cuda_sim::bytes_in_use(), before);
  }
}

// What a graph has in its memory from the launch before is gone.
TEST_F(CudaSimCapture, MemoryIsFreshInEachLaunch) {
  float* sum;
  begin();
  expect_success(cudaMallocAsync(&sum, 4, stream_));
  expect_success(launch(add, 1, 1, stream_, sum, 1.0f));
  expect_success(launch(copy_one, 1, 1, stream_, memory_, static_cast<const float*>(sum)));
  expect_success(cudaMemsetAsync(sum, 0, 4, stream_));
  launch_graph(2);
  EXPECT_TRUE(std::isnan(download(memory_, 1)[0]));
}

TEST_F(CudaSimCapture, MemoryIsGoneAfterItsEnd) {
  float* sum;
  begin();
  expect_success(cudaMallocAsync(&sum, 4, stream_));
  expect_success(cudaMemsetAsync(sum, 0, 4, stream_));
  expect_success(cudaFreeAsync(sum, stream_));
  EXPECT_EQ(cudaMemsetAsync(sum, 0, 4, stream_), cudaErrorInvalidValue);
  expect_success(launch(copy_one, 1, 1, stream_, memory_, static_cast<const float*>(sum)));
  if (kUnderAsan) {
    EXPECT_DEATH(launch_graph(1), "use-after-poison");
  }
  launch_graph(kUnderAsan ? 0 : 1);
  EXPECT_EQ(std::isnan(download(memory_, 1)[0]), !kUnderAsan);
}

// A side stream goes as far as it is waited for, and its end is unordered with what comes after the fork.
TEST_F(CudaSimCapture, ForkAndJoin) {
  begin();
  expect_success(launch(add, 1, 1, stream_, memory_, 1.0f));
  fork();
  expect_success(launch(copy_one, 1, 1, side_, memory_ + 1, static_cast<const float*>(memory_)));
  join();
  expect_success(launch(add, 1, 1, stream_, memory_ + 1, 0.5f));
  launch_graph(2);
  EXPECT_EQ(download(memory_, 2), (std::vector<float>{3, 3.5}));
  cudaStreamCaptureStatus side;
  expect_success(cudaStreamIsCapturing(side_, &side));
  EXPECT_EQ(side, cudaStreamCaptureStatusNone);
}

// The consumer forgets to wait for an event that it needs, before the end: in some of the launches it is too early.
TEST_F(CudaSimCapture, AMissingWaitShows) {
  begin();
  fork();
  expect_success(launch(add, 1, 1, side_, memory_, 1.0f));
  expect_success(launch(copy_one, 1, 1, stream_, memory_ + 1, static_cast<const float*>(memory_)));
  join();
  cudaGraph_t graph;
  expect_success(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t exec;
  expect_success(cudaGraphInstantiate(&exec, graph));
  bool early = false;
  for (int i = 0; i < 20; ++i) {
    expect_success(cudaGraphLaunch(exec, stream_));
    expect_success(cudaStreamSynchronize(stream_));
    const std::vector<float> values = download(memory_, 2);
    early |= values[1] != values[0];
  }
  EXPECT_TRUE(early);
  expect_success(cudaGraphExecDestroy(exec));
  expect_success(cudaGraphDestroy(graph));
}

TEST_F(CudaSimCapture, ASideStreamMustBeJoined) {
  begin();
  fork();
  expect_success(launch(add, 1, 1, side_, memory_, 1.0f));
  expect_end(cudaErrorStreamCaptureUnjoined);
  begin();
  fork();
  expect_success(launch(add, 1, 1, side_, memory_, 1.0f));
  join();
  expect_success(launch(add, 1, 1, side_, memory_, 1.0f));
  expect_end(cudaErrorStreamCaptureUnjoined);
  expect_success(cudaStreamSynchronize(side_));
  EXPECT_EQ(download(memory_, 1)[0], 1);
}

TEST_F(CudaSimCapture, WhatEndsACapture) {
  float host = 0;
  float *pinned, *before;
  void* pointer;
  expect_success(cudaMallocHost(reinterpret_cast<void**>(&pinned), 4));
  expect_success(cudaMallocAsync(&before, 4, stream_));
  const cudaEvent_t outside = joined_;
  expect_success(cudaEventRecord(outside, side_));
  const std::pair<std::function<cudaError_t()>, cudaError_t> in_any_mode[] = {
      {[&] { return cudaStreamSynchronize(stream_); }, cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaStreamQuery(stream_); }, cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaDeviceSynchronize(); }, cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaMemcpyAsync(&host, memory_, 4, cudaMemcpyDeviceToHost, stream_); },
       cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaMemcpyAsync(memory_, &host, 4, cudaMemcpyHostToDevice, stream_); },
       cudaErrorStreamCaptureUnsupported},
      {[&] { return cudaFreeAsync(before, stream_); }, cudaErrorInvalidValue},
      {[&] { return cudaStreamWaitEvent(stream_, outside); }, cudaErrorStreamCaptureIsolation},
      {[&] {
         expect_success(cudaEventRecord(forked_, stream_));
         return cudaEventSynchronize(forked_);
       },
       cudaErrorCapturedEvent},
      {[&] { return cudaEventQuery(forked_); }, cudaErrorCapturedEvent}};
  for (const auto mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed}) {
    for (const auto& [call, error] : in_any_mode) {
      begin(mode);
      expect_success(cudaEventRecord(forked_, stream_));
      EXPECT_EQ(call(), error);
      EXPECT_EQ(status(), cudaStreamCaptureStatusInvalidated);
      EXPECT_EQ(launch(add, 1, 1, stream_, memory_, 1.0f), cudaErrorStreamCaptureInvalidated);
      expect_end(cudaErrorStreamCaptureInvalidated);
    }
  }
  // Potentially unsafe calls, on whatever they work.
  cudaStream_t stream;
  cudaEvent_t event;
  const std::function<cudaError_t()> unsafe[] = {
      [&] { return cudaMalloc(&pointer, 4); }, [&] { return cudaFree(before); },
      [&] { return cudaMemcpy(&host, memory_, 4, cudaMemcpyDefault); },
      [&] { return cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking); },
      [&] { return cudaEventCreate(&event); }};
  for (const auto& call : unsafe) {
    begin();
    EXPECT_EQ(call(), cudaErrorStreamCaptureUnsupported);
    expect_end(cudaErrorStreamCaptureInvalidated);
  }
  begin(cudaStreamCaptureModeRelaxed);
  for (const auto& call : unsafe) expect_success(call());
  expect_success(cudaStreamDestroy(stream));
  expect_success(cudaEventDestroy(event));
  expect_success(cudaMemcpyAsync(pinned, memory_, 4, cudaMemcpyDeviceToHost, stream_));
  expect_success(cudaEventQuery(outside));
  launch_graph(1);
  EXPECT_EQ(*pinned, 1);
  expect_success(cudaFree(pointer));
  expect_success(cudaFreeHost(pinned));
}

TEST_F(CudaSimCapture, PinnedMemoryIsReadInEachLaunch) {
  float* pinned;
  expect_success(cudaMallocHost(reinterpret_cast<void**>(&pinned), 4));
  *pinned = 5;
  begin();
  expect_success(cudaMemcpyAsync(memory_, pinned, 4, cudaMemcpyHostToDevice, stream_));
  *pinned = 6;
  launch_graph(1);
  EXPECT_EQ(download(memory_, 1)[0], 6);
  expect_success(cudaFreeHost(pinned));
}

TEST_F(CudaSimCapture, WhereItBeginsAndEnds) {
  EXPECT_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
  cudaGraph_t graph;
  EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaErrorIllegalState);
  begin();
  EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), cudaErrorIllegalState);
  fork();
  EXPECT_EQ(cudaStreamEndCapture(side_, &graph), cudaErrorStreamCaptureUnmatched);
  expect_end(cudaErrorStreamCaptureInvalidated);
  begin();
  expect_success(cudaStreamBeginCapture(side_, cudaStreamCaptureModeGlobal));
  expect_success(cudaEventRecord(forked_, stream_));
  EXPECT_EQ(cudaStreamWaitEvent(side_, forked_), cudaErrorStreamCaptureMerge);
  expect_end(cudaErrorStreamCaptureInvalidated);
  EXPECT_EQ(cudaStreamEndCapture(side_, &graph), cudaErrorStreamCaptureInvalidated);
}

// A thread that is relaxed may make unsafe calls within a capture, and beside another thread's; others may not.
TEST_F(CudaSimCapture, AThreadIsRelaxed) {
  const auto allocate = [] {
    void* pointer;
    const cudaError_t error = cudaMalloc(&pointer, 4);
    if (error == cudaSuccess) expect_success(cudaFree(pointer));
    return error;
  };
  const auto allocate_elsewhere = [&](cudaStreamCaptureMode mode) {
    return std::async(std::launch::async,
                      [&, mode]() mutable {
                        expect_success(cudaThreadExchangeStreamCaptureMode(&mode));
                        EXPECT_EQ(mode, cudaStreamCaptureModeGlobal);
                        return allocate();
                      })
        .get();
  };
  begin();
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  expect_success(cudaThreadExchangeStreamCaptureMode(&mode));
  EXPECT_EQ(mode, cudaStreamCaptureModeGlobal);
  expect_success(allocate());
  for (const auto other : {cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed}) {
    expect_success(allocate_elsewhere(other));
  }
  expect_success(cudaThreadExchangeStreamCaptureMode(&mode));
  EXPECT_EQ(mode, cudaStreamCaptureModeRelaxed);
  launch_graph(1);
  for (const auto& call :
       {std::function(allocate), std::function([&] { return allocate_elsewhere(cudaStreamCaptureModeGlobal); })}) {
    begin();
    EXPECT_EQ(call(), cudaErrorStreamCaptureUnsupported);
    expect_end(cudaErrorStreamCaptureInvalidated);
  }
}

// The null stream would wait for a blocking one, which is not there to be waited for.
TEST_F(CudaSimCapture, TheNullStream) {
  const cudaStream_t blocking = make_stream(cudaStreamDefault);
  begin();
  expect_success(launch(add, 1, 1, nullptr, memory_, 1.0f));
  expect_success(cudaStreamBeginCapture(blocking, cudaStreamCaptureModeGlobal));
  EXPECT_EQ(launch(add, 1, 1, nullptr, memory_, 1.0f), cudaErrorStreamCaptureImplicit);
  cudaGraph_t graph;
  EXPECT_EQ(cudaStreamEndCapture(blocking, &graph), cudaErrorStreamCaptureInvalidated);
  launch_graph(1);
  expect_success(cudaStreamDestroy(blocking));
}

}  // namespace
}  // namespace pissa::test
