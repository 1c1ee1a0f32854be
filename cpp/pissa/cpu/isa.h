// The instruction set that the kernels use: the best one that the machine has, or the one that the user names.
#pragma once

#include <string>
#include <vector>

namespace pissa::cpu {

struct Kernels;

/// Names of the instruction sets for which this build has kernels and which this machine can run, the fastest last.
/// "baseline" is always included, on AArch64 with NEON. The others are "neondot" (the dot-product extension) and
/// "neonbf16" (the BF16 extension) there and, on macOS, "accelerate" (f32 products by Apple's library); on x86-64
/// "avx2" (with FMA and F16C), "avxvnni", "avx512" (F, BW, DQ, VL), "avx512vnni", "avx512bf16" and "amxbf16"
/// (AMX-BF16). On Intel's processors "avx512vnni" is faster than "avx512bf16".
std::vector<std::string> available_isas();

/// The kernels in use: those of the environment variable PISSA_ISA if set, otherwise the fastest. Chosen once.
/// Those that multiply bytes or in matrix units are skipped if they fail a self-test, which takes less than a
/// millisecond. Throws std::invalid_argument if PISSA_ISA names a set that is not available.
const Kernels& kernels();

/// Kernels by name, without a self-test. Throws std::invalid_argument naming the available ones.
const Kernels& kernels(const std::string& isa);

/// "NAME: why not" for each instruction set of this build that is faster than the one in use, the slowest first.
std::vector<std::string> unused_isas();

/// The self-test that failed and its consequence; empty if none did.
std::string isa_failure();

}  // namespace pissa::cpu
