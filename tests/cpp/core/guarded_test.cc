// The core's algorithms never read through a backend's pointer: they run on guarded memory, with the CPU backend's
// results.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "pissa/core/fused_linear.h"
#include "pissa/core/split.h"
#include "pissa/cpu/isa.h"
#include "support/guarded_backend.h"
#include "support/matrices.h"
#include "support/quantized_result.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

class GuardedTest : public ::testing::Test {
 protected:
  cpu::ThreadExecutor executor{2};
  cpu::CpuBackend cpu{executor, cpu::kernels()};
  Device device;
  GuardedBackend guarded{device, cpu};

  // Where a matrix lies for each of the two backends.
  MutableMatrix on_device(std::int64_t rows, std::int64_t cols, Format format) {
    return {device.allocate(rows * cols * element_size(format)), rows, cols, cols, format};
  }
  MutableMatrix on_host(std::int64_t rows, std::int64_t cols, Format format) {
    auto& bytes = host_.emplace_back(rows * cols * element_size(format) + 1);
    return {bytes.data(), rows, cols, cols, format};
  }
  Matrix upload(const Matrix& matrix) { return upload(matrix, code_bytes(matrix.format, matrix.rows * matrix.cols)); }
  Matrix upload(const Matrix& matrix, std::int64_t bytes) {
    Matrix result = matrix;
    result.data =
        device.upload(std::span(static_cast<const std::uint8_t*>(matrix.data), static_cast<std::size_t>(bytes)));
    if (is_quantized(matrix.format)) {
      const std::size_t blocks = static_cast<std::size_t>(ceil_div(matrix.rows * matrix.cols, matrix.scales.blocksize));
      Scales& scales = result.scales;
      if (scales.absmax) scales.absmax = device.upload(std::span(scales.absmax, blocks));
      if (scales.absmax8) {
        scales.absmax8 = device.upload(std::span(scales.absmax8, blocks));
        scales.nested_absmax = device.upload(std::span(scales.nested_absmax, (blocks + 255) / 256));
        scales.offset = device.upload(std::span(scales.offset, 1));
      }
    }
    return result;
  }
  Matrix upload(const Stored& stored) {
    return upload(stored.view(), static_cast<std::int64_t>(stored.bytes().size()) - element_size(stored.format()));
  }
  void expect_same(const MutableMatrix& guarded_result, const MutableMatrix& cpu_result) const {
    const std::int64_t bytes = cpu_result.rows * cpu_result.cols * element_size(cpu_result.format);
    EXPECT_EQ(std::memcmp(device.download(guarded_result.data, bytes).data(), cpu_result.data,
                          static_cast<std::size_t>(bytes)),
              0);
  }

 private:
  std::vector<std::vector<std::uint8_t>> host_;
};

TEST_F(GuardedTest, SvdLowrank) {
  Random random(1);
  for (const auto& [rows, cols] : {std::pair{60, 90}, {90, 60}}) {
    for (const std::int64_t rank : {3, 60}) {  // full rank, and a basis that is the whole space
      for (const SvdMethod method : {SvdMethod::krylov, SvdMethod::subspace}) {
        const Stored weight(random.dense(rows, rank) * random.dense(rank, cols), Format::bf16);
        const auto there = svd_lowrank(guarded, upload(weight), 5, {method, 8, 3});
        const auto here = svd_lowrank(cpu, weight.view(), 5, {method, 8, 3});
        expect_same(there.s.view(), here.s.view());
        expect_same(there.u.view(), here.u.view());
        expect_same(there.v.view(), here.v.view());
      }
    }
  }
}

TEST_F(GuardedTest, SplitAndSplitQuantized) {
  Random random(2);
  const Stored weight(random.dense(45, 61), Format::f32);
  const Matrix device_weight = upload(weight);
  const auto split_both = [&](auto run) {
    const MutableMatrix a_there = on_device(4, 61, Format::f32), b_there = on_device(45, 4, Format::f32);
    const MutableMatrix a_here = on_host(4, 61, Format::f32), b_here = on_host(45, 4, Format::f32);
    run(guarded, device_weight, a_there, b_there);
    run(cpu, weight.view(), a_here, b_here);
    expect_same(a_there, a_here);
    expect_same(b_there, b_here);
  };
  split_both([](auto& backend, const Matrix& w, const MutableMatrix& a0, const MutableMatrix& b0) {
    split(backend, w, 2.0f, {}, a0, b0);
  });

  for (const Format format : kQuantizedFormats) {
    QuantizedResult result(format, 45, 61);
    const QuantOutput here = result.output();
    QuantOutput there = here;
    there.codes = device.upload(std::span(result.codes));
    there.scales = device.upload(std::span(result.scales));
    split_both([&](auto& backend, const Matrix& w, const MutableMatrix& a0, const MutableMatrix& b0) {
      split_quantized(backend, w, 2.0f, {}, a0, b0, w.data == device_weight.data ? there : here);
    });
    EXPECT_EQ(device.download(there.codes, static_cast<std::int64_t>(result.codes.size())), result.codes);
    const std::size_t bytes = result.scales.size() * sizeof(float);
    EXPECT_EQ(std::memcmp(device.download(there.scales, static_cast<std::int64_t>(bytes)).data(), here.scales, bytes),
              0);
  }
}

