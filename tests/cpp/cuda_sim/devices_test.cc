// The two simulated devices: each thread has a current one, and what belongs to the other is refused or found.
#include <gtest/gtest.h>

#include <cstdint>
#include <thread>
#include <vector>

#include "cublasLt.h"
#include "cusolverDn.h"
#include "support/cuda_sim_case.h"

namespace pissa::test {
namespace {

__global__ void add_one(float* to) { to[threadIdx.x] += 1; }

class CudaSimDevices : public CudaSimTest {
 protected:
  void TearDown() override {
    cudaSetDevice(0);
    CudaSimTest::TearDown();
  }
  static cudaStream_t stream_on(int device) {
    expect_success(cudaSetDevice(device));
    cudaStream_t stream;
    expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
};

TEST_F(CudaSimDevices, AreTwo) {
  int count = 0, value = -1;
  expect_success(cudaGetDeviceCount(&count));
  EXPECT_EQ(count, 2);
  expect_success(cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 1));
  EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 2), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaSetDevice(-1), cudaErrorInvalidDevice);
}

TEST_F(CudaSimDevices, EachThreadHasItsCurrentOne) {
  expect_success(cudaSetDevice(1));
  int here = -1, there = -1;
  std::thread([&] { cudaGetDevice(&there); }).join();
  expect_success(cudaGetDevice(&here));
  EXPECT_EQ(here, 1);
  EXPECT_EQ(there, 0);
}

TEST_F(CudaSimDevices, MemoryIsThatOfOne) {
  const std::size_t before = cuda_sim::bytes_in_use();
  const cudaStream_t stream = stream_on(1);
  float *memory, *ordered;
  expect_success(cudaMalloc(&memory, 256));
  expect_success(cudaSetDevice(0));
  expect_success(cudaMallocAsync(&ordered, 256, stream));  // of the stream's device
  EXPECT_EQ(cuda_sim::bytes_in_use(), before);
  for (const float* pointer : {memory, ordered}) {
    cudaPointerAttributes attributes;
    expect_success(cudaPointerGetAttributes(&attributes, pointer));
    EXPECT_EQ(attributes.device, 1);
  }
  expect_success(cudaSetDevice(1));
  EXPECT_EQ(cuda_sim::bytes_in_use(), 512u);
  expect_success(cudaSetDevice(0));
  expect_success(cudaFree(memory));
  expect_success(cudaFreeAsync(ordered, stream));
  expect_success(cudaStreamDestroy(stream));
}

// As CUDA's programming guide has it: launches and events fail, copies and waits do not.
TEST_F(CudaSimDevices, AStreamOfAnother) {
  const cudaStream_t stream = stream_on(1);
  float* memory = upload(std::vector<float>{1, 2});
  expect_success(cudaDeviceSynchronize());
  expect_success(launch(add_one, 1, 2, stream, memory));
  expect_success(cudaSetDevice(0));
  EXPECT_EQ(launch(add_one, 1, 2, stream, memory), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaMemsetAsync(memory, 0, 8, stream), cudaErrorInvalidResourceHandle);
  cudaEvent_t event;
  expect_success(cudaEventCreate(&event));
  EXPECT_EQ(cudaEventRecord(event, stream), cudaErrorInvalidResourceHandle);
  std::vector<float> host(2);
  expect_success(cudaMemcpyAsync(host.data(), memory, 8, cudaMemcpyDeviceToHost, stream));
  expect_success(cudaDeviceSynchronize());
  EXPECT_EQ(host[0], 0) << "the current device is another";
  expect_success(cudaStreamSynchronize(stream));
  EXPECT_EQ(host, (std::vector<float>{2, 3}));
  expect_success(cudaEventDestroy(event));
  expect_success(cudaStreamDestroy(stream));
  expect_success(cudaFree(memory));
}

TEST_F(CudaSimDevices, EventsOrderAnothersWork) {
  const cudaStream_t first = stream_on(0), second = stream_on(1);
  expect_success(cudaSetDevice(0));
  float* from = upload(std::vector<float>{1});
  cudaEvent_t ready;
  expect_success(cudaEventCreate(&ready));
  expect_success(cudaDeviceSynchronize());
  expect_success(launch(add_one, 1, 1, first, from));
  expect_success(cudaEventRecord(ready, first));
  expect_success(cudaSetDevice(1));
  float* to = device_memory<float>(1);
  expect_success(cudaStreamWaitEvent(second, ready));
  expect_success(cudaMemcpyAsync(to, from, 4, cudaMemcpyDeviceToDevice, second));
  EXPECT_EQ(cudaStreamSynchronize(second), cudaSuccess);
  EXPECT_EQ(download(to, 1)[0], 2);
  for (float* memory : {from, to}) expect_success(cudaFree(memory));
  for (const cudaStream_t stream : {first, second}) expect_success(cudaStreamDestroy(stream));
  expect_success(cudaEventDestroy(ready));
}

