// How often a decomposition reads the weight.
#include <gtest/gtest.h>

#include <cstdint>
#include <span>

#include "pissa/core/rsvd.h"
#include "pissa/cpu/backend.h"
#include "pissa/cpu/isa.h"
#include "support/matrices.h"

namespace pissa::test {
namespace {

/// The CPU backend, counting how often it reads one matrix, the weight.
class CountingBackend : public cpu::CpuBackend {
 public:
  CountingBackend(const cpu::Executor& executor, const cpu::Kernels& kernels, const Matrix& weight)
      : CpuBackend(executor, kernels), weight_(weight.data) {}

  std::int64_t passes = 0;  // products with the weight
  std::int64_t others = 0;  // any other operation that reads it, but for max_abs

  void weight_gemm_nt(const Matrix& x, const Matrix& weight, float scale, Precision precision,
                      std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) {
    passes += weight.data == weight_;
    CpuBackend::weight_gemm_nt(x, weight, scale, precision, tail, bias, y);
  }
  void weight_gemm_nn(const Matrix& dy, const Matrix& weight, float scale, Precision precision,
                      std::span<const Term> tail, const MutableMatrix& dx) {
    passes += weight.data == weight_;
    CpuBackend::weight_gemm_nn(dy, weight, scale, precision, tail, dx);
  }
  void gemm(std::span<const Term> terms, const Matrix& addend, const MutableMatrix& out) {
    for (const Term& term : terms) others += term.a.data == weight_ || term.b.data == weight_;
    others += addend.data == weight_;
    CpuBackend::gemm(terms, addend, out);
  }
  void copy(const Matrix& a, const MutableMatrix& out) {
    others += a.data == weight_;
    CpuBackend::copy(a, out);
  }
  void add(const Matrix& a, const Matrix& b, const MutableMatrix& out) {
    others += a.data == weight_ || b.data == weight_;
    CpuBackend::add(a, b, out);
  }

 private:
  const void* weight_;
};

constexpr SvdMethod kMethods[] = {SvdMethod::krylov, SvdMethod::subspace};

std::int64_t passes_over(const Stored& weight, std::int64_t r, const SvdOptions& options) {
  const cpu::ThreadExecutor executor(1);
  CountingBackend counting(executor, cpu::kernels(), weight.view());
  svd_lowrank(counting, weight.view(), r, options);
  EXPECT_EQ(counting.others, 0) << "something besides the passes reads the weight";
  return counting.passes;
}

TEST(SvdCost, TakesExactlyThePassesAskedFor) {
  Random random(6);
  for (const auto& [rows, cols] : {std::pair{150, 170}, {170, 150}}) {
    const Stored weight(random.dense(rows, cols), Format::f32);
    for (const SvdMethod method : kMethods) {
      for (const std::int64_t passes : {2, 4, 8, 12}) EXPECT_EQ(passes_over(weight, 4, {method, passes, 0}), passes);
    }
  }
}

TEST(SvdCost, AutomaticPassesFollowTheRank) {
  Random random(8);
  const Stored weight(random.dense(520, 500), Format::f32);
  for (const auto& [r, passes] : {std::pair{1, 10}, {64, 10}, {65, 12}, {96, 12}, {97, 14}}) {
    EXPECT_EQ(passes_over(weight, r, {}), passes) << "r = " << r;
    EXPECT_EQ(passes_over(weight, r, {.method = SvdMethod::subspace}), 28) << "r = " << r;
  }
}

// Time follows the columns of all blocks. With blocks as wide as those of 8 passes, 10 passes would have 1.25 times as
// many.
TEST(SvdCost, AutomaticPassesOfSmallRanksTakeLittleMoreThanEight) {
  for (std::int64_t r = 1; r <= 64; ++r) {
    const std::int64_t steps = passes_for(r, {}) / 2;
    EXPECT_LE(static_cast<double>(steps * block_size(r, steps)), 1.2 * 4 * static_cast<double>(block_size(r, 4))) << r;
  }
}

// Blocks of r + 8, or 7/8 of it: 40 are the whole space after 4 blocks, 8 passes.
TEST(SvdCost, StopsWhenTheBasisIsTheWholeSpace) {
  Random random(7);
  const Stored weight(random.dense(40, 60), Format::f32);
  EXPECT_EQ(passes_over(weight, 4, {SvdMethod::krylov, 6, 0}), 6);
  EXPECT_EQ(passes_over(weight, 4, {SvdMethod::krylov, 8, 0}), 8);
  EXPECT_EQ(passes_over(weight, 4, {SvdMethod::krylov, 10, 0}), 8);
  EXPECT_EQ(passes_over(weight, 4, {SvdMethod::subspace, 10, 0}), 10);
  for (const SvdMethod method : kMethods)
    EXPECT_EQ(passes_over(weight, 32, {method, 8, 0}), 2) << "one block is the space";
}

}  // namespace
}  // namespace pissa::test
