// The CUDA backend's products on what cuBLAS leaves open, and does on one device or in one release only: denormals
// taken for zero, sums in f32 that overflow, kernels that need an alignment, no kernel at all; and TF32, which its user
// allows.
#include <cublas_v2.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "pissa/core/fused_linear.h"
#include "pissa/core/grouped_linear.h"
#include "pissa/core/rsvd.h"
#include "pissa/cuda/backend.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/gemm.h"
#include "pissa/cuda/lt_plan.h"
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
  void TearDown() override {
    cuda::LtPlan::forget(cuda::standalone_context());
    cuda_sim::reset_libraries();
    cublasSetMathMode(cuda::standalone_context().blas, CUBLAS_DEFAULT_MATH);
  }
  // Plans that were found before know better.
  void set_no_algorithm_below(std::uint32_t bytes, cuda_sim::NoAlgorithm how = cuda_sim::NoAlgorithm::none_returned) {
    cuda_sim::set_no_algorithm_below(bytes, how);
    cuda::LtPlan::forget(cuda::standalone_context());
  }
  void set_no_algorithm_for(std::uint64_t m, cuda_sim::NoAlgorithm how) {
    cuda_sim::set_no_algorithm_for(m, how);
    cuda::LtPlan::forget(cuda::standalone_context());
  }
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

// Two chunks of the weight are scaled at a time, not all of it.
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
  EXPECT_LE(cuda_sim::peak_bytes() - before, 2 * kChunk + (std::size_t{1} << 15));
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

// ---- Alignment ------------------------------------------------------------------------------------------------------

// y = x W^T + tail + bias in half precision, of operands and with a bias that begin anywhere.
struct Biased {
  Stored x, weight, bias, a, b;
  Term tail;

  Biased(Random& random, std::int64_t lead_of_bias, std::int64_t lead)
      : x(random.dense(20, 64), Format::bf16, Stored::kAligned, lead),
        weight(random.dense(72, 64), Format::bf16, Stored::kAligned, lead),
        bias(random.dense(1, 72), Format::bf16, Stored::kAligned, lead_of_bias),
        a(random.dense(20, 3), Format::bf16),
        b(random.dense(72, 3), Format::bf16),
        tail{a.view(), Op::n, b.view(), Op::t, 0.5f, Precision::bf16} {}

  // The tail is rounded before; where cublasLt refuses what its heuristic knew, so is the tail with the bias.
  void check(TransferringBackend& backend, std::int64_t bf16_roundings = 1) const {
    Stored y = Stored::poisoned(20, 72, Format::bf16, Stored::kAligned, Stored::kAligned);
    backend.weight_gemm_nt(x.view(), weight.view(), 1.0f, Precision::bf16, {&tail, 1}, bias.view(), y.mutable_view());
    const Dense tail_value = 0.5 * (a.values() * transposed(b.values()));
    const Dense value = x.values() * transposed(weight.values()) + tail_value + bias.values();
    const Dense magnitude = absolute(x.values()) * transposed(absolute(weight.values())) +
                            0.5 * (absolute(a.values()) * transposed(absolute(b.values()))) + absolute(bias.values());
    expect_close(y, {value, magnitude}, 64 + 3 + 3, bf16_roundings);
  }
};

// A kernel that adds a bias loads 16 bytes of it.
TEST_F(LibraryModes, ABiasAnywhere) {
  for (const std::int64_t lead : {0, 1, 2, 4, 8}) Biased(random, lead, Stored::kAligned).check(backend);
}

TEST_F(LibraryModes, WithoutAnAlgorithm) {
  using cuda_sim::NoAlgorithm;
  for (const auto how : {NoAlgorithm::none_returned, NoAlgorithm::not_supported, NoAlgorithm::refused_later}) {
    SCOPED_TRACE(static_cast<int>(how));
    set_no_algorithm_below(16, how);
    for (const std::int64_t lead : {1, 4, 8}) {
      Biased(random, 0, lead).check(backend, how == NoAlgorithm::refused_later ? 2 : 1);
      Biased(random, 1, lead).check(backend);
    }
    for (const Op op : {Op::n, Op::t}) {
      const Stored a(random.dense(20, 40), Format::f32),
          b(op == Op::n ? random.dense(40, 30) : random.dense(30, 40), Format::f32);
      const Stored addend(random.dense(20, 30), Format::f32);
      Stored out = Stored::poisoned(20, 30, Format::f32);
      const Term terms[] = {{a.view(), Op::n, b.view(), op, 0.3f}};
      backend.gemm(terms, addend.view(), out.mutable_view());
      const Dense b_values = oriented(b.values(), op);
      expect_close(out,
                   {double{0.3f} * (a.values() * b_values) + addend.values(),
                    double{0.3f} * (absolute(a.values()) * absolute(b_values)) + absolute(addend.values())},
                   43);
    }
  }
}

