#include "pissa/cpu/isa.h"

#include <cstdlib>

#include "pissa/core/error.h"
#include "pissa/cpu/kernels.h"

#if defined(PISSA_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(PISSA_ARM)
#include <sys/auxv.h>
#elif defined(PISSA_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
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

#if defined(PISSA_X86)
// Whether the processor has AMX-BF16, and Linux lets this process use its registers: asked for once, since Linux 5.16.
bool has_amxbf16() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1U << 22, kTile = 1U << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
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
      if (__builtin_cpu_supports("avx512bf16")) {
        // Before avx512bf16, and so not the default: it has been run on an emulation of the tiles only.
        if (has_amxbf16()) tables.push_back(&amxbf16::kernels());
        tables.push_back(&avx512bf16::kernels());
      }
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
