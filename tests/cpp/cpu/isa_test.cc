#include "pissa/cpu/isa.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>

#include "pissa/cpu/kernels.h"
#include "pissa/cpu/x86.h"

namespace pissa::cpu {
namespace {

TEST(Isa, BaselineIsAlwaysThereAndFirst) {
  const std::vector<std::string> isas = available_isas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.front(), "baseline");
  EXPECT_EQ(std::set<std::string>(isas.begin(), isas.end()).size(), isas.size()) << "a name occurs twice";
}

#if defined(PISSA_X86)
// VDPBF16PS has half the rate of FMA on Intel's processors, and twice its rate on AMD's.
TEST(Isa, WhichOfTwoIsFasterDependsOnTheVendor) {
  const std::vector<std::string> isas = available_isas();
  const auto place = [&](const char* isa) { return std::find(isas.begin(), isas.end(), isa); };
  if (place("avx512bf16") == isas.end()) return;
  EXPECT_EQ(place("avx512vnni") > place("avx512bf16"), x86_features().intel);
}
#endif

TEST(Isa, EachNameGivesItsOwnTable) {
  for (const std::string& isa : available_isas()) EXPECT_EQ(kernels(isa).isa, isa);
}

TEST(Isa, UnknownNameIsRefusedNamingTheAvailableOnes) {
  try {
    kernels("sse9");
    FAIL() << "accepted";
  } catch (const std::invalid_argument& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("PISSA_ISA"), std::string::npos) << text;
    EXPECT_NE(text.find("'sse9'"), std::string::npos) << text;
    for (const std::string& isa : available_isas()) EXPECT_NE(text.find(isa), std::string::npos) << text;
  }
}

// PISSA_REQUIRE_ISAS=avx512bf16 where green tests have to mean that they ran on it.
TEST(Isa, TheRequiredOnesAreThere) {
  const char* required = std::getenv("PISSA_REQUIRE_ISAS");
  std::istringstream names(required ? required : "");
  const std::vector<std::string> isas = available_isas();
  for (std::string name; std::getline(names, name, ',');) {
    EXPECT_EQ(std::count(isas.begin(), isas.end(), name), 1) << name << " cannot be tested on this machine";
  }
}

// The choice is made once per process, so each case is a process of its own.
void exit_with_choice(const char* wanted, const std::string& expected) {
#if defined(_WIN32)
  _putenv_s("PISSA_ISA", wanted ? wanted : "");  // the empty value removes it
#else
  if (wanted) setenv("PISSA_ISA", wanted, 1);
  else unsetenv("PISSA_ISA");
#endif
  std::_Exit(kernels().isa == expected ? 0 : 1);
}

TEST(IsaDeathTest, TheEnvironmentChooses) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(exit_with_choice(nullptr, available_isas().back()), ::testing::ExitedWithCode(0), "");
  EXPECT_EXIT(exit_with_choice("", available_isas().back()), ::testing::ExitedWithCode(0), "");
  for (const std::string& isa : available_isas()) {
    EXPECT_EXIT(exit_with_choice(isa.c_str(), isa), ::testing::ExitedWithCode(0), "");
  }
}

}  // namespace
}  // namespace pissa::cpu