// Of the chunks of a weight, 64 columns each and a last one of 8: without an algorithm for the last one alone, whether
// its bias has something to be added to or not.
TEST_F(LibraryModes, ABiasOfAChunkWithoutAnAlgorithm) {
  const cuda::Context& context = cuda::standalone_context();
  const StoredNf4 weight(random, 72, 64, 64, false);
  const Stored x(random.dense(20, 64), Format::bf16), a(random.dense(20, 3), Format::bf16),
      b(random.dense(72, 3), Format::bf16), bias(random.dense(1, 72), Format::bf16, Stored::kAligned, 0);
  const Dense w = Stored(weight.values(), Format::bf16).values();
  for (const auto how : {cuda_sim::NoAlgorithm::none_returned, cuda_sim::NoAlgorithm::refused_later}) {
    set_no_algorithm_for(8, how);
    for (const std::size_t terms : {0, 1}) {
      SCOPED_TRACE(::testing::Message() << static_cast<int>(how) << ", " << terms);
      Stored y = Stored::poisoned(20, 72, Format::bf16);
      Staging at(context);
      const std::vector<Term> tail(terms, {at(a.view()), Op::n, at(b.view()), Op::t, 1.0f, Precision::bf16});
      cuda::weight_product(context, at(x.view()), at(weight.view()), Op::t, 1.0f, Precision::bf16, tail,
                           at(bias.view()), at(y.mutable_view()), 1);
      at.finish();
      const double part = static_cast<double>(terms);
      expect_close(y,
                   {x.values() * transposed(w) + part * (a.values() * transposed(b.values())) + bias.values(),
                    absolute(x.values()) * transposed(absolute(w)) +
                        part * (absolute(a.values()) * transposed(absolute(b.values()))) + absolute(bias.values())},
                   64 + 3 + 3, terms == 0 ? 0 : 2);
    }
  }
}

// Of one shape, one after the other: each has the bias that it was given, or none.
TEST_F(LibraryModes, ProductsOfOneShapeHaveTheirOwnBiases) {
  const cuda::Context& context = cuda::standalone_context();
  for (const Format format : {Format::bf16, Format::f32}) {
    const StoredNf4 weight(random, 72, 64, 64, false);
    const Stored x(random.dense(80, 64), format);
    const Dense w = Stored(weight.values(), format).values();
    const Dense product = x.values() * transposed(w), sizes = absolute(x.values()) * transposed(absolute(w));
    for (const double size : {1.0, 0.0, 3.0, 0.0}) {
      const Stored bias(size * random.dense(1, 72), format, Stored::kAligned, 0);
      Stored y = Stored::poisoned(80, 72, format);
      Staging at(context);
      cuda::weight_product(context, at(x.view()), at(weight.view()), Op::t, 1.0f, precision_of(format), {},
                           size == 0.0 ? Matrix{} : at(bias.view()), at(y.mutable_view()), 1 << 20);
      at.finish();
      expect_close(y, {product + bias.values(), sizes + absolute(bias.values())}, 64 + 3);
    }
  }
}

// A stack of products, each of its own matrices; and of f64.
TEST_F(LibraryModes, StacksWithoutAnAlgorithm) {
  set_no_algorithm_below(16);
  const cuda::Context& context = cuda::standalone_context();
  const std::int64_t count = 3, m = 17, n = 5, k = 7;
  const auto stacked = [&](Matrix matrix) {
    matrix.rows /= count;
    matrix.stride = matrix.rows * matrix.ld;
    return matrix;
  };
  const Stored a(random.dense(count * m, k), Format::f32), b(random.dense(count * k, n), Format::f32);
  Stored out = Stored::poisoned(count * m, n, Format::f32, 0, 0);
  Staging at(context);
  const std::vector<Term> terms{{stacked(at(a.view())), Op::n, stacked(at(b.view())), Op::n}};
  MutableMatrix target = at(out.mutable_view());
  target.rows = m;
  target.stride = m * n;
  cuda::sum_of_products(context, terms, {}, target, count);
  at.finish();
  Bounded expected{Dense(0, n), Dense(0, n)};
  for (std::int64_t i = 0; i < count; ++i) {
    const Dense left = rows_of(a.values(), i * m, m), right = rows_of(b.values(), i * k, k);
    for (auto& [part, product] :
         {std::pair(&expected.value, left * right), {&expected.magnitude, absolute(left) * absolute(right)}}) {
      part->rows += m;
      part->values.insert(part->values.end(), product.values.begin(), product.values.end());
    }
  }
  expect_close(out, expected, k + 1);

  const std::vector<double> rows{3, 4, 5}, others{1, 7, 2};  // rows others^T of one row of three
  double product = 0;
  Staging of_f64(context);
  cuda::gram(context, of_f64.upload(rows.data(), 3), of_f64.upload(others.data(), 3), 1, 3, true,
             of_f64.upload(&product, 1, true), 1);
  of_f64.finish();
  EXPECT_EQ(product, 41);
}

