// Philox4x32-10, a counter-based random number generator: the n-th draw is a pure function of (seed, n), so that every
// backend, rank and thread count draws the same sketch.
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC'11. (known-answer tests in tests/cpp)
#pragma once

#include <array>
#include <cstdint>

namespace pissa {

using PhiloxBlock = std::array<std::uint32_t, 4>;

/// The 128 random bits of counter `counter` under key `seed`.
constexpr PhiloxBlock philox4x32(PhiloxBlock counter, std::uint64_t seed) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<std::uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

/// Signs of elements [128 * block, 128 * block + 128) of the sketch, one bit each; a set bit is -1.
constexpr PhiloxBlock philox_signs(std::uint64_t block, std::uint64_t seed) {
  return philox4x32({static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), 0, 0}, seed);
}

}  // namespace pissa
