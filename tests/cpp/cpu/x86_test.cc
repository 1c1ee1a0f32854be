// What x86_features() reads, beside what the system says.
#include "pissa/cpu/x86.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <string>

#if defined(_WIN32)
#include <windows.h>
#endif

namespace pissa::cpu {
namespace {

#if defined(PISSA_X86) && defined(__linux__)
TEST(X86, LinuxAgrees) {
  std::ifstream file("/proc/cpuinfo");
  bool intel = false;
  std::set<std::string> flags;  // of the first core
  for (std::string line; flags.empty() && std::getline(file, line);) {
    std::istringstream words(line);
    if (line.starts_with("vendor_id")) intel = line.ends_with("GenuineIntel");
    if (line.starts_with("flags")) flags = {std::istream_iterator<std::string>(words), {}};
  }
  const auto listed = [&](auto... names) { return (flags.contains(names) && ...); };
  const X86Features has = x86_features();
  EXPECT_EQ(has.intel, intel);
  EXPECT_EQ(has.avx2, listed("avx2", "fma", "f16c"));
  EXPECT_EQ(has.avxvnni, has.avx2 && listed("avx_vnni"));
  EXPECT_EQ(has.avx512, has.avx2 && listed("avx512f", "avx512bw", "avx512dq", "avx512vl"));
  EXPECT_EQ(has.avx512vnni, has.avx512 && listed("avx512_vnni"));
  EXPECT_EQ(has.avx512bf16, has.avx512vnni && listed("avx512_bf16"));
  EXPECT_EQ(has.amxbf16, has.avx512bf16 && listed("amx_tile", "amx_bf16"));
}
#endif

#if defined(PISSA_X86) && defined(_WIN32)
TEST(X86, WindowsAgrees) {
  const X86Features has = x86_features();
  EXPECT_EQ(has.avx2, IsProcessorFeaturePresent(PF_AVX2_INSTRUCTIONS_AVAILABLE) != 0);
  // Wine says no to PF_AVX512F_INSTRUCTIONS_AVAILABLE on every processor.
  EXPECT_TRUE(!has.avx512 || (GetEnabledXStateFeatures() & XSTATE_MASK_AVX512) != 0);
}
#endif

}  // namespace
}  // namespace pissa::cpu
