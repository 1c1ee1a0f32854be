// Which of a build's instruction sets the kernels use, and why not a faster one.
#pragma once

#include <span>
#include <string>
#include <vector>

namespace pissa::cpu {

struct Kernels;

/// An instruction set that the build has kernels for.
struct Candidate {
  const char* isa;
  const Kernels& (*kernels)();  // called only if nothing is lacking
  const char* lacking;          // why this machine cannot run them; nullptr: it can
};

struct Choice {
  const Kernels* kernels;
  std::vector<std::string> unused;  // "NAME: why not" for each faster one, the slowest first
  std::string failure;              // the self-test that failed and what follows; empty: none did
};

/// The fastest of the candidates, which are in the order of speed, the first of them for every machine. One with tiles
/// is not chosen if its self-test against the next slower one fails. A name in `wanted` is chosen instead, untested.
/// Throws std::invalid_argument if this machine cannot run that one.
Choice choose(std::span<const Candidate> candidates, const std::string& wanted);

/// The self-test: whether both multiply two bf16 panels to the same sums. They are integers that f32 adds up exactly,
/// in any order: the error bound is 0.
bool multiply_alike(const Kernels& tested, const Kernels& reference);

}  // namespace pissa::cpu
