// Which instruction set is chosen. What a machine lacks, or computes wrongly, is planted.
#include "pissa/cpu/choice.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "support/isa_test.h"

namespace pissa::cpu {
namespace {

using GemmBlock = decltype(Kernels::gemm_block);

const Kernels& baseline_kernels() { return kernels("baseline"); }

// The baseline's kernels, said to multiply in tiles, with a product of their own.
template <GemmBlock product>
const Kernels& tiles() {
  static const Kernels table = [] {
    Kernels kernels = baseline_kernels();
    kernels.isa = "tiles";
    kernels.matrix_units = true;
    kernels.gemm_block = product;
    return kernels;
  }();
  return table;
}

void right(const GemmProblem& problem, const Block& block, const Panels& panels) {
  baseline_kernels().gemm_block(problem, block, panels);
}
void forgets_the_last_row(const GemmProblem& problem, const Block& block, const Panels& panels) {
  right(problem, {block.row, block.rows - 1, block.col, block.cols}, panels);
}
void forgets_the_end_of_the_inner_dimension(const GemmProblem& problem, const Block& block, const Panels& panels) {
  Term term = problem.terms[0];
  term.a.cols = term.b.cols -= 1;
  GemmProblem shorter = problem;
  shorter.terms = &term;
  right(shorter, block, panels);
}
void one_sum_is_off_by_one(const GemmProblem& problem, const Block& block, const Panels& panels) {
  right(problem, block, panels);
  static_cast<float*>(problem.out.data)[problem.out.rows * problem.out.ld - 1] += 1.0f;
}

void wrong_in_f32_alone(const GemmProblem& problem, const Block& block, const Panels& panels) {
  if (problem.terms[0].precision == Precision::f32) return one_sum_is_off_by_one(problem, block, panels);
  right(problem, block, panels);
}

template <GemmBlock product>
Choice choice_with_tiles(const std::string& wanted = "") {
  const Candidate candidates[] = {{"baseline", baseline_kernels, nullptr}, {"tiles", tiles<product>, nullptr}};
  return choose(candidates, wanted);
}

template <GemmBlock product>
void expect_fallback() {
  const Choice choice = choice_with_tiles<product>();
  EXPECT_STREQ(choice.kernels->isa, "baseline");
  EXPECT_EQ(choice.unused, std::vector<std::string>{"tiles: its self-test failed"});
  EXPECT_EQ(choice.failure,
            "tiles multiplies wrongly on this machine: its products differ from baseline's, which computes instead");
}

TEST(Choice, TilesThatMultiplyRightAreChosen) {
  const Choice choice = choice_with_tiles<right>();
  EXPECT_STREQ(choice.kernels->isa, "tiles");
  EXPECT_TRUE(choice.unused.empty());
  EXPECT_EQ(choice.failure, "");
}

TEST(Choice, TilesThatMultiplyWronglyAreNot) {
  expect_fallback<forgets_the_last_row>();
  expect_fallback<forgets_the_end_of_the_inner_dimension>();
  expect_fallback<one_sum_is_off_by_one>();
  expect_fallback<wrong_in_f32_alone>();  // as a BLAS may be, which bf16 products need not reach
}

TEST(Choice, WhatTheMachineLacksIsNeitherRunNorTestedAgainst) {
  constexpr auto never = []() -> const Kernels& { throw std::logic_error("called"); };
  const Candidate candidates[] = {{"baseline", baseline_kernels, nullptr},
                                  {"wide", never, "the processor lacks it"},
                                  {"tiles", tiles<one_sum_is_off_by_one>, nullptr},
                                  {"wider", never, "the system does not permit it"}};
  const Choice choice = choose(candidates, "");
  EXPECT_STREQ(choice.kernels->isa, "baseline");
  const std::vector<std::string> unused = {"wide: the processor lacks it", "tiles: its self-test failed",
                                           "wider: the system does not permit it"};
  EXPECT_EQ(choice.unused, unused);
  EXPECT_NE(choice.failure.find("baseline"), std::string::npos) << choice.failure;
  EXPECT_THROW(choose(candidates, "wide"), std::invalid_argument);
}

TEST(Choice, ANameOverridesBothWays) {
  const Choice slower = choice_with_tiles<right>("baseline");
  EXPECT_STREQ(slower.kernels->isa, "baseline");
  EXPECT_EQ(slower.unused, std::vector<std::string>{"tiles: PISSA_ISA is baseline"});
  const Choice untested = choice_with_tiles<one_sum_is_off_by_one>("tiles");
  EXPECT_STREQ(untested.kernels->isa, "tiles");
  EXPECT_EQ(untested.failure, "");
}

using SelfTest = test::IsaTest;

TEST_P(SelfTest, EachInstructionSetPasses) { EXPECT_TRUE(multiply_alike(kernels(), baseline_kernels())); }

PISSA_EVERY_ISA(SelfTest);

}  // namespace
}  // namespace pissa::cpu
