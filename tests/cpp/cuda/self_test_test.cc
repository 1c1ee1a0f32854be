// The self-test of a GPU: each defect that is planted closes its route, after which results are right in spite of it.
#include "pissa/cuda/self_test.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "pissa/cuda/context.h"
#include "pissa/cuda/lt_plan.h"
#include "pissa/cuda/routes.h"
#include "sim/control.h"
#include "support/matrices.h"
#include "support/reference.h"
#include "support/transferring_backend.h"

namespace pissa::test {
namespace {

using cuda::Route;
using cuda_sim::Defect;

class CudaSelfTest : public ::testing::Test {
 protected:
  void SetUp() override { TearDown(); }
  void TearDown() override {
    cuda_sim::clear_failures();
    cuda_sim::reset_libraries();
    cuda_sim::set_compute_capability(9, 0);
    for (const Route route : cuda::kRoutes) cuda::set_open(0, route, true);
    cuda::set_tested(0, false);
    cuda::LtPlan::forget(context);
  }
  std::vector<std::string> closed() {
    cuda::LtPlan::forget(context);
    std::vector<std::string> names;
    cuda::test_routes(context);
    for (const Route route : cuda::kRoutes) {
      if (!cuda::is_open(0, route)) names.emplace_back(cuda::name(route));
    }
    return names;
  }

  /// y = x W^T + a b^T + bias, with few rows and many, for quantised and dense weights.
  void expect_right_results() {
    Random random{1};
    TransferringBackend backend;
    for (const std::int64_t rows : {3, 40, 80}) {
      SCOPED_TRACE(rows);
      const Stored x(random.dense(rows, 128), Format::bf16, Stored::kAligned, Stored::kAligned);
      const Stored bias(random.dense(1, 64), Format::bf16, Stored::kAligned);
      const Stored a(random.dense(rows, 3), Format::bf16), b(random.dense(64, 3), Format::bf16);
      const Term tail{a.view(), Op::n, b.view(), Op::t, 1.0f, Precision::bf16};
      const StoredLevels codes(random, Format::nf4, 64, 128, 64, false);
      const Stored dense(random.dense(64, 128), Format::bf16, Stored::kAligned, Stored::kAligned);
      const auto check = [&](const Matrix& weight, const Dense& values) {
        Stored y = Stored::poisoned(rows, 64, Format::bf16, Stored::kAligned, Stored::kAligned);
        backend.weight_gemm_nt(x.view(), weight, 1.0f, Precision::bf16, {&tail, 1}, bias.view(), y.mutable_view());
        Dense value = x.values() * transposed(values) + a.values() * transposed(b.values());
        Dense size = absolute(x.values()) * transposed(absolute(values)) +
                     absolute(a.values()) * transposed(absolute(b.values()));
        for (std::int64_t i = 0; i < rows; ++i) {
          for (std::int64_t j = 0; j < 64; ++j) {
            value(i, j) += bias.values()(0, j);
            size(i, j) += std::abs(bias.values()(0, j));
          }
        }
        expect_close(y, {value, size}, 128 + 3 + 3, 2);
      };
      check(dense.view(), dense.values());
      check(codes.view(), rounded_to(kBf16, codes.values()));
    }
  }

