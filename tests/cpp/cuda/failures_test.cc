// What the CUDA backend does when a call of CUDA or of a library fails, which only the simulation can make happen.
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <cusolverDn.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pissa/core/split.h"
#include "pissa/cuda/backend.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/lt_plan.h"
#include "pissa/cuda/products.h"
#include "pissa/cuda/split_many.h"
#include "sim/control.h"
#include "support/device_layer.h"
#include "support/matrices.h"
#include "support/reference.h"
#include "support/split_layer.h"
#include "support/transferring_backend.h"

namespace pissa::test {
namespace {

class CudaFailures : public ::testing::Test {
 protected:
  void TearDown() override {
    cuda_sim::clear_failures();
    cuda_sim::reset_libraries();
  }

  /// Makes each call of one library fail in turn: `run` throws naming it, leaves no memory behind, and nothing on the
  /// side stream that would still use it.
  template <class Status>
  void fail_each(Status status, const std::string& status_name, const std::function<void()>& run) const {
    const cuda::Context& context = cuda::standalone_context();
    run();
    cudaStreamSynchronize(context.stream);
    const std::size_t before = cuda_sim::bytes_in_use();
    int calls = 0;
    for (;; ++calls) {
      cuda::LtPlan::forget(context);
      cuda_sim::fail_next(status, calls);
      try {
        run();
      } catch (const std::runtime_error& error) {
        const std::string text = error.what();
        EXPECT_NE(text.find(status_name), std::string::npos) << text;
        EXPECT_EQ(text.rfind("cu", 0) == 0 || text.find(" failed on CUDA device 0: ") != std::string::npos, true)
            << text;
      }
      const bool no_more_calls = cuda_sim::failure_pending();
      cuda_sim::clear_failures();
      cudaStreamSynchronize(context.stream);
      ASSERT_EQ(cuda_sim::bytes_in_use(), before) << "call " << calls << " left memory behind";
      ASSERT_EQ(cudaStreamQuery(context.side().stream), cudaSuccess) << "call " << calls << " left work on the side";
      if (no_more_calls) break;
    }
    EXPECT_GT(calls, 0);
    run();  // works again
  }
};

TEST_F(CudaFailures, EveryCallOfALinearLayer) {
  for (const std::int64_t tokens : {2, 20}) {
    DeviceLayer layer(tokens, 40, 64, 3);
    const auto run = [&] {
      layer.run();
      layer.run_low_rank();
    };
    fail_each(cudaErrorLaunchFailure, "cudaErrorLaunchFailure", run);
    fail_each(CUBLAS_STATUS_EXECUTION_FAILED, "CUBLAS_STATUS_EXECUTION_FAILED", run);
  }
}

TEST_F(CudaFailures, EveryCallOfAProductInChunks) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(11);
  Staging at(context);
  const StoredNf4 host(random, 200, 64, 64, false);
  const Stored x_host(random.dense(20, 64), Format::bf16);
  const Matrix weight = at(host.view()), x = at(x_host.view());
  const cuda::Buffer y(context, 20, 200, Format::bf16);
  at.finish();
  const auto run = [&] { cuda::weight_product(context, x, weight, Op::t, 1.0f, Precision::bf16, {}, {}, y.view(), 1); };
  fail_each(cudaErrorLaunchFailure, "cudaErrorLaunchFailure", run);
  fail_each(CUBLAS_STATUS_EXECUTION_FAILED, "CUBLAS_STATUS_EXECUTION_FAILED", run);
}

TEST_F(CudaFailures, EveryCallOfADecomposition) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(6);
  for (const std::int64_t rank : {2, 20}) {  // with and without the careful way
    const Stored weight(random.dense(20, rank) * random.dense(rank, 30), Format::f32);
    Staging at(context);
    const Matrix w = at(weight.view());
    const cuda::Buffer a0(context, 4, 30, Format::f32), b0(context, 20, 4, Format::f32);
    const cuda::Array<std::uint8_t> codes(context, 300);
    const cuda::Array<float> scales(context, 10);
    at.finish();
    const auto run = [&] {
      cuda::CudaBackend cuda(context);
      split_quantized(cuda, w, 1.0f, {SvdMethod::krylov, 2, 0}, a0.view(), b0.view(),
                      {Format::nf4, 64, codes.data(), scales.data()});
    };
    fail_each(cudaErrorLaunchFailure, "cudaErrorLaunchFailure", run);
    fail_each(CUBLAS_STATUS_EXECUTION_FAILED, "CUBLAS_STATUS_EXECUTION_FAILED", run);
    fail_each(CUSOLVER_STATUS_INTERNAL_ERROR, "cusolverStatus_t", run);
  }
}

