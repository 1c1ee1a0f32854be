#include "pissa/cpu/isa.h"

#include <cstdlib>

#include "pissa/core/error.h"
#include "pissa/cpu/kernels.h"

#if defined(PISSA_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(PISSA_ARM)
#include <sys/auxv.h>
#endif

namespace pissa::cpu {
namespace {

#if defined(PISSA_ARM)
bool has_bf16() {
#if defined(__APPLE__)
  int has = 0;
  std::size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  constexpr unsigned long kHwcap2Bf16 = 1UL << 14;  // HWCAP2_BF16 of Linux, which older headers lack
  return (getauxval(AT_HWCAP2) & kHwcap2Bf16) != 0;
#endif
}
#endif

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables{&baseline::kernels()};
#if defined(PISSA_ARM)
  if (has_bf16()) tables.push_back(&neonbf16::kernels());
#elif defined(PISSA_X86)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    tables.push_back(&avx2::kernels());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      tables.push_back(&avx512::kernels());
      if (__builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512bf16::kernels());
    }
  }
#endif
  return tables;
}

const Kernels& from_environment() {
  const char* wanted = std::getenv("PISSA_ISA");
  return wanted && *wanted ? kernels(wanted) : *available().back();
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : available()) names.emplace_back(table->isa);
  return names;
}

const Kernels& kernels(const std::string& isa) {
  std::string names;
  for (const Kernels* table : available()) {
    if (isa == table->isa) return *table;
    names += names.empty() ? "" : ", ";
    names += table->isa;
  }
  PISSA_CHECK(false, "PISSA_ISA: got '", isa, "'; this build on this machine has: ", names);
  __builtin_unreachable();
}

const Kernels& kernels() {
  static const Kernels& chosen = from_environment();
  return chosen;
}

}  // namespace pissa::cpu
