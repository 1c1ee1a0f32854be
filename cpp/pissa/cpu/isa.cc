#include "pissa/cpu/isa.h"

#include <cstdlib>

#include "pissa/core/error.h"
#include "pissa/cpu/kernels.h"

namespace pissa::cpu {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables{&baseline::kernels()};
#if defined(PISSA_X86)
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
