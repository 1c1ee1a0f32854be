// The simulated runtime: memory that the host cannot touch, work that waits, failures that a test asks for; and that
// mistakes with them show.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <set>
#include <thread>
#include <vector>

#include "cuda_runtime.h"
#include "support/cuda_sim_case.h"

namespace pissa::test {
namespace {

__global__ void add(float* to, float value, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] += value;
}

__global__ void copy_all(float* to, const float* from) { to[threadIdx.x] = from[threadIdx.x]; }

__global__ void write_one(unsigned char* to, int index) { to[index] = 0; }
__global__ void read_one(float* to, const float* from, int index) { to[0] = from[index]; }

cudaStream_t make_stream() {
  cudaStream_t stream;
  expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

cudaEvent_t make_event() {
  cudaEvent_t event;
  expect_success(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

TEST_F(CudaSimTest, FreshMemoryIsNaN) {
  float* memory = device_memory<float>(5);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 256, 0u);
  for (const float value : download(memory, 5)) EXPECT_TRUE(std::isnan(value));
  expect_success(cudaFree(memory));
}

TEST_F(CudaSimTest, MemoryIsCounted) {
  const std::size_t before = cuda_sim::bytes_in_use();
  cuda_sim::reset_peak_bytes();
  char* first = device_memory<char>(1000);
  expect_success(cudaFreeAsync(first, nullptr));
  char* second;
  expect_success(cudaMallocAsync(&second, 300, nullptr));
  EXPECT_EQ(cuda_sim::bytes_in_use(), before + 300);
  EXPECT_EQ(cuda_sim::peak_bytes(), before + 1000);
  EXPECT_EQ(cudaFree(first), cudaErrorInvalidValue);
  expect_success(cudaFree(second));
  expect_success(cudaFree(nullptr));
  EXPECT_EQ(cuda_sim::bytes_in_use(), before);
}

TEST_F(CudaSimTest, MemoryIsUsedAgainButNotAtOnce) {
  std::set<char*> places;
  for (int i = 0; i < 10; ++i) {
    char* memory = device_memory<char>(5 << 20);
    const bool is_new = places.insert(memory).second;
    EXPECT_TRUE(is_new || i >= 3);
    expect_success(cudaFree(memory));
  }
  EXPECT_LT(places.size(), 10u);
}

TEST_F(CudaSimTest, WhereMemoryIsShortQueuedFreesMakeRoom) {
  expect_success(cudaDeviceSynchronize());
  cuda_sim::set_memory(cuda_sim::bytes_in_use() + 1000);
  std::size_t free, total;
  expect_success(cudaMemGetInfo(&free, &total));
  EXPECT_EQ(free, 1000u);
  void* memory;
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(cudaMallocAsync(&memory, 600, nullptr), cudaSuccess);
    ASSERT_EQ(cudaFreeAsync(memory, nullptr), cudaSuccess);
  }
  EXPECT_EQ(cudaMalloc(&memory, 1001), cudaErrorMemoryAllocation);
  EXPECT_EQ(memory, nullptr);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  cuda_sim::set_memory(std::size_t{1} << 30);
  EXPECT_EQ(cudaMalloc(&memory, std::size_t{2} << 30), cudaErrorMemoryAllocation);
}

TEST_F(CudaSimTest, HostCannotTouchIt) {
  volatile float* memory = device_memory<float>(5);
  EXPECT_DEATH(memory[0] = 1, "");
  EXPECT_DEATH(std::exit(memory[0] == 1), "");
}

TEST_F(CudaSimTest, WriteBehindTheEnd) {
  for (const int bytes : {1, 8, 100, 256, 1000}) {
    auto* memory = device_memory<unsigned char>(bytes);
    run(write_one, 1, 1, memory, bytes - 1);
    EXPECT_DEATH(run(write_one, 1, 1, memory, bytes), kUnderAsan ? "use-after-poison" : "outside of what is allocated");
    EXPECT_DEATH(run(write_one, 1, 1, memory, -1), kUnderAsan ? "use-after-poison" : "outside of what is allocated");
  }
}

#ifdef __SANITIZE_ADDRESS__
TEST_F(CudaSimTest, ReadBehindTheEnd) {
  float* memory = device_memory<float>(3);
  EXPECT_DEATH(run(read_one, 1, 1, memory, memory, 3), "use-after-poison");
}
#endif

TEST_F(CudaSimTest, UseAfterFree) {
  float* memory = device_memory<float>(3);
  float* to = device_memory<float>(1);
  expect_success(cudaFree(memory));
  EXPECT_EQ(cudaMemsetAsync(memory, 0, 4), cudaErrorInvalidValue);
  if (kUnderAsan) {
    EXPECT_DEATH(run(read_one, 1, 1, to, memory, 0), "use-after-poison");
  }
}

TEST_F(CudaSimTest, Pointers) {
  float* memory = device_memory<float>(3);
  cudaPointerAttributes attributes;
  expect_success(cudaPointerGetAttributes(&attributes, memory + 2));
  EXPECT_EQ(attributes.type, cudaMemoryTypeDevice);
  expect_success(cudaPointerGetAttributes(&attributes, memory + 3));
  EXPECT_EQ(attributes.type, cudaMemoryTypeUnregistered);
  expect_success(cudaPointerGetAttributes(&attributes, &attributes));
  EXPECT_EQ(attributes.type, cudaMemoryTypeUnregistered);
  float host[3];
  EXPECT_EQ(cudaMemcpy(host, memory, 13, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(host, memory, 12, cudaMemcpyHostToDevice), cudaErrorInvalidMemcpyDirection);
  expect_success(cudaMemcpy(host, memory, 12, cudaMemcpyDefault));
}

// ---- Streams --------------------------------------------------------------------------------------------------------

TEST_F(CudaSimTest, WorkWaitsUntilItIsWaitedFor) {
  const cudaStream_t stream = make_stream();
  float* memory = upload(std::vector<float>{1, 2});
  expect_success(cudaDeviceSynchronize());
  std::vector<float> host{10, 20};
  expect_success(cudaMemcpyAsync(memory, host.data(), 8, cudaMemcpyHostToDevice, stream));
  host = {0, 0};  // the copy has taken them
  expect_success(launch(add, 1, 32, stream, memory, 5.0f, 2));
  expect_success(cudaMemcpyAsync(host.data(), memory, 8, cudaMemcpyDeviceToHost, stream));
  EXPECT_EQ(host, (std::vector<float>{0, 0}));
  EXPECT_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
  expect_success(cudaStreamSynchronize(stream));
  EXPECT_EQ(host, (std::vector<float>{15, 25}));
  expect_success(cudaStreamQuery(stream));
  expect_success(cudaStreamDestroy(stream));
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
}

TEST_F(CudaSimTest, StreamsNeedAnEvent) {
  for (const bool with_event : {false, true}) {
    const cudaStream_t producer = make_stream(), consumer = make_stream();
    const cudaEvent_t ready = make_event();
    float* from = upload(std::vector<float>{0, 0});
    float* to = device_memory<float>(2);
    expect_success(cudaDeviceSynchronize());
    expect_success(launch(add, 1, 32, producer, from, 7.0f, 2));
    expect_success(cudaEventRecord(ready, producer));
    if (with_event) expect_success(cudaStreamWaitEvent(consumer, ready));
    expect_success(cudaEventDestroy(ready));  // what waits for it still does
    expect_success(launch(copy_all, 1, 2, consumer, to, static_cast<const float*>(from)));
    std::vector<float> result(2);
    expect_success(cudaMemcpyAsync(result.data(), to, 8, cudaMemcpyDeviceToHost, consumer));
    expect_success(cudaStreamSynchronize(consumer));
    EXPECT_EQ(result, std::vector<float>(2, with_event ? 7.0f : 0.0f));
    expect_success(cudaStreamDestroy(producer));
    expect_success(cudaStreamDestroy(consumer));
  }
}

TEST_F(CudaSimTest, AnEventRunsItsStreamThatFarAndNoFurther) {
  const cudaStream_t stream = make_stream();
  const cudaEvent_t between = make_event();
  expect_success(cudaEventSynchronize(between));  // never recorded: nothing to wait for
  float* memory = upload(std::vector<float>{0});
  expect_success(cudaDeviceSynchronize());
  std::vector<float> first(1), second(1);
  expect_success(launch(add, 1, 32, stream, memory, 1.0f, 1));
  expect_success(cudaMemcpyAsync(first.data(), memory, 4, cudaMemcpyDeviceToHost, stream));
  expect_success(cudaEventRecord(between, stream));
  expect_success(launch(add, 1, 32, stream, memory, 1.0f, 1));
  expect_success(cudaMemcpyAsync(second.data(), memory, 4, cudaMemcpyDeviceToHost, stream));
  EXPECT_EQ(cudaEventQuery(between), cudaErrorNotReady);
  expect_success(cudaEventSynchronize(between));
  EXPECT_EQ(first[0], 1);
  EXPECT_EQ(second[0], 0);
  expect_success(cudaDeviceSynchronize());
  EXPECT_EQ(second[0], 2);
  expect_success(cudaEventDestroy(between));
  expect_success(cudaStreamDestroy(stream));
}

TEST_F(CudaSimTest, EventsMeasureTime) {
  cudaEvent_t start, end;
  float elapsed = -1;
  expect_success(cudaEventCreate(&start));
  expect_success(cudaEventCreate(&end));
  EXPECT_EQ(cudaEventElapsedTime(&elapsed, start, end), cudaErrorInvalidResourceHandle);
  expect_success(cudaEventRecord(start));
  expect_success(cudaEventRecord(end));
  EXPECT_EQ(cudaEventElapsedTime(&elapsed, start, end), cudaErrorNotReady);
  expect_success(cudaEventSynchronize(end));
  expect_success(cudaEventElapsedTime(&elapsed, start, end));
  EXPECT_GE(elapsed, 0);
  expect_success(cudaEventDestroy(start));
  expect_success(cudaEventDestroy(end));
}

TEST_F(CudaSimTest, TheNullStreamIsOrderedWithBlockingOnes) {
  cudaStream_t blocking;
  expect_success(cudaStreamCreate(&blocking));
  float* memory = upload(std::vector<float>{0});
  expect_success(launch(add, 1, 32, blocking, memory, 1.0f, 1));  // after the copy of upload()
  float result;
  expect_success(cudaMemcpy(&result, memory, 4, cudaMemcpyDeviceToHost));
  EXPECT_EQ(result, 1);
  expect_success(cudaStreamDestroy(blocking));
}

TEST_F(CudaSimTest, WorkOfADestroyedStreamStillRuns) {
  const cudaStream_t stream = make_stream();
  float* memory = upload(std::vector<float>{0});
  expect_success(cudaDeviceSynchronize());
  expect_success(launch(add, 1, 32, stream, memory, 1.0f, 1));
  expect_success(cudaStreamDestroy(stream));
  EXPECT_EQ(download(memory, 1)[0], 1);
}

TEST_F(CudaSimTest, AsynchronousFreeIsInOrder) {
  const cudaStream_t stream = make_stream();
  float* memory;
  expect_success(cudaMallocAsync(&memory, 4, stream));
  expect_success(cudaMemsetAsync(memory, 0, 4, stream));
  float result = 1;
  expect_success(cudaMemcpyAsync(&result, memory, 4, cudaMemcpyDeviceToHost, stream));
  expect_success(cudaFreeAsync(memory, stream));
  EXPECT_EQ(cudaFreeAsync(memory, stream), cudaErrorInvalidValue);
  expect_success(cudaStreamSynchronize(stream));
  EXPECT_EQ(result, 0);
  expect_success(cudaStreamDestroy(stream));
}

TEST_F(CudaSimTest, ThreadsOfTheHostHaveTheirOwnStreams) {
  const auto use = [](float start, float* result) {
    const cudaStream_t stream = make_stream();
    float* memory;
    expect_success(cudaMallocAsync(&memory, 4, stream));
    expect_success(cudaMemcpyAsync(memory, &start, 4, cudaMemcpyHostToDevice, stream));
    for (int i = 0; i < 50; ++i) {
      expect_success(launch(add, 2, 64, stream, memory, 1.0f, 1));
      expect_success(cudaMemcpyAsync(result, memory, 4, cudaMemcpyDeviceToHost, stream));
      expect_success(cudaStreamSynchronize(stream));
    }
    expect_success(cudaFreeAsync(memory, stream));
    expect_success(cudaStreamDestroy(stream));
  };
  float first = 0, second = 0;
  std::thread other(use, 100.0f, &first);
  use(200.0f, &second);
  other.join();
  EXPECT_EQ(first, 150);
  EXPECT_EQ(second, 250);
  expect_success(cudaDeviceSynchronize());
}

// ---- Counts and failures --------------------------------------------------------------------------------------------

TEST_F(CudaSimTest, Counts) {
  float* memory = upload(std::vector<float>{0});
  const cudaEvent_t event = make_event();
  cuda_sim::reset_launches();
  cuda_sim::reset_synchronizations();
  expect_success(launch(add, 1, 32, nullptr, memory, 1.0f, 1));
  expect_success(launch(add, 1, 32, nullptr, memory, 1.0f, 1));
  EXPECT_EQ(cuda_sim::launches(), 2);
  EXPECT_EQ(cuda_sim::synchronizations(), 0);
  expect_success(cudaStreamSynchronize(nullptr));
  expect_success(cudaDeviceSynchronize());
  expect_success(cudaEventSynchronize(event));
  float result;
  expect_success(cudaMemcpy(&result, memory, 4, cudaMemcpyDeviceToHost));
  EXPECT_EQ(cuda_sim::synchronizations(), 4);
  expect_success(cudaEventDestroy(event));
}

TEST_F(CudaSimTest, Failures) {
  float* memory = upload(std::vector<float>{0});
  cuda_sim::fail_next(cudaErrorLaunchFailure);
  EXPECT_TRUE(cuda_sim::failure_pending());
  EXPECT_EQ(launch(add, 1, 32, nullptr, memory, 1.0f, 1), cudaErrorLaunchFailure);
  EXPECT_EQ(cudaPeekAtLastError(), cudaErrorLaunchFailure);
  EXPECT_FALSE(cuda_sim::failure_pending());
  cuda_sim::fail_next(cudaErrorMemoryAllocation, 1);
  expect_success(cudaMemsetAsync(memory, 0, 4));
  void* pointer;
  EXPECT_EQ(cudaMalloc(&pointer, 4), cudaErrorMemoryAllocation);
  cuda_sim::fail_next(cudaErrorUnknown);
  expect_success(cudaFree(memory));  // does not count
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorUnknown);
}

TEST_F(CudaSimTest, Launches) {
  float* memory = device_memory<float>(1);
  EXPECT_EQ(launch(add, 0, 32, nullptr, memory, 1.0f, 1), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(add, dim3(1, 65536), 32, nullptr, memory, 1.0f, 1), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(add, 1, dim3(1, 1, 65), nullptr, memory, 1.0f, 1), cudaErrorInvalidConfiguration);
}

TEST_F(CudaSimTest, Device) {
  int value = 0;
  cuda_sim::set_compute_capability(8, 6);
  expect_success(cudaDeviceGetAttribute(&value, cudaDevAttrComputeCapabilityMajor, 0));
  EXPECT_EQ(value, 8);
  cuda_sim::set_compute_capability(9, 0);
  expect_success(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0));
  EXPECT_EQ(value, 132);
  EXPECT_EQ(cudaSetDevice(2), cudaErrorInvalidDevice);
  EXPECT_STREQ(cudaGetErrorName(cudaErrorInvalidDevice), "cudaErrorInvalidDevice");
}

}  // namespace
}  // namespace pissa::test
