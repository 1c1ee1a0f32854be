// The CPU kernels, compiled once per instruction set, with PISSA_ISA naming it. Nothing here may be shared between
// those builds: no standard library beyond <cstdint>, everything in an unnamed namespace or inlined by force.
#include "kernels.h"

#include "kernels/decode.h"
#include "kernels/gemm.h"
#include "kernels/nf4_quantize.h"
#include "kernels/reduce.h"

namespace pissa::cpu::PISSA_ISA {

#define PISSA_STRINGIFY(name) #name
#define PISSA_NAME(name) PISSA_STRINGIFY(name)

const Kernels& kernels() {
  static constexpr Kernels table = {
      PISSA_NAME(PISSA_ISA), PISSA_HAS_BF16, gemm_block, decode, encode, max_abs, nf4_quantize, gram};
  return table;
}

}  // namespace pissa::cpu::PISSA_ISA
