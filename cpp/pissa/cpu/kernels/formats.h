// The quantised formats by name: one header for each, with what a kernel must know about its codes. Included only by
// kernels.cc.
//
//   decode<Product>     part of a row as elements of the product, each rounded once
//   dots<Product>       whether to use `dot` for a term with that many rows; false is always valid
//   dot<Product>        c = or += the term, directly from the codes
// and, unless the format is read-only:
//   quantize            whole blocks, the last of which may be short where blocks may cross rows
//   nearest             the element nearest to a value, given its block's scale, and its code
//   pack                codes, a byte each, as they are stored
//   block               the block of an element
#pragma once

#include "pissa/cpu/kernels/fp8.h"
#include "pissa/cpu/kernels/gguf.h"
#include "pissa/cpu/kernels/int8.h"
#include "pissa/cpu/kernels/nf4.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// Calls f with the codes of a format that is also written.
template <class F>
PISSA_INLINE auto with_written_codes(Format format, F f) {
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

// Calls f with the codes of a quantised format.
template <class F>
PISSA_INLINE auto with_codes(Format format, F f) {
  if (!is_read_only(format)) return with_written_codes(format, f);
  return with_gguf(format, [&](auto kind) { return f(GgufCodes<decltype(kind)::kFormat>{}); });
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
