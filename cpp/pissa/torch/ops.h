// The torch ops: check, allocate, call the core. They are templates over a Device, so that a device's own file only
// says where its backend comes from.
//
// Tensors may be non-contiguous (they are made contiguous) and x may have any number of leading dimensions.
//
// A Device is constructed from the tensors of a call, all on one device, and has
//   backend()                   the backend that computes there, while the Device lives
//   split_many(tasks, options)  the backend's method for many weights
#pragma once

#include "pissa/torch/boxed.h"
#include "pissa/torch/grouped_linear.h"
#include "pissa/torch/linear.h"
#include "pissa/torch/quantize.h"
#include "pissa/torch/svd.h"
#include "pissa/torch/token_scores.h"

namespace pissa::ops {

template <class Device, class Library>
void implement(Library& m) {
  m.impl("max_abs", PISSA_BOX(&max_abs<Device>));
  m.impl("svd_lowrank", PISSA_BOX(&svd_lowrank<Device>));
  m.impl("split_many", PISSA_BOX(&split_many<Device>));
  m.impl("add_second_moment", PISSA_BOX(&add_second_moment<Device>));
  m.impl("residual", PISSA_BOX(&residual<Device>));
  m.impl("quantize", PISSA_BOX(&quantize<Device>));
  m.impl("feedback_codes", PISSA_BOX(&feedback_codes<Device>));
  m.impl("quantize_absmax", PISSA_BOX(&quantize_absmax<Device>));
  m.impl("dequantize", PISSA_BOX(&dequantize<Device>));
  m.impl("dequantize_rows", PISSA_BOX(&dequantize_rows<Device>));
  m.impl("quantization_error", PISSA_BOX(&quantization_error<Device>));
  m.impl("residual_quantized", PISSA_BOX(&residual_quantized<Device>));
  m.impl("linear", PISSA_BOX(&linear<Device>));
  m.impl("linear_backward", PISSA_BOX(&linear_backward<Device>));
  m.impl("quantized_linear", PISSA_BOX(&quantized_linear<Device>));
  m.impl("quantized_linear_backward", PISSA_BOX(&quantized_linear_backward<Device>));
  m.impl("grouped_linear", PISSA_BOX(&grouped_linear<Device>));
  m.impl("grouped_linear_backward", PISSA_BOX(&grouped_linear_backward<Device>));
  m.impl("add_low_rank", PISSA_BOX(&add_low_rank<Device>));
  m.impl("add_low_rank_backward", PISSA_BOX(&add_low_rank_backward<Device>));
  m.impl("token_scores", PISSA_BOX(&token_scores<Device>));
  m.impl("quantized_token_scores", PISSA_BOX(&quantized_token_scores<Device>));
}

}  // namespace pissa::ops