// As with an algorithm: (1 + 2^-9) - 1 is 2^-9. The handle is left as it was.
TEST_F(LibraryModes, WithoutAnAlgorithmPartsOfASumAreNotRounded) {
  set_no_algorithm_below(16);
  const cuda::Context& context = cuda::standalone_context();
  cublasSetMathMode(context.blas, CUBLAS_DEFAULT_MATH);
  Dense a_values(20, 4);
  for (std::int64_t i = 0; i < 20; ++i) a_values(i, 0) = 1, a_values(i, 1) = 0x1p-9, a_values(i, 2) = -1;
  const Stored a(a_values, Format::bf16), b(Dense(4, 30, 1), Format::bf16);
  Stored out = Stored::poisoned(20, 30, Format::bf16);
  const Term terms[] = {{a.view(), Op::n, b.view(), Op::n}};
  backend.gemm(terms, {}, out.mutable_view());
  EXPECT_EQ(out.values().values, Dense(20, 30, 0x1p-9).values);
  cublasMath_t mode = CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
  cublasGetMathMode(context.blas, &mode);
  EXPECT_EQ(mode, CUBLAS_DEFAULT_MATH);
}

// x A^T is 2^17, beyond f16's range, and y 2^10 or 3 * 2^10: for few rows, some, and many, and in a group of layers.
TEST_F(LibraryModes, AnXaBeyondTheRangeOfF16) {
  constexpr std::int64_t kIn = 128, kOut = 64, kRank = 2;
  const auto matrix = [](std::int64_t rows, std::int64_t cols, double value, Format format = Format::f32) {
    return Stored(Dense(rows, cols, value), format, Stored::kAligned, Stored::kAligned);
  };
  const Stored dense = matrix(kOut, kIn, 0, Format::f16);
  const std::vector<std::uint8_t> codes(kOut * kIn / 2, 0x77);  // zeros
  const std::vector<float> scales(kOut * kIn / 64, 1.0f);
  Matrix nf4{codes.data(), kOut, kIn, 0, Format::nf4};
  nf4.scales.blocksize = 64;
  nf4.scales.absmax = scales.data();
  const Stored a = matrix(kRank, kIn, 16), b = matrix(kOut, kRank, 0x1p-8);
  const Stored no_a = matrix(kRank, kIn, 0), no_b = matrix(kOut, kRank, 0);
  for (const std::int64_t rows : {4, 40, 150, 300}) {
    const Stored x = matrix(rows, kIn, 64, Format::f16), dy = matrix(rows, kOut, 0x1p-5, Format::f16);
    for (const bool change : {false, true}) {
      for (const Matrix& weight : {dense.view(), nf4}) {
        for (const bool grouped : {false, true}) {
          if (grouped && change) continue;  // no group adds the change alone
          SCOPED_TRACE(::testing::Message() << rows << " " << change << " " << name(weight.format) << " " << grouped);
          Adapter adapter{.a = no_a.view(), .b = no_b.view(), .a0 = a.view(), .b0 = b.view()};
          if (change) adapter = {a.view(), b.view(), a.view(), b.view(), 1.0f, true};
          const double xa_value = change ? 0x1p18 : 0x1p17, y_value = change ? 3072 : 1024;
          Stored y = Stored::poisoned(rows, kOut, Format::f16);
          Stored xa = Stored::poisoned(rows, kRank, Format::f32);
          Stored grad_a = Stored::poisoned(kRank, kIn, Format::f32),
                 grad_b = Stored::poisoned(kOut, kRank, Format::f32);
          const GroupedLayer layer{weight, adapter, 0, rows};
          const std::array grads_a{grad_a.mutable_view()}, grads_b{grad_b.mutable_view()};
          if (grouped) {
            grouped_linear_forward(backend, x.view(), std::span(&layer, 1), y.mutable_view(), xa.mutable_view());
            grouped_linear_backward(backend, dy.view(), x.view(), std::span(&layer, 1), xa.view(), {}, grads_a,
                                    grads_b);
          } else {
            const Format format = FactorSums::kept<cuda::CudaBackend>(x.view(), adapter) ? Format::f16 : Format::f32;
            Stored memory = Stored::poisoned(1, FactorSums::size(adapter), format);
            const FactorSums sums =
                format == Format::f32 ? FactorSums{} : FactorSums::at(memory.mutable_view().data, format, adapter);
            linear_forward(backend, x.view(), weight, {}, adapter, y.mutable_view(), xa.mutable_view(), sums);
            linear_backward(backend, dy.view(), x.view(), weight, adapter, xa.view(), {}, grads_a[0], grads_b[0], sums);
          }
          const auto expect_all = [](const Stored& actual, double value) {
            EXPECT_EQ(actual.values().values, std::vector<double>(actual.values().values.size(), value));
          };
          expect_all(xa, xa_value);
          expect_all(y, y_value);
          expect_all(grad_b, static_cast<double>(rows) * 0x1p-5 * xa_value);
        }
      }
    }
  }
}