  const cuda::Context& context = cuda::standalone_context();
};

TEST_F(CudaSelfTest, NothingIsClosedOnADeviceThatIsRight) {
  for (const auto& [major, minor] : {std::pair{7, 5}, {8, 0}, {9, 0}}) {
    cuda_sim::set_compute_capability(major, minor);
    cuda::set_tested(0, false);
    EXPECT_EQ(closed(), std::vector<std::string>{});
    EXPECT_TRUE(cuda::is_tested(0));
  }
}

struct Planted {
  Defect defect;
  std::vector<std::string> closed;
};

TEST_F(CudaSelfTest, ADefectClosesItsRoute) {
  const std::vector<std::string> kernels{"few_rows", "group"};
  const Planted all[] = {
      {Defect::parts_of_a, kernels}, {Defect::parts_of_b, kernels}, {Defect::sums_swapped, kernels},
      {Defect::sums_lost, kernels},  {Defect::other_half, kernels}, {Defect::early_refused, {"early_launch"}},
      {Defect::lt_sums, {"lt"}},     {Defect::lt_bias, {"lt"}},     {Defect::lt_fails, {"lt"}},
      {Defect::lt_state, {}},        {Defect::lt_arch, {}},         {Defect::lt_layouts, {}},
      {Defect::lt_refuses, {}}};
  for (const auto& [defect, expected] : all) {
    SCOPED_TRACE(static_cast<int>(defect));
    TearDown();
    cuda_sim::set_defect(defect);
    EXPECT_EQ(closed(), expected);
    expect_right_results();
  }
}

TEST_F(CudaSelfTest, WithoutDecodingOrCublasItThrows) {
  for (const auto& [defect, words] : {std::pair{Defect::byte_flipped, "are decoded wrongly; set PISSA_COMPOSITE=1"},
                                      {Defect::next_lane, "are decoded wrongly; set PISSA_COMPOSITE=1"},
                                      {Defect::handle_sums, "cuBLAS multiplies wrongly; set PISSA_COMPOSITE=1"}}) {
    TearDown();
    cuda_sim::set_defect(defect);
    for (int i = 0; i < 2; ++i) {  // and again at the next call
      try {
        cuda::test_routes(context);
        ADD_FAILURE() << "nothing was thrown";
      } catch (const std::runtime_error& error) {
        EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
      }
    }
    EXPECT_FALSE(cuda::is_tested(0));
  }
}

// An exception anywhere leaves no route closed, so that the next op starts anew.
TEST_F(CudaSelfTest, AnExceptionLeavesAllRoutesOpen) {
  int thrown = 0;
  for (const int call : {30, 200, 900, 1500}) {
    TearDown();
    cuda_sim::fail_next(cudaErrorMemoryAllocation, call);
    try {
      cuda::test_routes(context);
    } catch (const std::runtime_error&) {
      ++thrown;
      for (const Route route : cuda::kRoutes) EXPECT_TRUE(cuda::is_open(0, route)) << call;
      EXPECT_FALSE(cuda::is_tested(0)) << call;
    }
  }
  EXPECT_GT(thrown, 2);  // of the four, one is a call without which it goes on
}

// A launch that fails in the middle, each in turn: what it belongs to is closed, or the test throws.
TEST_F(CudaSelfTest, ALaunchThatFails) {
  int closings = 0;
  for (int call = 0;; call += 397) {
    TearDown();
    cuda_sim::fail_next(cudaErrorInvalidConfiguration, call);
    try {
      closings += !closed().empty();
    } catch (const std::runtime_error&) {
    }
    if (cuda_sim::failure_pending()) break;
  }
  EXPECT_GT(closings, 1);
}

TEST_F(CudaSelfTest, OnceAndNeverInsideACapture) {
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  cuda_sim::reset_launches();
  EXPECT_TRUE(cuda::test_routes(context).empty());
  EXPECT_EQ(cuda_sim::launches(), 0);
  EXPECT_FALSE(cuda::may_launch_early(context));
  EXPECT_FALSE(cuda::is_tested(0));
  ASSERT_EQ(cudaStreamEndCapture(context.stream, &graph), cudaSuccess);
  cudaGraphDestroy(graph);
  EXPECT_TRUE(cuda::may_launch_early(context));

  cuda_sim::reset_synchronizations();
  cuda::test_routes(context);
  EXPECT_LE(cuda_sim::synchronizations(), 15);
  EXPECT_LE(cuda_sim::launches(), 1300);
  cuda_sim::reset_launches();
  cuda::test_routes(context);
  EXPECT_EQ(cuda_sim::launches(), 0);
}

// During the test routes are closed that are right, and a graph would keep what is computed instead.
TEST_F(CudaSelfTest, ACaptureWaitsForTheTestOfAnotherThread) {
  std::thread tester([] { cuda::test_routes(cuda::standalone_context()); });
  while (cuda::is_open(0, Route::lt) && !cuda::is_tested(0)) std::this_thread::yield();
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeRelaxed), cudaSuccess);
  cuda::test_routes(context);
  const bool tested = cuda::is_tested(0);
  EXPECT_EQ(cudaStreamEndCapture(context.stream, &graph), cudaSuccess);
  cudaGraphDestroy(graph);
  tester.join();
  EXPECT_TRUE(tested);
}

TEST_F(CudaSelfTest, TheSentenceSaysWhatComputesInstead) {
  cuda_sim::set_defect(Defect::lt_sums);
  cuda::LtPlan::forget(context);
  EXPECT_EQ(
      cuda::test_routes(context),
      std::vector<std::string>{"lt computes wrongly on CUDA device 0 (compute capability 9.0), so cuBLAS's handle "
                               "multiplies [P005]"});
}

}  // namespace
}  // namespace pissa::test
