// split_many: the bits of split for any mixture of weights on any number of threads, and errors that name the weight.
#include "pissa/cpu/split_many.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "pissa/core/split.h"
#include "support/isa_test.h"
#include "support/matrices.h"
#include "support/reference.h"
#include "support/split_layer.h"
#include "support/threads.h"

namespace pissa::test {
namespace {

// Fifteen weights of a size, and, if asked for, one that is larger than all of them together.
std::vector<SplitLayer> layers(bool dominated) {
  Random random(1);
  std::vector<SplitLayer> result;
  for (std::int64_t i = 0; i < 15; ++i) {
    result.emplace_back(random.dense(20 + 7 * i % 31, 90 - 11 * i % 60), kFloatFormats.begin()[i % 3], 1 + i % 9,
                        0.5f + static_cast<float>(i));
  }
  if (dominated) result.emplace(result.begin() + 4, random.dense(260, 330), Format::bf16, 8, 2.0f);
  return result;
}

std::vector<SplitTask> tasks_of(std::vector<SplitLayer>& layers) {
  std::vector<SplitTask> tasks;
  for (SplitLayer& layer : layers) tasks.push_back(layer.task());
  return tasks;
}

class SplitManyTest : public IsaTest {};

TEST_P(SplitManyTest, BitsOfSplit) {
  for (const bool dominated : {false, true}) {
    std::vector<SplitLayer> expected = layers(dominated);
    cpu::CpuBackend cpu = backend();
    for (const SplitTask& task : tasks_of(expected)) {
      split(cpu, task.w, task.scaling, {}, task.a0, task.b0, std::nullopt, task.s);
    }
    for (const int threads : {1, 2, 3, 7, 40}) {
      SCOPED_TRACE(::testing::Message() << threads << " threads, " << (dominated ? "one large" : "all small"));
      std::vector<SplitLayer> got = layers(dominated);
      const CountedThreads executor(threads);
      cpu::split_many(tasks_of(got), {}, executor, kernels());
      for (std::size_t i = 0; i < got.size(); ++i) {
        EXPECT_TRUE(got[i].a0.bytes() == expected[i].a0.bytes()) << i;
        EXPECT_TRUE(got[i].b0.bytes() == expected[i].b0.bytes()) << i;
        EXPECT_TRUE(got[i].s.bytes() == expected[i].s.bytes()) << i;
      }
      // Small weights are one region; a large one alone has more.
      if (threads > 1 && threads < 15) {
        EXPECT_EQ(executor.shared > 1, dominated);
      }
    }
  }
}

TEST_P(SplitManyTest, Nothing) { cpu::split_many({}, {}, cpu::ThreadExecutor(2), kernels()); }

PISSA_EVERY_ISA(SplitManyTest);

std::string refusal(std::vector<SplitLayer>& layers, const SvdOptions& options = {}) {
  try {
    cpu::split_many(tasks_of(layers), options, cpu::ThreadExecutor(2), cpu::kernels());
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

TEST(SplitManyErrors, NameTheFirstBadWeight) {
  for (const bool dominated : {false, true}) {
    std::vector<SplitLayer> bad = layers(dominated);
    for (const std::size_t i : {4, 11}) {
      Dense values = bad[i].weight.values();
      values(1, 2) = std::numeric_limits<double>::quiet_NaN();
      bad[i].weight = Stored(values, Format::f32);
    }
    EXPECT_EQ(refusal(bad).find("weights[4]: weight: contains NaN or Inf"), 0u) << refusal(bad);
  }
}

TEST(SplitManyErrors, BadArgumentsWriteNothing) {
  const std::vector<SplitLayer> untouched = layers(false);
  const auto expect_refused = [&](std::vector<SplitLayer> bad, const SvdOptions& options, const std::string& words) {
    EXPECT_EQ(refusal(bad, options).find(words), 0u) << refusal(bad, options);
    for (std::size_t i = 0; i < bad.size(); ++i) {
      if (bad[i].a0.view().rows == untouched[i].a0.view().rows) {
        EXPECT_TRUE(bad[i].a0.bytes() == untouched[i].a0.bytes()) << i;
        EXPECT_TRUE(bad[i].b0.bytes() == untouched[i].b0.bytes()) << i;
      }
    }
  };
  std::vector<SplitLayer> bad = layers(false);
  bad[14].scaling = 0;
  expect_refused(bad, {}, "weights[14]: scaling: got 0");
  bad[9] = SplitLayer(Dense(6, 8), Format::f32, 7, 1.0f);
  expect_refused(bad, {}, "weights[9]: r: got 7");
  expect_refused(layers(false), {SvdMethod::krylov, 3, 0}, "weights[0]: passes: got 3");
}

}  // namespace
}  // namespace pissa::test
