// Which instruction set the kernels use: the best one that the machine has, or the one that the user names.
#pragma once

#include <string>
#include <vector>

namespace pissa::cpu {

struct Kernels;

/// Names of the instruction sets that this build has kernels for and this machine can run, the default last.
/// "baseline" is always there, on AArch64 with NEON; there also "neonbf16" (the BF16 extension), on x86-64 "avx2" (with
/// FMA and F16C), "avx512" (F, BW, DQ, VL), "amxbf16" (AMX-BF16, not used unless named) and "avx512bf16".
std::vector<std::string> available_isas();

/// The kernels in use: environment variable PISSA_ISA if set, otherwise the default. Read once.
/// Throws std::invalid_argument if PISSA_ISA names a set that is not available.
const Kernels& kernels();

/// Kernels by name. Throws std::invalid_argument naming the available ones.
const Kernels& kernels(const std::string& isa);

}  // namespace pissa::cpu
