// The simulated runtime: memory that the host cannot touch, work that waits, two devices, a ledger of calls; and that
// mistakes with them show. That its counts and its failures are right, the tests of the backend need.
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

__global__ void add(float* to, float value) { to[threadIdx.x] += value; }
__global__ void copy_all(float* to, const float* from) { to[threadIdx.x] = from[threadIdx.x]; }
__global__ void write_one(unsigned char* to, int index) { to[index] = 0; }

// ---- Memory ---------------------------------------------------------------------------------------------------------

TEST_F(CudaSimTest, FreshMemoryIsAlignedAndNaN) {
  float* memory = device_memory<float>(5);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 256, 0u);
  for (const float value : download(memory, 5)) EXPECT_TRUE(std::isnan(value));
}

TEST_F(CudaSimTest, MemoryIsCounted) {
  const std::size_t before = cuda_sim::bytes_in_use();
  cuda_sim::reset_peak_bytes();
  char* memory = device_memory<char>(1000);
  expect_success(cudaFreeAsync(memory, nullptr));
  memory = device_memory<char>(300);
  EXPECT_EQ(cuda_sim::bytes_in_use(), before + 300);
  EXPECT_EQ(cuda_sim::peak_bytes(), before + 1000);
  expect_success(cudaFreeAsync(memory, nullptr));
  expect_success(cudaFreeAsync(nullptr, nullptr));
  EXPECT_EQ(cuda_sim::bytes_in_use(), before);
}

TEST_F(CudaSimTest, MemoryIsUsedAgainButNotAtOnce) {
  std::set<char*> places;
  for (int i = 0; i < 10; ++i) {
    char* memory = device_memory<char>(5 << 20);
    const bool is_new = places.insert(memory).second;
    EXPECT_TRUE(is_new || i >= 3);
    expect_success(cudaFreeAsync(memory, nullptr));
    expect_success(cudaStreamSynchronize(nullptr));
  }
  EXPECT_LT(places.size(), 10u);
}

TEST_F(CudaSimTest, TheHostCannotTouchIt) {
  volatile float* memory = device_memory<float>(5);
  EXPECT_DEATH(std::exit(memory[0] == 1), "");
}

TEST_F(CudaSimTest, WritesBesideIt) {
  for (const int bytes : {1, 256}) {
    auto* memory = device_memory<unsigned char>(bytes);
    run(write_one, 1, 1, memory, bytes - 1);
    for (const int outside : {bytes, -1}) {
      EXPECT_DEATH(run(write_one, 1, 1, memory, outside), kUnderAsan ? "use-after-poison" : "outside of what is alloc");
    }
  }
}

TEST_F(CudaSimTest, ReadsOfWhatIsNoMemory) {
  float* memory = device_memory<float>(3);
  float* freed = device_memory<float>(3);
  expect_success(cudaFreeAsync(freed, nullptr));
  if (kUnderAsan) {
    EXPECT_DEATH(run(copy_all, 1, 4, device_memory<float>(4), static_cast<const float*>(memory)), "use-after-poison");
    EXPECT_DEATH(run(copy_all, 1, 3, memory, static_cast<const float*>(freed)), "use-after-poison");
  }
}

// ---- What is refused ------------------------------------------------------------------------------------------------

