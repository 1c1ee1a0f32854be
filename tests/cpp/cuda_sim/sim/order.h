// Unkind orders.
#pragma once

#include <bit>
#include <cstdint>

namespace cuda_sim::detail {

/// Numbers that are the same in each run of a program (splitmix64).
inline std::uint64_t next_random() {
  static std::uint64_t state = 0;
  std::uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

/// Calls visit(i) once for each i below `count`, in a shuffled order that needs no table: an odd multiple, modulo a
/// power of two, visits all.
template <class F>
void visit_shuffled(std::uint64_t count, F visit) {
  const std::uint64_t mask = std::bit_ceil(count) - 1;
  const std::uint64_t factor = next_random() | 1;
  const std::uint64_t start = next_random();
  for (std::uint64_t i = 0; i <= mask; ++i) {
    const std::uint64_t index = (i * factor + start) & mask;
    if (index < count) visit(index);
  }
}

}  // namespace cuda_sim::detail
