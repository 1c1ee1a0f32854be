// The instruction set that the kernels use, out of those of the build, and why a faster one is not used.
#pragma once

#include <span>
#include <string>
#include <vector>

namespace pissa::cpu {

struct Kernels;

/// An instruction set for which the build has kernels.
struct Candidate {
  const char* isa;
  const Kernels& (*kernels)();  // called only if nothing is lacking
  const char* lacking;          // why this machine cannot run them; nullptr: it can
};

struct Choice {
  const Kernels* kernels;
  std::vector<std::string> unused;  // "NAME: why not" for each faster one, the slowest first
  std::string failure;              // the self-test that failed and its consequence; empty: none did
};

/// The fastest of the candidates, which are ordered by speed and of which the first runs on every machine. One with
/// matrix units, or that multiplies bytes, is not chosen if its self-test against the next slower one fails. A name in
/// `wanted` is chosen instead, untested. Throws std::invalid_argument if this machine cannot run that one.
Choice choose(std::span<const Candidate> candidates, const std::string& wanted);

/// The self-test: whether both multiply two bf16 panels to the same sums, in bf16 and in f32, and whether the tested
/// one does in int8, too, if it can. The sums are integers that f32 adds exactly in any order, so the error bound is 0.
bool multiply_alike(const Kernels& tested, const Kernels& reference);

}  // namespace pissa::cpu
