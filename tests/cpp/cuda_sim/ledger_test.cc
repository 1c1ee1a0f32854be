// The ledger of the simulated device against sums made by hand, and the dry mode, in which it is all that is done.
#include "sim/ledger.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cublasLt.h"
#include "cusolverDn.h"
#include "support/cuda_sim_case.h"

namespace pissa::test {
namespace {

using cuda_sim::Entry;
using Calls = cuda_sim::Kind;
using cuda_sim::Type;

__global__ void add_one(float* to) { to[threadIdx.x] += 1; }

class Ledger : public CudaSimTest {
 protected:
  void TearDown() override {
    cuda_sim::set_dry(false);
    CudaSimTest::TearDown();
  }
};
using Dry = Ledger;

/// D [m, n] = A B + beta D, each matrix of `batch` behind the one before; B is one for all where `shared`.
struct Product {
  cudaDataType in, out;
  std::int64_t m, n, k;
  int batch;
  bool shared;
  float beta;

  cublasStatus_t run(const void* a, const void* b, void* d) const {
    cublasHandle_t handle;
    cublasCreate(&handle);
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    const auto layout = [this](cudaDataType type, std::int64_t rows, std::int64_t cols, bool one) {
      cublasLtMatrixLayout_t made;
      cublasLtMatrixLayoutCreate(&made, type, static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(cols), rows);
      const std::int32_t count = batch;
      const std::int64_t stride = one ? 0 : rows * cols;
      cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count);
      cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride);
      return made;
    };
    const cublasLtMatrixLayout_t a_layout = layout(in, m, k, false), b_layout = layout(in, k, n, shared),
                                 d_layout = layout(out, m, n, false);
    const float one = 1;
    const cublasStatus_t status =
        cublasLtMatmul(reinterpret_cast<cublasLtHandle_t>(handle), desc, &one, a, a_layout, b, b_layout, &beta, d,
                       d_layout, d, d_layout, nullptr, nullptr, 0, nullptr);
    for (const cublasLtMatrixLayout_t made : {a_layout, b_layout, d_layout}) cublasLtMatrixLayoutDestroy(made);
    cublasLtMatmulDescDestroy(desc);
    cublasDestroy(handle);
    return status;
  }
};

TEST_F(Ledger, Products) {
  char* memory = device_memory<char>(1 << 16);
  cuda_sim::reset_ledger();
  const Product products[] = {{CUDA_R_16BF, CUDA_R_32F, 7, 5, 9, 1, false, 0},
                              {CUDA_R_16F, CUDA_R_16F, 7, 5, 9, 3, false, 1},
                              {CUDA_R_32F, CUDA_R_32F, 7, 5, 9, 3, true, 0}};
  for (const Product& product : products) {
    EXPECT_EQ(product.run(memory, memory + 10000, memory + 20000), CUBLAS_STATUS_SUCCESS);
  }
  constexpr double kFlops = 2 * 7 * 5 * 9, kA = 7 * 9, kB = 9 * 5, kD = 7 * 5;
  const std::vector<Entry> expected = {
      {Calls::library, "cublasLtMatmul", Type::bf16, 7, 5, 9, 1, kFlops, 2 * (kA + kB) + 4 * kD},
      {Calls::library, "cublasLtMatmul", Type::f16, 7, 5, 9, 3, 3 * kFlops, 2 * 3 * (kA + kB + 2 * kD)},
      {Calls::library, "cublasLtMatmul", Type::f32, 7, 5, 9, 3, 3 * kFlops, 4 * (3 * kA + kB + 3 * kD)}};
  EXPECT_TRUE(cuda_sim::ledger() == expected);
  const auto sums = cuda_sim::sums();
  EXPECT_EQ(sums.size(), 3u);
  EXPECT_EQ(sums.at({"cublasLtMatmul", Type::f16}).flops, 3 * kFlops);
  const cuda_sim::Sum all = cuda_sim::sum_if([](const Entry& entry) { return entry.flops > 0; });
  EXPECT_EQ(all.calls, 3);
  EXPECT_EQ(all.flops, 7 * kFlops);
  EXPECT_EQ(all.bytes, expected[0].bytes + expected[1].bytes + expected[2].bytes);
  expect_success(cudaFree(memory));
}

