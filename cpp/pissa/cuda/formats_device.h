// The quantised formats by name: a header each, with what a kernel has to know of its codes. Included by .cu files
// only.
//
//   Octet, Line          the codes of neighbours that are loaded together
//   Decoder, level_at    numbers from codes
//   element              an element from its code's number and its block's scale
//   Scaling              of a block, given its largest absolute value, whether it is whole, and QuantOutput::global:
//                        the scale that is stored, and the elements as Encoder takes them
//   Encoder, packed      the code of such an element, by all lanes; codes as they are stored
//   nearest              the element nearest to a value, given its block's scale, and its code
#pragma once

#include <bit>
#include <cstdint>

#include "pissa/cuda/four_bits_device.h"
#include "pissa/cuda/fp8_device.h"
#include "pissa/cuda/int8_device.h"
#include "pissa/cuda/nf4_device.h"

namespace pissa::cuda {
namespace {

template <Format format>
struct CodesOfFormat {
  using type = Grouped<format>;
};
template <>
struct CodesOfFormat<Format::nf4> {
  using type = Nf4;
};
template <>
struct CodesOfFormat<Format::int8> {
  using type = Int8;
};
template <>
struct CodesOfFormat<Format::fp8> {
  using type = Fp8;
};
/// The codes of a format with scales beside them.
template <Format format>
using CodesOf = typename CodesOfFormat<format>::type;

/// f of the codes of a quantised format with scales beside them, on the host. The blocks of GGUF are decoded by
/// core/gguf.h.
template <class F>
auto with_codes(Format format, F f) {
  switch (format) {
    case Format::nf4:
      return f(Nf4{});
    case Format::int8:
      return f(Int8{});
    case Format::mxfp4:
      return f(Grouped<Format::mxfp4>{});
    case Format::nvfp4:
      return f(Grouped<Format::nvfp4>{});
    case Format::int4:
      return f(Grouped<Format::int4>{});
    case Format::fp8:
      return f(Fp8{});
    default:
      __builtin_unreachable();
  }
}

/// Logarithm of a block size; of no meaning where blocks are rows or tiles.
inline int shift_of(std::int64_t blocksize) { return std::countr_zero(static_cast<std::uint64_t>(blocksize)); }

}  // namespace
}  // namespace pissa::cuda
