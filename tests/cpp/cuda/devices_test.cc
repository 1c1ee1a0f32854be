// The CUDA backend on the second of two devices, which only the simulation has for sure: contexts and handles of each,
// and that a wrong current device is an error and no wrong result.
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "pissa/core/split.h"
#include "pissa/cuda/backend.h"
#include "pissa/cuda/context.h"
#include "sim/control.h"
#include "support/matrices.h"
#include "support/transferring_backend.h"

namespace pissa::test {
namespace {

class CudaDevices : public ::testing::Test {
 protected:
  void TearDown() override { cudaSetDevice(0); }

  static const cuda::Context& context_of(int device) {
    EXPECT_EQ(cudaSetDevice(device), cudaSuccess);
    return cuda::standalone_context();
  }
};

TEST_F(CudaDevices, EachHasItsContext) {
  // A thread of its own has none yet: the first one must stay where it is when the second is made.
  std::thread([] {
    const cuda::Context& first = context_of(0);
    const cuda::Context before = first;
    const cuda::Context& second = context_of(1);
    EXPECT_EQ(first.device, 0);
    EXPECT_EQ(first.stream, before.stream);
    EXPECT_EQ(first.blas, before.blas);
    EXPECT_EQ(second.device, 1);
    EXPECT_NE(second.stream, first.stream);
    EXPECT_NE(second.blas, first.blas);
    const cusolverDnHandle_t solver = second.solver();
    EXPECT_EQ(&context_of(0), &first);
    EXPECT_NE(first.solver(), solver);
    EXPECT_EQ(&context_of(1), &second);
    EXPECT_EQ(second.solver(), solver);
  }).join();
}

/// A decomposition on the device of a context: kernels, products, factorisations, memory.
std::vector<unsigned char> split_on(const cuda::Context& context) {
  Random random(1);
  const Stored weight(random.dense(20, 30), Format::f32);
  Stored a0 = Stored::poisoned(4, 30, Format::f32), b0 = Stored::poisoned(20, 4, Format::f32);
  Staging at(context);
  cuda::CudaBackend cuda(context);
  split(cuda, at(weight.view()), 1.0f, {}, at(a0.mutable_view()), at(b0.mutable_view()));
  at.finish();
  return a0.bytes();
}

TEST_F(CudaDevices, TheSecondComputesTheSame) {
  const std::vector<unsigned char> expected = split_on(context_of(0));
  const std::size_t before = cuda_sim::bytes_in_use();
  EXPECT_TRUE(split_on(context_of(1)) == expected);
  const cuda::Buffer buffer(context_of(1), 1, 1, Format::f32);
  cudaPointerAttributes attributes{};
  cudaPointerGetAttributes(&attributes, buffer.data<float>());
  EXPECT_EQ(attributes.device, 1);
  context_of(0);
  EXPECT_EQ(cuda_sim::bytes_in_use(), before);
}

// The stream and the handle of a device that is not the current one, as torch's would be if nobody told the library's
// own runtime.
TEST_F(CudaDevices, AnotherCurrentDeviceIsAnError) {
  for (const int device : {0, 1}) {
    const cuda::Context& context = context_of(device);
    split_on(context);
    cudaSetDevice(1 - device);
    try {
      split_on(context);
      ADD_FAILURE() << "computed something";
    } catch (const std::runtime_error& error) {
      const std::string expected =
          "failed on CUDA device " + std::to_string(device) + ": cudaErrorInvalidResourceHandle";
      EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
    }
    cuda::Context mixed = context_of(1 - device);
    mixed.blas = context.blas;
    try {
      split_on(mixed);
      ADD_FAILURE() << "took the handle of another device";
    } catch (const std::runtime_error& error) {
      EXPECT_NE(std::string(error.what()).find("CUBLAS_STATUS_EXECUTION_FAILED"), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace pissa::test