// Of a stack: rows that depend on one another are no failure, eigenvalues of another matrix that do not converge are;
// and both of one matrix, which follow from the rows, are none.
TEST_F(CudaFailures, EigenvaluesThatDoNotConverge) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(7);
  const std::int64_t count = 2, rows = 3, cols = 20;
  for (const std::int64_t dependent : {0, 1, 2}) {  // 2: none
    for (const std::int64_t not_finite : {0, 1, 2}) {
      Dense basis_values = random.dense(count * rows, cols), values = basis_values;
      for (std::int64_t j = 0; dependent < 2 && j < cols; ++j) basis_values(dependent * rows, j) = 0;
      if (not_finite < 2) values(not_finite * rows + 1, 3) = std::nan("");
      Stored basis_host(basis_values, Format::f32), rows_host(values, Format::f32);
      Staging at(context);
      const auto each = [&](MutableMatrix matrix) {
        matrix.rows /= count;
        matrix.stride = matrix.rows * matrix.ld;
        return matrix;
      };
      const MutableMatrix basis = each(at(basis_host.mutable_view())), gram_of = each(at(rows_host.mutable_view()));
      const std::vector<Matrix> weights(count, gram_of);
      cuda::CudaBackend cuda(context, weights);
      const cuda::Buffer s = cuda.alloc(1, rows, Format::f32), vectors = cuda.alloc(rows, rows, Format::f32);
      cuda.orthonormalize(basis, 0, rows, Rank::assumed_full);
      cuda.gram_svd(gram_of, gram_of, 1.0f, s.view(), vectors.view());
      if (not_finite < 2 && not_finite != dependent) {
        EXPECT_THROW(cuda.had_full_rank(), std::runtime_error) << dependent << ", " << not_finite;
      } else {
        EXPECT_EQ(cuda.had_full_rank(), dependent == 2) << dependent << ", " << not_finite;
      }
      EXPECT_TRUE(cuda.had_full_rank()) << "asked once, cleared";
    }
  }
}

// What is left for had_full_rank stays, though rows of any rank are looked at in between.
TEST_F(CudaFailures, RowsOfAnyRankHideNone) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(8);
  Dense values = random.dense(3, 20);
  values(1, 3) = std::nan("");
  const Stored not_finite(values, Format::f32);
  Stored zeros(Dense(3, 20), Format::f32), rows(random.dense(3, 20), Format::f32);
  Staging at(context);
  cuda::CudaBackend cuda(context);
  const cuda::Buffer s = cuda.alloc(1, 3, Format::f32), vectors = cuda.alloc(3, 3, Format::f32);
  cuda.orthonormalize(at(zeros.mutable_view()), 0, 3, Rank::assumed_full);
  cuda.orthonormalize(at(rows.mutable_view()), 0, 3, Rank::any);
  EXPECT_FALSE(cuda.had_full_rank());
  const Matrix not_finite_rows = at(not_finite.view());
  cuda.gram_svd(not_finite_rows, not_finite_rows, 1.0f, s.view(), vectors.view());
  cuda.orthonormalize(at(rows.mutable_view()), 0, 3, Rank::any);
  EXPECT_THROW(cuda.had_full_rank(), std::runtime_error);
}

// Whatever a solver does that is given NaN, or whose answer is none, none is: weights without full rank go the careful
// way, alone and in a stack, to the same factors.
TEST_F(CudaFailures, NoSolverIsGivenNan) {
  Random random(11);
  const std::vector<Dense> values = {random.dense(40, 60), Dense(40, 60), random.dense(40, 3) * random.dense(3, 60),
                                     random.dense(40, 60)};
  std::vector<std::vector<unsigned char>> expected;
  for (const auto mode : {cuda_sim::OnNaN::info, cuda_sim::OnNaN::info_zero, cuda_sim::OnNaN::status}) {
    cuda_sim::set_solver_on_nan(mode);
    for (const Format format : {Format::f32, Format::bf16}) {
      std::vector<SplitLayer> layers;
      for (const Dense& dense : values) layers.emplace_back(dense, format, 4, 1.0f);
      split_on_device(layers, cuda::standalone_context());
      for (const SplitLayer& layer : layers) {
        if (mode == cuda_sim::OnNaN::info) {
          EXPECT_LE(norm(layer.a0.values()), 100.0) << "NaN";
          expected.push_back(layer.a0.bytes());
        } else {
          EXPECT_TRUE(
              layer.a0.bytes() ==
              expected[static_cast<std::size_t>(&layer - layers.data()) + (format == Format::f32 ? 0 : values.size())]);
        }
      }
    }
  }
}

// A message says the call, the device, the status, and how large the problem was.
TEST_F(CudaFailures, AMessageHasTheSizes) {
  DeviceLayer layer(20, 40, 64, 3);
  std::string text;
  for (int call = 0; call < 200 && text.find("cublasLtMatmul failed") != 0; ++call) {
    cuda_sim::fail_next(CUBLAS_STATUS_EXECUTION_FAILED, call);
    try {
      layer.forward();
    } catch (const std::runtime_error& error) {
      text = error.what();
    }
  }
  EXPECT_EQ(text.rfind("cublasLtMatmul failed on CUDA device 0: CUBLAS_STATUS_EXECUTION_FAILED (13) (m ", 0), 0u)
      << text;
}

TEST_F(CudaFailures, ACardThatIsTooOldIsRefusedWithTheListOfThoseThatAreNot) {
  const auto refused = [](int major, int minor) -> std::string {
    cuda_sim::set_compute_capability(major, minor);
    try {
      cuda::check_supported(0);
      return "";
    } catch (const std::runtime_error& error) {
      return error.what();
    }
  };
  const std::string text = refused(7, 0);
  EXPECT_NE(text.find("got compute capability 7.0; this build runs on 7.5, 8.0, 9.0 and newer"), std::string::npos)
      << text;
  for (const auto& [major, minor] : {std::pair{7, 5}, {8, 0}, {8, 6}, {8, 9}, {9, 0}, {10, 0}, {12, 0}}) {
    EXPECT_EQ(refused(major, minor), "") << major << "." << minor;
  }
  cuda_sim::set_compute_capability(9, 0);
}

}  // namespace
}  // namespace pissa::test
