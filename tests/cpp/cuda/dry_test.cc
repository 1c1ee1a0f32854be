// The start of many weights in the simulation's dry mode: what it asks of the libraries, with the shapes of a real
// model.
#include <gtest/gtest.h>

#include <cstdint>
#include <deque>
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
    tasks_.push_back({w, 1.0f, a0, b0});
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

TEST(CudaDry, AStartOf7BReadsEachWeightOnceAPass) {
  const DryMode mode(true);
  Weights weights;
  for (int i = 0; i < 128; ++i) weights.add(4096, 4096, Format::bf16, 128);
  for (int i = 0; i < 64; ++i) weights.add(11008, 4096, Format::bf16, 128);
  for (int i = 0; i < 32; ++i) weights.add(4096, 11008, Format::bf16, 128);
  weights.split({});
  const double elements = 128 * (4096.0 * 4096) + (64 + 32) * (4096.0 * 11008);
  EXPECT_EQ(flops_in_bf16(), 14 * (2.0 * 70 * elements)) << "14 passes, blocks of 70";
  EXPECT_GE(static_cast<double>(cuda_sim::peak_bytes()), 2 * elements) << "the weights";
}

}  // namespace
}  // namespace pissa::test
