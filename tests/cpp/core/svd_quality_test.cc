// On spectra like those of language models, decompositions lose no more energy than torch.svd_lowrank in float64, with
// fewer passes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "pissa/core/rsvd.h"
#include "pissa/cpu/backend.h"
#include "pissa/cpu/isa.h"
#include "support/krylov_reference.h"
#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/weight_classes.h"

namespace pissa::test {
namespace {

double our_loss(const Stored& weight, std::int64_t r, const SvdOptions& options, double best) {
  const cpu::ThreadExecutor executor(1);
  cpu::CpuBackend cpu(executor, cpu::kernels());
  const auto factors = svd_lowrank(cpu, weight.view(), r, options);
  const MutableMatrix view = factors.v.view();
  Dense v(view.rows, view.cols);
  std::copy_n(static_cast<const float*>(view.data), v.values.size(), v.values.begin());
  orthonormalize_rows(v);  // compare the spans, without the rounding of lengths to f32
  return energy_loss(weight.values(), v, best);
}

class SvdQualityTest : public ::testing::TestWithParam<double> {};

// 8 passes lose more than niter = 16 at r = 128. Of a tall weight V is the basis: our side with half a pass less.
TEST_P(SvdQualityTest, AutomaticPassesMatchSixteenIterations) {
  Random random(2);
  const auto spectrum = [](std::int64_t i) { return std::pow(i + 1.0, -GetParam()); };
  const Stored weight(with_spectrum(random, 400, 384, spectrum), Format::f32);
  const Dense w = weight.values();
  for (const std::int64_t r : {2, 48, 128}) {
    double best = 0;
    for (std::int64_t i = 0; i < r; ++i) best = std::hypot(best, spectrum(i));
    const double torchs = energy_loss(w, torch_vectors(w, r, 16), best);
    for (const SvdMethod method : {SvdMethod::krylov, SvdMethod::subspace}) {
      EXPECT_LE(our_loss(weight, r, {.method = method}, best), torchs + 1e-5)
          << "r = " << r << ", method " << static_cast<int>(method);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Exponent, SvdQualityTest, ::testing::Values(0.25, 0.5, 1.0, 2.0),
                         [](const auto& info) { return "x" + std::to_string(static_cast<int>(100 * info.param)); });

}  // namespace
}  // namespace pissa::test
