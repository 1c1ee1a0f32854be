// What the tests of the simulated CUDA share: numbers to the device and back, launches.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "cuda_runtime.h"

namespace pissa::test {

#ifdef __SANITIZE_ADDRESS__
inline constexpr bool kUnderAsan = true;
#else
inline constexpr bool kUnderAsan = false;
#endif

inline void expect_success(cudaError_t error) { EXPECT_EQ(error, cudaSuccess) << cudaGetErrorName(error); }

template <class T>
T* device_memory(std::size_t count) {
  T* result = nullptr;
  expect_success(cudaMallocAsync(&result, count * sizeof(T), nullptr));
  return result;
}

template <class T>
T* upload(const std::vector<T>& values) {
  T* result = device_memory<T>(values.size());
  expect_success(cudaMemcpyAsync(result, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return result;
}

/// Waits for everything first.
template <class T>
std::vector<T> download(const T* from, std::size_t count) {
  expect_success(cudaDeviceSynchronize());
  std::vector<T> result(count);
  expect_success(cudaMemcpyAsync(result.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost));
  expect_success(cudaStreamSynchronize(nullptr));
  return result;
}

template <class... ExpTypes, class... ActTypes>
cudaError_t launch(void (*kernel)(ExpTypes...), dim3 grid, dim3 block, cudaStream_t stream, ActTypes... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

inline cudaStream_t make_stream() {
  cudaStream_t stream;
  expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

inline cudaEvent_t make_event() {
  cudaEvent_t event;
  expect_success(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

/// Launches and waits.
template <class... ExpTypes, class... ActTypes>
void run(void (*kernel)(ExpTypes...), dim3 grid, dim3 block, ActTypes... args) {
  expect_success(launch(kernel, grid, block, nullptr, args...));
  expect_success(cudaDeviceSynchronize());
}

/// A test whose death tests run in a fresh process: sanitizers see less after a fork.
class CudaSimTest : public ::testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
  void TearDown() override {
    cuda_sim::clear_failures();
    cuda_sim::reset_libraries();
    cuda_sim::set_dry(false);
    cudaSetDevice(0);
  }
};

}  // namespace pissa::test