TEST_F(Ledger, Factorisations) {
  auto* memory = device_memory<double>(4096);
  double** pointers = upload(std::vector<double*>{memory, memory + 400});
  int* info = device_memory<int>(2);
  cublasHandle_t blas;
  cublasCreate(&blas);
  cusolverDnHandle_t solver;
  cusolverDnCreate(&solver);
  const double one = 1;
  const auto all = [&] {
    EXPECT_EQ(cusolverDnDpotrfBatched(solver, CUBLAS_FILL_MODE_LOWER, 6, pointers, 6, info, 2),
              CUSOLVER_STATUS_SUCCESS);
    EXPECT_EQ(cublasDtrsmBatched(blas, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, 9,
                                 6, &one, pointers, 6, pointers, 9, 2),
              CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasDtrsmBatched(blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_LOWER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, 9,
                                 6, &one, pointers, 9, pointers, 9, 2),
              CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cusolverDnDgeqrf(solver, 9, 6, memory, 9, memory + 800, memory + 1000, 1000, info),
              CUSOLVER_STATUS_SUCCESS);
    EXPECT_EQ(cusolverDnDorgqr(solver, 9, 6, 6, memory, 9, memory + 800, memory + 1000, 1000, info),
              CUSOLVER_STATUS_SUCCESS);
  };
  cuda_sim::reset_ledger();
  all();
  // potrf: n^3 / 3 = 72 and a triangle of 21, read and written; trsm: 6 x 6 with 9 rows, 9 x 9 with 6 columns; QR of
  // 9 x 6: 2 n^2 (m - n / 3).
  const std::vector<Entry> expected = {
      {Calls::library, "cusolverDnDpotrfBatched", Type::f64, 0, 6, 0, 2, 2 * 72, 2 * 8 * 42},
      {Calls::library, "cublasDtrsmBatched", Type::f64, 9, 6, 0, 2, 2 * 36 * 9, 2 * 8 * (21 + 2 * 54)},
      {Calls::library, "cublasDtrsmBatched", Type::f64, 9, 6, 0, 2, 2 * 81 * 6, 2 * 8 * (45 + 2 * 54)},
      {Calls::library, "cusolverDnDgeqrf", Type::f64, 9, 6, 0, 1, 2 * 36 * (9 - 2), 8 * (2 * 54 + 6)},
      {Calls::library, "cusolverDnDorgqr", Type::f64, 9, 6, 6, 1, 2 * 36 * (9 - 2), 8 * (2 * 54 + 6)}};
  const std::vector<Entry> got = cuda_sim::ledger();
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(got[i] == expected[i]) << got[i].name << ": " << got[i].flops << " flops, " << got[i].bytes << " bytes";
  }
  cuda_sim::reset_ledger();
  cuda_sim::fail_next(CUSOLVER_STATUS_INTERNAL_ERROR);
  EXPECT_NE(cusolverDnDpotrfBatched(solver, CUBLAS_FILL_MODE_LOWER, 6, pointers, 6, info, 2), CUSOLVER_STATUS_SUCCESS);
  EXPECT_EQ(cusolverDnDpotrfBatched(solver, CUBLAS_FILL_MODE_LOWER, 0, pointers, 6, info, 2), CUSOLVER_STATUS_SUCCESS);
  EXPECT_TRUE(cuda_sim::ledger().empty()) << "a call that fails, and one that has nothing to do";
  expect_success(cudaDeviceSynchronize());
  cusolverDnDestroy(solver);
  cublasDestroy(blas);
}

TEST_F(Ledger, TheRuntime) {
  cudaEvent_t event;
  expect_success(cudaEventCreate(&event));
  cuda_sim::reset_ledger();
  float* memory = device_memory<float>(32);
  float host[32] = {};
  expect_success(cudaMemcpyAsync(memory, host, 128, cudaMemcpyDefault));
  expect_success(launch(add_one, dim3(2, 3), 32, nullptr, memory));
  expect_success(cudaMemcpyAsync(memory + 8, memory, 8, cudaMemcpyDeviceToDevice));
  expect_success(cudaMemcpy(host, memory, 12, cudaMemcpyDeviceToHost));
  expect_success(cudaEventSynchronize(event));
  expect_success(cudaFree(memory));
  EXPECT_EQ(cudaMalloc(&memory, std::size_t{2} << 40), cudaErrorMemoryAllocation);
  void* const kernel = reinterpret_cast<void*>(add_one);
  const std::vector<Entry> expected = {
      {.kind = Calls::allocation, .name = "cudaMalloc", .bytes = 128},
      {.kind = Calls::copy_to_device, .name = "cudaMemcpyAsync", .bytes = 128},
      {.kind = Calls::launch, .name = "cudaLaunchKernelEx", .kernel = kernel, .grid = {2, 3, 1}, .block = {32, 1, 1}},
      {.kind = Calls::copy_to_host, .name = "cudaMemcpy", .bytes = 12},
      {.kind = Calls::wait, .name = "cudaMemcpy"},
      {.kind = Calls::wait, .name = "cudaEventSynchronize"}};
  const std::vector<Entry> got = cuda_sim::ledger();
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(got[i] == expected[i]) << i << ": " << got[i].name << ", " << got[i].bytes << " bytes";
  }
  cuda_sim::reset_ledger();
  EXPECT_EQ(cuda_sim::launches() + cuda_sim::synchronizations(), 0);
  expect_success(cudaEventDestroy(event));
}