// ---- TF32 -----------------------------------------------------------------------------------------------------------

// 1 + 2^-11 is 1 in TF32: what a layer in f32 multiplies is, forward and backward, where its user allows it. With an
// algorithm and without.
TEST_F(LibraryModes, ALayerInTf32WhereItIsAllowed) {
  const double fine = 1 + 0x1p-11;
  const auto matrix = [](std::int64_t rows, std::int64_t cols, double value) {
    return Stored(Dense(rows, cols, value), Format::f32);
  };
  const Stored x = matrix(20, 4, fine), x_one = matrix(20, 4, 1), dy = matrix(20, 30, fine), xa_four = matrix(20, 2, 4);
  const Stored weight = matrix(30, 4, 1), a = matrix(2, 4, 1), b = matrix(30, 2, 1);
  const Adapter adapter{.a = a.view(), .b = b.view(), .a0 = {}, .b0 = {}};
  for (const auto mode : {CUBLAS_DEFAULT_MATH, CUBLAS_PEDANTIC_MATH, CUBLAS_TF32_TENSOR_OP_MATH}) {
    for (const std::uint32_t no_algorithm_below : {0, 512}) {
      SCOPED_TRACE(::testing::Message() << mode << ", " << no_algorithm_below);
      cublasSetMathMode(cuda::standalone_context().blas, mode);
      set_no_algorithm_below(no_algorithm_below);
      const double factor = mode == CUBLAS_TF32_TENSOR_OP_MATH ? 1 : fine;
      const auto expect_all = [&](const Stored& actual, double value) {
        EXPECT_EQ(actual.values().values, std::vector<double>(actual.values().values.size(), value * factor));
      };
      Stored y = Stored::poisoned(20, 30, Format::f32), xa = Stored::poisoned(20, 2, Format::f32);
      linear_forward(backend, x.view(), weight.view(), {}, adapter, y.mutable_view(), xa.mutable_view());
      expect_all(xa, 4);
      expect_all(y, 4 + 2 * 4);
      Stored dx = Stored::poisoned(20, 4, Format::f32);
      Stored grad_a = Stored::poisoned(2, 4, Format::f32), grad_b = Stored::poisoned(30, 2, Format::f32);
      linear_backward(backend, dy.view(), x_one.view(), weight.view(), adapter, xa_four.view(), dx.mutable_view(),
                      grad_a.mutable_view(), grad_b.mutable_view());
      expect_all(dx, 30 + 2 * 30);
      expect_all(grad_a, 20 * 30);
      expect_all(grad_b, 20 * 4);
    }
  }
}

TEST_F(LibraryModes, ADecompositionIsNeverInTf32) {
  const Stored weight(random.dense(40, 70), Format::f32);
  for (const std::uint32_t no_algorithm_below : {0, 512}) {
    set_no_algorithm_below(no_algorithm_below);
    const auto decomposed = [&](cublasMath_t mode) {
      cublasSetMathMode(cuda::standalone_context().blas, mode);
      const auto factors = svd_lowrank(backend, weight.view(), 4, {SvdMethod::krylov, 8, 0});
      std::vector<std::vector<std::uint8_t>> bytes;
      for (const MutableMatrix& factor : {factors.u.view(), factors.s.view(), factors.v.view()}) {
        Stored copied = Stored::poisoned(factor.rows, factor.cols, Format::f32);
        backend.copy(factor, copied.mutable_view());
        bytes.push_back(copied.bytes());
      }
      return bytes;
    };
    EXPECT_TRUE(decomposed(CUBLAS_TF32_TENSOR_OP_MATH) == decomposed(CUBLAS_DEFAULT_MATH));
  }
}

}  // namespace
}  // namespace pissa::test