TEST_F(CudaSimDevices, AKernelCannotTouchMemoryOfAnother) {
  expect_success(cudaSetDevice(1));
  float* memory = upload(std::vector<float>{1});
  expect_success(cudaDeviceSynchronize());
  expect_success(cudaSetDevice(0));
  EXPECT_DEATH(run(add_one, 1, 1, memory), "");
  expect_success(cudaFree(memory));
}

TEST_F(CudaSimDevices, HandlesAreForTheOneThatWasCurrent) {
  const cudaStream_t other = stream_on(0), stream = stream_on(1);
  cublasHandle_t blas;
  cusolverDnHandle_t solver;
  EXPECT_EQ(cublasCreate(&blas), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cusolverDnCreate(&solver), CUSOLVER_STATUS_SUCCESS);
  EXPECT_EQ(cublasSetStream(blas, other), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(cusolverDnSetStream(solver, other), CUSOLVER_STATUS_INVALID_VALUE);
  EXPECT_EQ(cublasSetStream(blas, stream), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cusolverDnSetStream(solver, stream), CUSOLVER_STATUS_SUCCESS);
  double* values = upload(std::vector<double>{4});
  double** pointers = upload(std::vector<double*>{values});
  int* info = device_memory<int>(1);
  const double one = 1;
  cublasLtMatmulDesc_t desc;
  cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_64F, CUDA_R_64F);
  cublasLtMatrixLayout_t layout;
  cublasLtMatrixLayoutCreate(&layout, CUDA_R_64F, 1, 1, 1);
  const auto solve = [&] {
    return cublasDtrsmBatched(blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, 1, 1,
                              &one, pointers, 1, pointers, 1, 1);
  };
  const auto factor = [&] { return cusolverDnDpotrfBatched(solver, CUBLAS_FILL_MODE_LOWER, 1, pointers, 1, info, 1); };
  const auto multiply = [&](cudaStream_t on) {
    return cublasLtMatmul(reinterpret_cast<cublasLtHandle_t>(blas), desc, &one, values, layout, values, layout, &one,
                          values, layout, values, layout, nullptr, nullptr, 0, on);
  };
  expect_success(cudaDeviceSynchronize());
  EXPECT_EQ(factor(), CUSOLVER_STATUS_SUCCESS);
  EXPECT_EQ(solve(), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(multiply(stream), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(multiply(other), CUBLAS_STATUS_EXECUTION_FAILED);
  expect_success(cudaStreamSynchronize(stream));
  EXPECT_EQ(download(values, 1)[0], 2) << "a root of 4 that became 1, and 1 + 1";
  expect_success(cudaSetDevice(0));
  EXPECT_EQ(factor(), CUSOLVER_STATUS_EXECUTION_FAILED);
  EXPECT_EQ(solve(), CUBLAS_STATUS_EXECUTION_FAILED);
  EXPECT_EQ(multiply(stream), CUBLAS_STATUS_EXECUTION_FAILED);
  cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(desc);
  cublasDestroy(blas);
  cusolverDnDestroy(solver);
}

TEST_F(CudaSimDevices, ALibraryCannotTouchMemoryOfAnother) {
  expect_success(cudaSetDevice(1));
  double* values = upload(std::vector<double>{4});
  expect_success(cudaDeviceSynchronize());
  expect_success(cudaSetDevice(0));
  double** pointers = upload(std::vector<double*>{values});
  int* info = device_memory<int>(1);
  cusolverDnHandle_t solver;
  cusolverDnCreate(&solver);
  const auto factor = [&] {
    cusolverDnDpotrfBatched(solver, CUBLAS_FILL_MODE_LOWER, 1, pointers, 1, info, 1);
    cudaDeviceSynchronize();
  };
  EXPECT_DEATH(factor(), "runs on device 0 and touches memory of device 1");
  cusolverDnDestroy(solver);
}

}  // namespace
}  // namespace pissa::test