TEST_F(Dry, NothingIsComputed) {
  float* before = upload(std::vector<float>(32, 5.0f));
  expect_success(launch(add_one, 1, 32, nullptr, before));  // runs when the mode changes
  cuda_sim::set_dry(true);
  cuda_sim::reset_ledger();
  expect_success(launch(add_one, 1, 32, nullptr, before));
  expect_success(cudaMemsetAsync(before, 0, 8));
  float* memory = device_memory<float>(32);
  std::vector<float> host(32, 3.0f);
  expect_success(cudaMemcpyAsync(memory, host.data(), 128, cudaMemcpyHostToDevice));
  expect_success(launch(add_one, 1, 32, nullptr, memory));
  expect_success(cudaMemcpyAsync(before, memory, 128, cudaMemcpyDeviceToDevice));
  expect_success(cudaMemcpyAsync(host.data(), memory, 124, cudaMemcpyDeviceToHost));
  EXPECT_EQ(host[0], 3.0f) << "not before it is waited for";
  expect_success(cudaStreamSynchronize(nullptr));
  EXPECT_EQ(host[30], 0.0f);
  EXPECT_EQ(host[31], 3.0f);
  EXPECT_EQ(cuda_sim::launches(), 2);
  EXPECT_EQ(cuda_sim::synchronizations(), 1);
  cuda_sim::set_dry(false);
  for (const float value : download(before, 32)) EXPECT_EQ(value, 6.0f);
  expect_success(cudaFree(memory));
  expect_success(cudaFree(before));
}

TEST_F(Dry, CallsAreChecked) {
  cuda_sim::set_dry(true);
  float* memory = device_memory<float>(32);
  EXPECT_EQ(cudaMemsetAsync(memory, 0, 129), cudaErrorInvalidValue);
  EXPECT_EQ(launch(add_one, 0, 32, nullptr, memory), cudaErrorInvalidConfiguration);
  EXPECT_EQ((Product{CUDA_R_32F, CUDA_R_16BF, 1, 1, 1, 1, false, 0}).run(memory, memory, memory),
            CUBLAS_STATUS_NOT_SUPPORTED);
  expect_success(cudaFree(memory));
  EXPECT_EQ(cudaMemsetAsync(memory, 0, 4), cudaErrorInvalidValue);
  EXPECT_EQ(cudaFree(memory), cudaErrorInvalidValue);
}

TEST_F(Dry, MemoryIsAddresses) {
  const std::size_t gigabyte = std::size_t{1} << 30, in_use = cuda_sim::bytes_in_use();
  cuda_sim::set_dry(true);
  EXPECT_EQ(cuda_sim::bytes_in_use(), 0u);
  cuda_sim::set_memory(100 * gigabyte);
  const auto free_bytes = [] {
    std::size_t free, total;
    expect_success(cudaMemGetInfo(&free, &total));
    EXPECT_EQ(total, std::size_t{100} << 30);
    return free;
  };
  char* first = device_memory<char>(60 * gigabyte);
  char* second = device_memory<char>(30 * gigabyte);
  EXPECT_TRUE(second >= first + 60 * gigabyte || second + 30 * gigabyte <= first);
  EXPECT_EQ(free_bytes(), 10 * gigabyte);
  void* more;
  EXPECT_EQ(cudaMalloc(&more, 11 * gigabyte), cudaErrorMemoryAllocation);
  expect_success(cudaFreeAsync(first, nullptr));
  EXPECT_EQ(free_bytes(), 70 * gigabyte);
  expect_success(cudaMallocAsync(&more, 65 * gigabyte, nullptr));
  EXPECT_EQ(cuda_sim::peak_bytes(), 95 * gigabyte);
  expect_success(cudaFree(more));
  cuda_sim::set_memory(80 * gigabyte);
  cuda_sim::set_dry(false);
  EXPECT_EQ(cuda_sim::bytes_in_use(), in_use) << "of the mode that is set";
  expect_success(cudaFree(second));
}

}  // namespace
}  // namespace pissa::test
