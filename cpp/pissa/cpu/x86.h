// What this machine's x86-64 processor has, for isa.cc. Read from CPUID rather than by __builtin_cpu_supports, which
// GCC and clang give their own tables: GCC 12's knows no AVX-VNNI, and zig 0.17's runtime library never fills its table
// in, so that every answer is no.
#pragma once

namespace pissa::cpu {

/// Of instructions whose registers the system saves. AMX's have to be asked for, too.
struct X86Features {
  bool intel = false;  // the vendor
  bool avx2 = false;   // with FMA and F16C
  bool avxvnni = false;
  bool avx512 = false;  // F, BW, DQ and VL
  bool avx512vnni = false;
  bool avx512bf16 = false;
  bool amxbf16 = false;
};

X86Features x86_features();

}  // namespace pissa::cpu
