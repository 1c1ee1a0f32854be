// The CUDA backend's products on what cuBLAS leaves open, and does on one device or in one release only: denormals
// taken for zero, sums in f32 that overflow, kernels that need an alignment, no kernel at all.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "pissa/core/rsvd.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/products.h"
#include "sim/control.h"
#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/reference.h"
#include "support/transferring_backend.h"
#include "support/weight_classes.h"

namespace pissa::test {
namespace {

class LibraryModes : public ::testing::Test {
 protected:
  void TearDown() override { cuda_sim::reset_libraries(); }
  TransferringBackend backend;
  Random random{1};
};

// ---- The ends of the range ------------------------------------------------------------------------------------------

struct Extreme {
  double size;
  float scale;
};
constexpr Extreme kExtremes[] = {{1e37, 0x1p-123f}, {1e-39, 0x1p120f}, {1e-37, 0x1p120f}, {1e25, 0x1p-60f}};

// Rows of 300 elements of one sign: their sum overflows before a scale that comes after it.
TEST_F(LibraryModes, ProductsWithAnExtremeWeight) {
  cuda_sim::set_flush_denormals(true);
  for (const auto& [size, scale] : kExtremes) {
    for (const Format format : {Format::f32, Format::bf16}) {
      for (const Op op : {Op::t, Op::n}) {
        SCOPED_TRACE(::testing::Message() << size << " " << name(format) << (op == Op::t ? " nt" : " nn"));
        const Stored x(absolute(random.dense(20, 300)), Format::f32);
        const Stored weight(size * absolute(op == Op::t ? random.dense(70, 300) : random.dense(300, 70)), format);
        Stored y = Stored::poisoned(20, 70, Format::f32);
        if (op == Op::t) {
          backend.weight_gemm_nt(x.view(), weight.view(), scale, Precision::f32, {}, {}, y.mutable_view());
        } else {
          backend.weight_gemm_nn(x.view(), weight.view(), scale, Precision::f32, {}, y.mutable_view());
        }
        const Dense exact = double{scale} * (x.values() * oriented(weight.values(), op));
        expect_close(y, bounded(exact), 302);
      }
    }
  }
}

// A chunk of the weight is scaled at a time, not all of it.
TEST_F(LibraryModes, AnExtremeWeightIsScaledInBoundedMemory) {
  const cuda::Context& context = cuda::standalone_context();
  Staging at(context);
  const Stored weight_host(1e-39 * random.dense(1024, 256), Format::f32), x_host(random.dense(20, 256), Format::f32);
  const Matrix weight = at(weight_host.view()), x = at(x_host.view());
  const cuda::Buffer y(context, 20, 1024, Format::f32);
  at.finish();
  const std::size_t before = cuda_sim::bytes_in_use();
  cuda_sim::reset_peak_bytes();
  constexpr std::int64_t kChunk = 1 << 17;
  cuda::weight_product(context, x, weight, Op::t, 0x1p120f, Precision::f32, {}, {}, y.view(), kChunk);
  EXPECT_LE(cuda_sim::peak_bytes() - before, kChunk + (std::size_t{1} << 15));
}

TEST_F(LibraryModes, DecompositionsOfExtremeWeights) {
  cuda_sim::set_flush_denormals(true);
  const std::int64_t r = 4;  // with its oversampling as many as the shorter side: nothing is lost
  for (const WeightClass& weight_class : weight_classes(12, 40)) {
    if (weight_class.name != "huge" && weight_class.name != "tiny" && weight_class.name != "denormal") continue;
    for (const Format format : {Format::f32, Format::bf16}) {
      SCOPED_TRACE(weight_class.name);
      const Stored weight(weight_class.values, format);
      const Dense w = weight.values();
      const Svd exact = jacobi_svd(w);
      const auto factors = svd_lowrank(backend, weight.view(), r, {SvdMethod::krylov, 8, 0});
      Stored s = Stored::poisoned(1, r, Format::f32);
      backend.copy(factors.s.view(), s.mutable_view());
      const double noise = 8 * kEps32 * std::sqrt(40.0) * norm(w) + 0x1p-149;
      for (std::int64_t i = 0; i < r; ++i) EXPECT_NEAR(s.values()(0, i), exact.s[i], noise) << i;
    }
  }
}

}  // namespace
}  // namespace pissa::test
