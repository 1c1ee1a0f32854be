// The quantised formats by name: a header each, with what a kernel has to know of its codes. Included by .cu files
// only.
#pragma once

#include <bit>
#include <cstdint>

#include "pissa/cuda/int8_device.h"
#include "pissa/cuda/nf4_device.h"
#include "pissa/cuda/normal_float_device.h"

namespace pissa::cuda {
namespace {

/// f of the codes of a quantised format, on the host.
template <class F>
auto with_codes(Format format, F f) {
  switch (format) {
    case Format::nf4:
      return f(Nf4{});
    case Format::int8:
      return f(Int8{});
    case Format::nf3:
      return f(FewBits<Format::nf3>{});
    case Format::nf2:
      return f(FewBits<Format::nf2>{});
    default:
      __builtin_unreachable();
  }
}

/// Logarithm of a block size; of no meaning where a block is a row.
inline int shift_of(std::int64_t blocksize) { return std::countr_zero(static_cast<std::uint64_t>(blocksize)); }

}  // namespace
}  // namespace pissa::cuda
