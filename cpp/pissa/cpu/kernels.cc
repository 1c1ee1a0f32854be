// The CPU kernels, compiled once per instruction set, with PISSA_ISA naming it. Nothing here may be shared between
// those builds: no standard library beyond <cstdint>, and everything in an unnamed namespace or inlined by force.
#include "pissa/cpu/kernels.h"

#include "pissa/cpu/kernels/decode.h"
#include "pissa/cpu/kernels/gated.h"
#include "pissa/cpu/kernels/gemm.h"
#include "pissa/cpu/kernels/merge_codes.h"
#include "pissa/cpu/kernels/reduce.h"
#include "pissa/cpu/kernels/softmax.h"

namespace pissa::cpu::PISSA_ISA {

#define PISSA_STRINGIFY(name) #name
#define PISSA_NAME(name) PISSA_STRINGIFY(name)

const Kernels& kernels() {
  static constexpr Kernels table = {PISSA_NAME(PISSA_ISA),
                                    PISSA_HAS_BF16,
                                    kLargestByte,
                                    PISSA_HAS_TILES,
                                    true,
                                    Tiles::kRows,
                                    gemm_block,
                                    round_row,
                                    decode,
                                    decode_columns,
                                    encode,
                                    max_abs,
                                    quantize,
                                    quantize_columns,
                                    merge_codes,
                                    merge_columns,
                                    add_scores,
                                    softmax_row,
                                    softmax_backward_row,
                                    gated,
                                    gated_backward,
                                    transpose_matrix,
                                    transpose_to_bf16,
                                    gram};
  return table;
}

}  // namespace pissa::cpu::PISSA_ISA