TEST_F(CudaSimTest, WhatIsRefused) {
  float *memory = device_memory<float>(3), *freed = device_memory<float>(3), *none;
  expect_success(cudaFreeAsync(freed, nullptr));
  EXPECT_EQ(cudaFreeAsync(freed, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFreeAsync(memory + 1, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(freed, 0, 4), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemsetAsync(memory, 0, 13), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMallocAsync(&none, std::size_t{2} << 30, nullptr), cudaErrorMemoryAllocation);
  EXPECT_EQ(none, nullptr);
  float host[4];
  EXPECT_EQ(cudaMemcpyAsync(host, memory, 13, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpyAsync(host, memory, 12, cudaMemcpyHostToDevice), cudaErrorInvalidMemcpyDirection);
  cudaPointerAttributes attributes;
  for (const void* pointer : {static_cast<void*>(memory + 3), static_cast<void*>(freed), static_cast<void*>(host)}) {
    expect_success(cudaPointerGetAttributes(&attributes, pointer));
    EXPECT_EQ(attributes.type, cudaMemoryTypeUnregistered);
  }
  cudaStream_t stream;
  EXPECT_EQ(cudaStreamCreateWithFlags(&stream, 0), cudaErrorInvalidValue);
  EXPECT_EQ(cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(host)), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaEventRecord(reinterpret_cast<cudaEvent_t>(host)), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(launch(add, 0, 32, nullptr, memory, 1.0f), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(add, dim3(1, 65536), 32, nullptr, memory, 1.0f), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(add, 1, dim3(1, 1, 65), nullptr, memory, 1.0f), cudaErrorInvalidConfiguration);
  EXPECT_DEATH(run(add, 1, 1025, memory, 1.0f), "more than 1024");
}

// ---- Dependent launches --------------------------------------------------------------------------------------------

__global__ void copy_after_waiting(float* to, const float* from) {
  cuda_sim::prefetch(from);
  cuda_sim::wait_for_earlier_kernels();
  to[threadIdx.x] = from[threadIdx.x];
}
__global__ void end_without_waiting(float*, const float*) {
  if (threadIdx.x > 0) cuda_sim::wait_for_earlier_kernels();
}
__global__ void load_before_waiting(float* to, const float* from) {
  const float value = from[threadIdx.x];
  cuda_sim::wait_for_earlier_kernels();
  to[threadIdx.x] = value;
}
__global__ void store_before_waiting(float* to, const float*) {
  to[threadIdx.x] = 1.0f;
  cuda_sim::wait_for_earlier_kernels();
}

template <class Kernel>
cudaError_t launch_dependent(Kernel kernel, float* to, const float* from) {
  cudaLaunchAttribute attribute{cudaLaunchAttributeProgrammaticStreamSerialization, {1}};
  cudaLaunchConfig_t config{};
  config.gridDim = config.blockDim = dim3(2);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, to, from);
}

TEST_F(CudaSimTest, ADependentLaunchFollowsTheKernelBeforeIt) {
  float *from = upload(std::vector<float>{1, 2}), *to = device_memory<float>(2);
  expect_success(launch(add, 1, 2, nullptr, from, 5.0f));
  expect_success(launch_dependent(copy_after_waiting, to, from));
  EXPECT_EQ(download(to, 2), (std::vector<float>{6, 7}));
  cuda_sim::set_compute_capability(8, 9);
  EXPECT_EQ(launch_dependent(copy_after_waiting, to, from), cudaErrorNotSupported);
  cuda_sim::set_compute_capability(9, 0);
}

TEST_F(CudaSimTest, WhatADependentLaunchMayNotDo) {
  float *from = upload(std::vector<float>{1, 2, 3, 4}), *to = device_memory<float>(4);
  expect_success(cudaDeviceSynchronize());
  const auto run = [&](auto kernel, const float* source) {
    launch_dependent(kernel, to, source);
    cudaDeviceSynchronize();
  };
  EXPECT_DEATH(run(end_without_waiting, from), "does not wait");
  EXPECT_DEATH(run(load_before_waiting, from), "");
  EXPECT_DEATH(run(store_before_waiting, from), "");
  EXPECT_DEATH(run(copy_after_waiting, from - 1), "prefetch touches");
}

// The next call that can fail, or one after it; what frees is not counted.
TEST_F(CudaSimTest, OneCallFailsAndDoesNothing) {
  float *memory = upload(std::vector<float>{0}), *other = device_memory<float>(1);
  cuda_sim::fail_next(cudaErrorLaunchFailure, 1);
  expect_success(cudaStreamSynchronize(nullptr));
  expect_success(cudaFreeAsync(other, nullptr));
  EXPECT_TRUE(cuda_sim::failure_pending());
  EXPECT_EQ(launch(add, 1, 1, nullptr, memory, 1.0f), cudaErrorLaunchFailure);
  EXPECT_FALSE(cuda_sim::failure_pending());
  EXPECT_EQ(download(memory, 1)[0], 0);
}

// ---- Streams --------------------------------------------------------------------------------------------------------

TEST_F(CudaSimTest, WorkWaitsUntilItIsWaitedFor) {
  const cudaStream_t stream = make_stream();
  float* memory;
  expect_success(cudaMallocAsync(&memory, 8, stream));
  std::vector<float> host{10, 20};
  expect_success(cudaMemcpyAsync(memory, host.data(), 8, cudaMemcpyHostToDevice, stream));
  host = {0, 0};  // the copy has taken them
  expect_success(launch(add, 1, 2, stream, memory, 5.0f));
  expect_success(cudaMemcpyAsync(host.data(), memory, 8, cudaMemcpyDeviceToHost, stream));
  expect_success(cudaFreeAsync(memory, stream));
  expect_success(cudaStreamSynchronize(nullptr));
  EXPECT_EQ(host, (std::vector<float>{0, 0}));
  EXPECT_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
  expect_success(cudaStreamSynchronize(stream));
  EXPECT_EQ(host, (std::vector<float>{15, 25}));
  expect_success(cudaStreamQuery(stream));
}

// An event is what its stream had before it, whatever follows and however often it is recorded again.
TEST_F(CudaSimTest, StreamsNeedAnEvent) {
  for (const bool with_event : {false, true}) {
    const cudaStream_t producer = make_stream(), consumer = make_stream();
    const cudaEvent_t ready = make_event();
    float* from = upload(std::vector<float>{0, 0});
    float* to = device_memory<float>(2);
    expect_success(cudaDeviceSynchronize());
    expect_success(cudaStreamWaitEvent(consumer, ready));  // never recorded: nothing to wait for
    expect_success(launch(add, 1, 2, producer, from, 7.0f));
    expect_success(cudaEventRecord(ready, producer));
    if (with_event) expect_success(cudaStreamWaitEvent(consumer, ready));
    expect_success(launch(add, 1, 2, producer, from, 100.0f));
    expect_success(cudaEventRecord(ready, producer));
    expect_success(launch(copy_all, 1, 2, consumer, to, static_cast<const float*>(from)));
    std::vector<float> result(2);
    expect_success(cudaMemcpyAsync(result.data(), to, 8, cudaMemcpyDeviceToHost, consumer));
    expect_success(cudaStreamSynchronize(consumer));
    EXPECT_EQ(result, std::vector<float>(2, with_event ? 7.0f : 0.0f));
  }
}

// ---- Two devices ----------------------------------------------------------------------------------------------------

TEST_F(CudaSimTest, EachThreadHasItsCurrentDevice) {
  int here = -1, there = -1;
  EXPECT_EQ(cudaSetDevice(2), cudaErrorInvalidDevice);
  expect_success(cudaSetDevice(1));
  std::thread([&] { cudaGetDevice(&there); }).join();
  expect_success(cudaGetDevice(&here));
  EXPECT_EQ(here, 1);
  EXPECT_EQ(there, 0);
}

// As CUDA's programming guide has it: launches and events fail, copies and waits do not.
TEST_F(CudaSimTest, AStreamOfAnotherDevice) {
  expect_success(cudaSetDevice(1));
  const cudaStream_t stream = make_stream();
  float* memory = upload(std::vector<float>{1, 2});
  expect_success(cudaDeviceSynchronize());
  expect_success(launch(add, 1, 2, stream, memory, 1.0f));
  expect_success(cudaSetDevice(0));
  EXPECT_EQ(launch(add, 1, 2, stream, memory, 1.0f), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaMemsetAsync(memory, 0, 8, stream), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaEventRecord(make_event(), stream), cudaErrorInvalidResourceHandle);
  std::vector<float> host(2);
  expect_success(cudaMemcpyAsync(host.data(), memory, 8, cudaMemcpyDeviceToHost, stream));
  expect_success(cudaDeviceSynchronize());
  EXPECT_EQ(host[0], 0) << "the current device is another";
  expect_success(cudaStreamSynchronize(stream));
  EXPECT_EQ(host, (std::vector<float>{2, 3}));
  EXPECT_DEATH(run(add, 1, 1, memory, 1.0f), "");
}

// ---- The ledger, and the mode in which it is all that is done ------------------------------------------------------

TEST_F(CudaSimTest, Ledger) {
  using cuda_sim::Entry, cuda_sim::Kind;
  cuda_sim::reset_ledger();
  float* memory = device_memory<float>(32);
  float host[32] = {};
  expect_success(cudaMemcpyAsync(memory, host, 128, cudaMemcpyHostToDevice));
  expect_success(launch(add, dim3(2, 3), 32, nullptr, memory, 1.0f));
  expect_success(cudaMemcpyAsync(host, memory, 12, cudaMemcpyDeviceToHost));
  expect_success(cudaStreamSynchronize(nullptr));
  EXPECT_EQ(cudaMemsetAsync(memory, 0, 129), cudaErrorInvalidValue);
  void* const kernel = reinterpret_cast<void*>(add);
  const std::vector<Entry> expected = {
      {.kind = Kind::allocation, .name = "cudaMallocAsync", .bytes = 128},
      {.kind = Kind::copy_to_device, .name = "cudaMemcpyAsync", .bytes = 128},
      {.kind = Kind::launch, .name = "cudaLaunchKernelEx", .kernel = kernel, .grid = {2, 3, 1}, .block = {32, 1, 1}},
      {.kind = Kind::copy_to_host, .name = "cudaMemcpyAsync", .bytes = 12},
      {.kind = Kind::wait, .name = "cudaStreamSynchronize"}};
  EXPECT_TRUE(cuda_sim::ledger() == expected);
}

TEST_F(CudaSimTest, DryNothingIsComputed) {
  float* before = upload(std::vector<float>(32, 5.0f));
  expect_success(launch(add, 1, 32, nullptr, before, 1.0f));  // runs when the mode changes
  cuda_sim::set_dry(true);
  expect_success(launch(add, 1, 32, nullptr, before, 1.0f));
  expect_success(cudaMemsetAsync(before, 0, 8));
  float* memory = device_memory<float>(32);
  std::vector<float> host(32, 3.0f);
  expect_success(cudaMemcpyAsync(memory, host.data(), 128, cudaMemcpyHostToDevice));
  expect_success(cudaMemcpyAsync(host.data(), memory, 124, cudaMemcpyDeviceToHost));
  EXPECT_EQ(host[0], 3.0f) << "not before it is waited for";
  expect_success(cudaStreamSynchronize(nullptr));
  EXPECT_EQ(host[30], 0.0f);
  EXPECT_EQ(host[31], 3.0f);
  EXPECT_EQ(cudaMemsetAsync(memory, 0, 129), cudaErrorInvalidValue) << "calls are checked";
  expect_success(cudaFreeAsync(memory, nullptr));
  EXPECT_EQ(cudaMemsetAsync(memory, 0, 4), cudaErrorInvalidValue);
  cuda_sim::set_dry(false);
  for (const float value : download(before, 32)) EXPECT_EQ(value, 6.0f);
}

// More than this machine has; and what is freed in the queue makes room.
TEST_F(CudaSimTest, DryMemoryIsAddresses) {
  const std::size_t gigabyte = std::size_t{1} << 30, in_use = cuda_sim::bytes_in_use();
  cuda_sim::set_dry(true);
  EXPECT_EQ(cuda_sim::bytes_in_use(), 0u);
  char *first = device_memory<char>(40 * gigabyte), *second = device_memory<char>(30 * gigabyte);
  EXPECT_TRUE(second >= first + 40 * gigabyte || second + 30 * gigabyte <= first);
  std::size_t free, total;
  expect_success(cudaMemGetInfo(&free, &total));
  EXPECT_EQ(free, 10 * gigabyte);
  EXPECT_EQ(total, 80 * gigabyte);
  void* more;
  EXPECT_EQ(cudaMallocAsync(&more, 11 * gigabyte, nullptr), cudaErrorMemoryAllocation);
  expect_success(cudaFreeAsync(first, nullptr));
  expect_success(cudaMallocAsync(&more, 45 * gigabyte, nullptr));
  EXPECT_EQ(cuda_sim::peak_bytes(), 75 * gigabyte);
  for (void* memory : {more, static_cast<void*>(second)}) expect_success(cudaFreeAsync(memory, nullptr));
  cuda_sim::set_dry(false);
  EXPECT_EQ(cuda_sim::bytes_in_use(), in_use) << "of the mode that is set";
}

}  // namespace
}  // namespace pissa::test
