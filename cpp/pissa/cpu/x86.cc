#include "pissa/cpu/x86.h"

#if defined(PISSA_X86)
#include <cpuid.h>

namespace pissa::cpu {
namespace {

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

/// Zeros if the processor lacks the leaf.
Leaf cpuid(unsigned leaf, unsigned subleaf) {
  Leaf found;
  if (!__get_cpuid_count(leaf, subleaf, &found.eax, &found.ebx, &found.ecx, &found.edx)) return {};
  return found;
}

/// Which registers the system saves: XCR0. Only where CPUID says OSXSAVE.
unsigned saved_registers() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

constexpr bool all(unsigned word, unsigned bits) { return (word & bits) == bits; }
constexpr unsigned bit(int n) { return 1U << n; }

}  // namespace

X86Features x86_features() {
  constexpr unsigned kFma = bit(12), kOsxsave = bit(27), kAvx = bit(28), kF16c = bit(29);  // leaf 1, ecx
  constexpr unsigned kAvx2 = bit(5);                                                       // leaf 7, ebx
  constexpr unsigned kAvx512 = bit(16) | bit(17) | bit(30) | bit(31);                      // F, DQ, BW, VL
  constexpr unsigned kAvx512Vnni = bit(11);                                                // leaf 7, ecx
  constexpr unsigned kAmxBf16 = bit(22) | bit(24);                                         // leaf 7, edx
  constexpr unsigned kAvxVnni = bit(4), kAvx512Bf16 = bit(5);                              // leaf 7.1, eax
  constexpr unsigned kYmm = bit(1) | bit(2), kZmm = kYmm | bit(5) | bit(6) | bit(7);       // XCR0
  X86Features found;
  found.intel = cpuid(0, 0).ebx == signature_INTEL_ebx;
  const unsigned basic = cpuid(1, 0).ecx;
  const unsigned saved = all(basic, kOsxsave) ? saved_registers() : 0;
  const Leaf more = cpuid(7, 0);
  const unsigned last = more.eax >= 1 ? cpuid(7, 1).eax : 0;
  found.avx2 = all(saved, kYmm) && all(basic, kAvx | kFma | kF16c) && all(more.ebx, kAvx2);
  found.avxvnni = found.avx2 && all(last, kAvxVnni);
  found.avx512 = found.avx2 && all(saved, kZmm) && all(more.ebx, kAvx512);
  found.avx512vnni = found.avx512 && all(more.ecx, kAvx512Vnni);
  found.avx512bf16 = found.avx512vnni && all(last, kAvx512Bf16);
  found.amxbf16 = found.avx512bf16 && all(more.edx, kAmxBf16);
  return found;
}

}  // namespace pissa::cpu
#endif