TEST_F(GuardedTest, LinearAndAddLowRank) {
  Random random(3);
  const std::int64_t tokens = 7, in = 45, out = 38, r = 3;
  const Stored x(random.dense(tokens, in), Format::bf16), dy(random.dense(tokens, out), Format::bf16);
  const Stored bias(random.dense(1, out), Format::bf16), dense_weight(random.dense(out, in), Format::f16);
  const Stored delta_a(random.dense(r, in), Format::f32), delta_b(random.dense(out, r), Format::f32);
  const Stored a0(random.dense(r, in), Format::f32), b0(random.dense(out, r), Format::f32);
  const StoredNf4 plain(random, out, in, 64, false), nested(random, out, in, 64, true);
  const StoredInt8 int8(random, out, in);

  struct Weight {
    Matrix here, there;
  };
  for (const Weight& weight :
       {Weight{dense_weight.view(), upload(dense_weight)}, Weight{plain.view(), upload(plain.view())},
        Weight{nested.view(), upload(nested.view())}, Weight{int8.view(), upload(int8.view())}}) {
    for (const int kind : {0, 1, 2, 3}) {  // no adapter, LoRA, stored, implicit
      SCOPED_TRACE(kind);
      std::vector<MutableMatrix> results[2];
      for (const bool on_guarded : {false, true}) {
        const auto place = [&](const Stored& stored) { return on_guarded ? upload(stored) : stored.view(); };
        const auto result = [&](std::int64_t rows, std::int64_t cols, Format format) {
          return results[on_guarded].emplace_back(on_guarded ? on_device(rows, cols, format)
                                                             : on_host(rows, cols, format));
        };
        Adapter adapter;
        if (kind > 0) adapter = {place(delta_a), place(delta_b), {}, {}, 0.5f, kind == 3};
        if (kind > 1) {
          adapter.a0 = place(a0);
          adapter.b0 = place(b0);
        }
        const auto run = [&](auto& backend) {
          const Matrix x_here = place(x), w = on_guarded ? weight.there : weight.here;
          const MutableMatrix xa = kind > 0 ? result(tokens, r, Format::f32) : MutableMatrix{};
          const MutableMatrix grad_a = kind > 0 ? result(r, in, Format::f32) : MutableMatrix{};
          const MutableMatrix grad_b = kind > 0 ? result(out, r, Format::f32) : MutableMatrix{};
          linear_forward(backend, x_here, w, place(bias), adapter, result(tokens, out, Format::bf16), xa);
          linear_backward(backend, place(dy), x_here, w, adapter, xa, result(tokens, in, Format::bf16), grad_a, grad_b);
          if (kind == 0) return;
          const MutableMatrix change = result(tokens, out, Format::bf16);
          add_low_rank_forward(backend, place(dy), x_here, adapter, change, xa);
          add_low_rank_backward(backend, place(dy), x_here, adapter, xa, result(tokens, in, Format::f32),
                                result(r, in, Format::f32), result(out, r, Format::f32));
        };
        if (on_guarded) run(guarded);
        else run(cpu);
      }
      ASSERT_EQ(results[0].size(), results[1].size());
      for (std::size_t i = 0; i < results[0].size(); ++i) expect_same(results[1][i], results[0][i]);
    }
  }
}

// The guard works: what the core must not do is fatal.
TEST(GuardedDeathTest, AHostReadDies) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const cpu::ThreadExecutor executor(1);
  const cpu::CpuBackend cpu(executor, cpu::kernels());
  Device device;
  GuardedBackend guarded(device, cpu);
  const MutableMatrix matrix = guarded.alloc(2, 3, Format::f32).view();
  guarded.fill_signs(matrix, 0, 1.0f);
  EXPECT_EQ(max_abs(guarded, matrix), 1.0f);
  EXPECT_DEATH(static_cast<void>(*static_cast<const volatile float*>(matrix.data)), "");
}

}  // namespace
}  // namespace pissa::test
