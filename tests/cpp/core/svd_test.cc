// svd_lowrank on every class of weights: sound factors, always; the energy that the algorithm can find; its cost.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "pissa/core/rsvd.h"
#include "support/backend_test.h"
#include "support/krylov_reference.h"
#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/reference.h"
#include "support/weight_classes.h"

namespace pissa::test {
namespace {

/// A decomposition on the host.
struct Factors {
  Dense u;  // [r, m]
  std::vector<double> s;
  Dense v;  // [r, n]
};

template <class B>
Dense to_dense(B& backend, const MutableMatrix& matrix) {
  Stored result = Stored::poisoned(matrix.rows, matrix.cols, Format::f32);
  backend.copy(matrix, result.mutable_view());
  return result.values();
}

template <class B>
Factors decompose(B& backend, const Matrix& w, std::int64_t r, const SvdOptions& options) {
  const auto factors = svd_lowrank(backend, w, r, options);
  return {to_dense(backend, factors.u.view()), to_dense(backend, factors.s.view()).values,
          to_dense(backend, factors.v.view())};
}

/// What rounding to f32 does to W q, of all rows q of length 1 together: sqrt(terms) roundings as in a random walk,
/// each relative to |W||q|, whose norm is at most ||W||. Covers a product, its orthonormalisation and the projection: a
/// factor of 8.
double noise(const Dense& w) { return 8 * kEps32 * std::sqrt(static_cast<double>(std::max(w.rows, w.cols))) * norm(w); }

void expect_sound(const Dense& w, const Factors& factors, const Svd& exact) {
  const std::int64_t r = factors.u.rows;
  const bool rows_short = w.rows <= w.cols;
  EXPECT_LE(orthonormality_error(factors.u), orthonormality_bound(w.rows)) << "U";
  EXPECT_LE(orthonormality_error(factors.v), orthonormality_bound(w.cols)) << "V";
  const Dense product = rows_short ? factors.u * w : factors.v * transposed(w);  // of the factor in the basis
  const Dense& partner = rows_short ? factors.v : factors.u;
  for (std::int64_t i = 0; i < r; ++i) {
    const double s = factors.s[i];
    ASSERT_TRUE(std::isfinite(s));
    ASSERT_GE(s, 0);
    ASSERT_LE(s, factors.s[std::max<std::int64_t>(i - 1, 0)]) << "not descending";
    ASSERT_LE(s, exact.s[i] + noise(w)) << "a projection of W has no larger singular values";
    ASSERT_LE(norm(rows_of(product, i, 1) - s * rows_of(partner, i, 1)), noise(w)) << "triplet " << i;
  }
}

constexpr SvdMethod kMethods[] = {SvdMethod::krylov, SvdMethod::subspace};

class SvdTest : public BackendTest {
 protected:
  // Sound, as good as the algorithm in float64, and, where the sketch spans everything, exact.
  void check(const WeightClass& weight_class, std::int64_t r, Format format,
             const std::vector<std::int64_t>& passes) const {
    const Stored weight(weight_class.values, format);
    const Dense w = weight.values();
    const std::int64_t short_dim = std::min(w.rows, w.cols);
    r = std::min(r, short_dim);
    const Svd exact = jacobi_svd(w);
    const double best = best_norm(exact, r);
    const std::int64_t block = std::min(r + oversampling(r), short_dim);
    const Dense wide = w.rows <= w.cols ? w : transposed(w);
    for (const SvdMethod method : kMethods) {
      for (const std::int64_t count : passes) {
        SCOPED_TRACE(::testing::Message()
                     << weight_class.name << " [" << w.rows << ", " << w.cols << "] " << name(format) << ", r = " << r
                     << ", method " << static_cast<int>(method) << ", " << count << " passes");
        const SvdOptions options{method, count, 7};
        auto cpu = backend();
        const Factors factors = decompose(cpu, weight.view(), r, options);
        expect_sound(w, factors, exact);
        if (HasFailure()) return;
        // f32 vectors of length 1 +- eps, and the noise of the basis, second order in what it loses.
        const double rounding = best > 0 ? 4 * noise(w) / best : 0;
        const double loss = energy_loss(transposed(wide), w.rows <= w.cols ? factors.u : factors.v, best);
        const double other_loss = energy_loss(wide, w.rows <= w.cols ? factors.v : factors.u, best);
        const double reference = energy_loss(transposed(wide), reference_basis(wide, r, options), best);
        EXPECT_LE(loss, 1.02 * reference + rounding);
        EXPECT_LE(other_loss, loss + rounding) << "half a pass more can only be better";
        const bool whole_rank = block == short_dim || exact.s[block] <= 1e-12 * exact.s[0];
        for (std::int64_t i = 0; i < r && whole_rank; ++i) EXPECT_NEAR(factors.s[i], exact.s[i], noise(w));
      }
    }
  }
};

TEST_P(SvdTest, EveryClassInF32) {
  for (const WeightClass& weight_class : weight_classes(52, 64)) check(weight_class, 4, Format::f32, {2, 4, 8, 12});
}

TEST_P(SvdTest, EveryClassInHalfPrecision) {
  for (const WeightClass& weight_class : weight_classes(50, 40)) {
    check(weight_class, 3, Format::bf16, {8});
    if (weight_class.fits_f16) check(weight_class, 3, Format::f16, {4});
  }
}

// Rows of a projection are as long as their singular values, which f16 alone could not tell from zero; elements near
// 65504, near its least normal number, and below that.
TEST_P(SvdTest, WeightsInF16FromEndToEnd) {
  Random random(12);
  const auto law = [](double exponent) { return [=](std::int64_t i) { return std::pow(i + 1.0, -exponent); }; };
  const auto steep = [](std::int64_t i) { return std::pow(10.0, -static_cast<double>(i) / 3); };
  for (const auto& [name, values] : {std::pair{"law 0.2", with_spectrum(random, 60, 90, law(0.2))},
                                     {"law 1", with_spectrum(random, 90, 60, law(1.0))},
                                     {"steep", with_spectrum(random, 60, 90, steep)}}) {
    double largest = 0;
    for (const double value : values.values) largest = std::max(largest, std::fabs(value));
    for (const double target : {65000.0, 1.0, 1e-2, 0x1p-13, 0x1p-18}) {
      check({name, true, (target / largest) * values}, 6, Format::f16, {4, 10});
    }
  }
}

TEST_P(SvdTest, FullRank) {
  for (const WeightClass& weight_class : weight_classes(24, 31)) check(weight_class, 24, Format::f32, {2, 8});
}

TEST_P(SvdTest, AWeightInNf4) {
  Random random(4);
  const StoredNf4 weight(random, 45, 77, 32, true);
  const Dense w = weight.values();
  auto cpu = backend();
  expect_sound(w, decompose(cpu, weight.view(), 5, {SvdMethod::krylov, 8, 0}), jacobi_svd(w));
}

TEST_P(SvdTest, TheSameBits) {
  Random random(10);
  for (const std::int64_t rank : {5, 260}) {
    const Stored weight(random.dense(260, rank) * random.dense(rank, 300), Format::bf16);
    for (const SvdMethod method : kMethods) {
      SCOPED_TRACE(::testing::Message() << "rank " << rank << ", method " << static_cast<int>(method));
      expect_same_bits([&](auto& cpu) {
        const Factors factors = decompose(cpu, weight.view(), 8, {method, 4, 1});
        return std::tuple(factors.u.values, factors.s, factors.v.values);
      });
    }
  }
}

// Singular values down to 2e-5 of the largest keep three digits: a block is made orthonormal after every product, not
// every second one, which would square its condition beyond what f32 can tell apart.
TEST_P(SvdTest, SmallSingularValuesOfAGradedSpectrum) {
  Random random(8);
  const auto sigma = [](std::int64_t i) { return std::pow(10.0, -static_cast<double>(i) / 3); };
  const Stored weight(with_spectrum(random, 60, 80, sigma), Format::f32);
  for (const SvdMethod method : kMethods) {
    auto cpu = backend();
    const Factors factors = decompose(cpu, weight.view(), 15, {method, 8, 2});
    for (std::int64_t i = 0; i < 15; ++i) EXPECT_NEAR(factors.s[i] / sigma(i), 1.0, 2e-2) << i;
  }
}

TEST_P(SvdTest, TheSeedMatters) {
  Random random(5);
  const Stored weight(random.dense(60, 80), Format::f32);
  auto cpu = backend();
  EXPECT_NE(decompose(cpu, weight.view(), 4, {SvdMethod::krylov, 2, 0}).s,
            decompose(cpu, weight.view(), 4, {SvdMethod::krylov, 2, 1}).s);
}

template <class F>
void expect_refused(const std::string& argument, F call) {
  try {
    call();
    ADD_FAILURE() << "accepted; expected a complaint about " << argument;
  } catch (const std::invalid_argument& error) {
    EXPECT_EQ(std::string(error.what()).find(argument + ":"), 0u) << error.what();
  }
}

TEST_P(SvdTest, ErrorsNameTheArgument) {
  Random random(8);
  const Stored weight(random.dense(5, 9), Format::f32);
  auto cpu = backend();
  for (const std::int64_t r : {0, -1, 6, 9}) expect_refused("r", [&] { svd_lowrank(cpu, weight.view(), r, {}); });
  for (const std::int64_t passes : {0, -2, 1, 3, 7}) {
    expect_refused("passes", [&] { svd_lowrank(cpu, weight.view(), 2, {SvdMethod::krylov, passes, 0}); });
  }
  expect_refused("r", [&] { svd_lowrank(cpu, Stored(Dense(0, 4), Format::f32).view(), 1, {}); });
}

TEST_P(SvdTest, RefusesWeightsThatAreNotFinite) {
  auto cpu = backend();
  Random random(9);
  for (const double special : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    for (const Format format : kFloatFormats) {
      for (const std::int64_t at : {0, 1023, 1024, 2 * 1500 - 1}) {
        Dense values = random.dense(2, 1500);
        values.values[at] = special;
        const Stored weight(values, format);
        expect_refused("weight", [&] { svd_lowrank(cpu, weight.view(), 1, {}); });
      }
    }
  }
}

PISSA_EVERY_BACKEND(SvdTest);

}  // namespace
}  // namespace pissa::test
