#include "pissa/cpu/choice.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "pissa/core/error.h"
#include "pissa/cpu/backend.h"
#include "pissa/cpu/kernels.h"

namespace pissa::cpu {

Choice choose(std::span<const Candidate> candidates, const std::string& wanted) {
  std::string runnable;
  for (const Candidate& candidate : candidates) {
    if (!candidate.lacking) runnable += (runnable.empty() ? "" : ", ") + std::string(candidate.isa);
  }
  Choice choice{};
  for (auto candidate = candidates.rbegin(); candidate != candidates.rend(); ++candidate) {
    std::string reason;
    if (candidate->lacking) {
      reason = candidate->lacking;
    } else if (!wanted.empty()) {
      if (wanted != candidate->isa) reason = "PISSA_ISA is " + wanted;
    } else if (candidate->kernels().matrix_units || candidate->kernels().bytes) {
      const auto slower = std::find_if(candidate + 1, candidates.rend(), [](const auto& c) { return !c.lacking; });
      if (!multiply_alike(candidate->kernels(), slower->kernels())) {
        reason = "its self-test failed";
        choice.failure = message(candidate->isa, " multiplies wrongly on this machine: its products differ from ",
                                 slower->isa, "'s, which computes instead");
      }
    }
    if (reason.empty()) {
      choice.kernels = &candidate->kernels();
      break;
    }
    choice.unused.insert(choice.unused.begin(), candidate->isa + (": " + reason));
  }
  PISSA_CHECK(choice.kernels, "PISSA_ISA: got '", wanted, "'; this build on this machine has: ", runnable, " [P007]");
  return choice;
}

bool multiply_alike(const Kernels& tested, const Kernels& reference) {
  constexpr std::int64_t kRows = 40, kCols = 72, kInner = 640;  // several tiles and panels, with short last ones
  static_assert(kInner * 128 * 128 < 1 << 24, "a sum of products of bytes would round");
  std::uint32_t state = 1;
  const auto signed_bytes = [&](std::int64_t count, int most) {
    std::vector<std::uint16_t> values(count);
    for (std::uint16_t& value : values) {
      state = 1664525 * state + 1013904223;  // Numerical Recipes' generator, whose high bits are good
      // Every 64 elements contain the largest, so that a byte is its own rounding to 8 bits.
      const bool largest = (&value - values.data()) % 64 == 0;
      const int byte = largest ? most : std::clamp(int{static_cast<std::int8_t>(state >> 24)}, -most, most);
      value = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(byte)) >> 16);
    }
    return values;
  };
  const std::vector<std::uint16_t> x = signed_bytes(kRows * kInner, 127),
                                   w = signed_bytes(kCols * kInner, tested.bytes ? tested.bytes : 127);
  const Matrix a{x.data(), kRows, kInner, kInner, Format::bf16}, b{w.data(), kCols, kInner, kInner, Format::bf16};
  const auto product = [&](const Kernels& kernels, Precision precision) {
    std::vector<float> out(kRows * kCols, std::numeric_limits<float>::quiet_NaN());
    const ThreadExecutor executor(1);
    CpuBackend(executor, kernels)
        .weight_gemm_nt(a, b, 1.0f, precision, {}, {}, {out.data(), kRows, kCols, kCols, Format::f32});
    return out;
  };
  const auto alike = [&](Precision precision, Precision expected) {
    return product(tested, precision) == product(reference, expected);
  };
  if (tested.bytes && !alike(Precision::int8, Precision::f32)) return false;
  return alike(Precision::bf16, Precision::bf16) && alike(Precision::f32, Precision::f32);
}

}  // namespace pissa::cpu
