// The start of many weights in the simulation's dry mode: what it asks of the libraries, with the shapes of a real
// model.
#include <gtest/gtest.h>

#include <cstdint>
#include <deque>
#include <set>
#include <vector>

#include "pissa/cuda/backend.h"
#include "pissa/cuda/split_many.h"
#include "sim/control.h"
#include "sim/ledger.h"

namespace pissa::test {
namespace {

using cuda_sim::Entry;

/// Weights on the device, signs at random, to be split with rank r.
class Weights {
 public:
  void add(std::int64_t rows, std::int64_t cols, Format format, std::int64_t r) {
    const auto make = [this](std::int64_t height, std::int64_t width, Format its_format) {
      return buffers_.emplace_back(context_, height, width, its_format).view();
    };
    const MutableMatrix w = make(rows, cols, format);
    cuda::CudaBackend(context_).fill_signs(w, tasks_.size(), 1.0f);
    const MutableMatrix a0 = make(r, cols, Format::f32), b0 = make(rows, r, Format::f32);
    tasks_.push_back({w, 1.0f, a0, b0, 1.0f});
  }
  /// Returns what it asked of the device.
  std::vector<Entry> split(const SvdOptions& options) const {
    cuda_sim::reset_ledger();
    cuda::split_many(tasks_, options, context_);
    return cuda_sim::ledger();
  }

 private:
  const cuda::Context& context_ = cuda::standalone_context();
  std::deque<cuda::Buffer> buffers_;
  std::vector<SplitTask> tasks_;
};

/// With the mode set for as long as it lives.
struct DryMode {
  explicit DryMode(bool dry) { cuda_sim::set_dry(dry); }
  DryMode(const DryMode&) = delete;
  ~DryMode() { cuda_sim::set_dry(false); }
};

// Here and below, of the library's calls: the products with the weights, by hand. They alone are in bf16, and there is
// one with each weight a pass, as thin as a block.
double flops_in_bf16() {
  return cuda_sim::sum_if([](const Entry& entry) { return entry.type == cuda_sim::Type::bf16; }).flops;
}

TEST(CudaDry, ASmallStartAsksForTheSameAsInEarnest) {
  std::vector<Entry> entries[2];
  for (const bool dry : {false, true}) {
    const DryMode mode(dry);
    Weights weights;
    for (int i = 0; i < 3; ++i) weights.add(40, 60, Format::bf16, 4);
    entries[dry] = weights.split({SvdMethod::krylov, 4, 0});
    EXPECT_EQ(flops_in_bf16(), 3 * 4 * (2.0 * 12 * 40 * 60)) << "3 weights, 4 passes, blocks of 4 + 8";
  }
  ASSERT_EQ(entries[0].size(), entries[1].size());
  for (std::size_t i = 0; i < entries[0].size(); ++i) {
    EXPECT_TRUE(entries[0][i] == entries[1][i]) << i << ": " << entries[0][i].name << " and " << entries[1][i].name;
  }
}

/// Those of Llama-2-7B's linear layers.
Weights weights_of_7b() {
  Weights weights;
  for (int i = 0; i < 128; ++i) weights.add(4096, 4096, Format::bf16, 128);
  for (int i = 0; i < 64; ++i) weights.add(11008, 4096, Format::bf16, 128);
  for (int i = 0; i < 32; ++i) weights.add(4096, 11008, Format::bf16, 128);
  return weights;
}

/// Its start, made once.
class CudaDry7B : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const DryMode mode(true);
    const Weights weights = weights_of_7b();
    const std::size_t before = cuda_sim::bytes_in_use();
    cuda_sim::reset_peak_bytes();
    entries = weights.split({});
    peak_bytes = cuda_sim::peak_bytes() - before;
  }
  inline static std::vector<Entry> entries;
  inline static std::size_t peak_bytes = 0;
};

TEST_F(CudaDry7B, ReadsEachWeightOnceAPass) {
  const double elements = 128 * (4096.0 * 4096) + (64 + 32) * (4096.0 * 11008);
  EXPECT_EQ(flops_in_bf16(), 14 * (2.0 * 70 * elements)) << "14 passes, blocks of 70";
}

// One block of threads a matrix fills the 132 multiprocessors of an H100 only where the stacks are large. With 80 GB
// all weights of a shape are one: of 128, 64 and 32.
TEST_F(CudaDry7B, FactorisesAtLeast64MatricesAtOnce) {
  std::set<std::int64_t> batches;
  for (const Entry& entry : entries) {
    if (entry.name == "cusolverDnDpotrfBatched" || entry.name == "cublasDtrsmBatched") batches.insert(entry.batch);
  }
  EXPECT_EQ(batches, (std::set<std::int64_t>{32, 64, 128}));
  EXPECT_LE(peak_bytes, static_cast<std::size_t>(cuda::kStackBytes));
}

// The host hears of each stack once, whether its weights had full rank, 4 bytes each: it is told their largest
// elements. Products with a weight are a call each, all others one for a stack: 3136 and about 300.
TEST_F(CudaDry7B, WaitsThreeTimesAndTakesFewCallsBesideItsPasses) {
  const auto of_kind = [](cuda_sim::Kind kind) {
    return cuda_sim::sum_if([kind](const Entry& entry) { return entry.kind == kind; });
  };
  EXPECT_EQ(of_kind(cuda_sim::Kind::wait).calls, 3);
  EXPECT_EQ(of_kind(cuda_sim::Kind::copy_to_host).bytes, 224 * 4);
  EXPECT_EQ(of_kind(cuda_sim::Kind::copy_to_device).calls, 0);
  const auto passes = cuda_sim::sum_if([](const Entry& entry) { return entry.type == cuda_sim::Type::bf16; }).calls;
  EXPECT_EQ(passes, 14 * 224);
  EXPECT_LE(of_kind(cuda_sim::Kind::library).calls - passes, 3 * 310);
}

// In f64, of which many cards compute 1/64 as much as in f32, are Gram matrices, of slabs of up to 1024 columns: of 70
// rows of 4096, three a block, seven blocks; and of the long side, of 490 rows for the eigenproblem, in rows of 128 up
// to the diagonal, and of 128 twice. All the rest, factors and eigenproblems, is less than a tenth of it.
TEST_F(CudaDry7B, ComputesLittleElseInF64) {
  const auto in_f64 = [](bool gram) {
    return cuda_sim::sum_if([gram](const Entry& entry) {
             const bool is_gram = entry.name == "cublasLtMatmul" && entry.k >= 11008 % 1024;
             return entry.type == cuda_sim::Type::f64 && is_gram == gram;
           })
        .flops;
  };
  const auto gram = [](double rows, double cols) { return 2 * rows * rows * cols; };
  const double triangle = 128 * 128 + 128 * 256 + 128 * 384 + 106 * 490;
  const auto long_side = [&](double cols) { return 2 * triangle * cols + 2 * gram(128, cols); };
  EXPECT_EQ(in_f64(true), 224 * 21 * gram(70, 4096) + 128 * long_side(4096) + (64 + 32) * long_side(11008));
  EXPECT_LE(in_f64(false), in_f64(true) / 10);
}

}  // namespace
}  // namespace pissa::test
