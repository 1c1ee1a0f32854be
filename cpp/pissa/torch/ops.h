// The torch ops: check, allocate, call the core. They are templates over a Device, so that a device's own file only
// says where its backend comes from.
//
// Tensors may be non-contiguous (they are made contiguous) and x may have any number of leading dimensions.
//
// A Device is constructed from the tensors of a call, all on one device, and has
//   backend()                   the backend that computes there, while the Device lives
//   split_many(tasks, options)  the backend's method for many weights
#pragma once

#include <torch/csrc/stable/library.h>

#include "pissa/torch/grouped_linear.h"
#include "pissa/torch/linear.h"
#include "pissa/torch/quantize.h"
#include "pissa/torch/svd.h"
#include "pissa/torch/token_scores.h"

namespace pissa::ops {

template <class Device, class Library>
void implement(Library& m) {
  m.impl("max_abs", TORCH_BOX(&max_abs<Device>));
  m.impl("svd_lowrank", TORCH_BOX(&svd_lowrank<Device>));
  m.impl("split_many", TORCH_BOX(&split_many<Device>));
  m.impl("add_second_moment", TORCH_BOX(&add_second_moment<Device>));
  m.impl("residual", TORCH_BOX(&residual<Device>));
  m.impl("quantize", TORCH_BOX(&quantize<Device>));
  m.impl("feedback_codes", TORCH_BOX(&feedback_codes<Device>));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax<Device>));
  m.impl("dequantize", TORCH_BOX(&dequantize<Device>));
  m.impl("dequantize_rows", TORCH_BOX(&dequantize_rows<Device>));
  m.impl("quantization_error", TORCH_BOX(&quantization_error<Device>));
  m.impl("residual_quantized", TORCH_BOX(&residual_quantized<Device>));
  m.impl("linear", TORCH_BOX(&linear<Device>));
  m.impl("linear_backward", TORCH_BOX(&linear_backward<Device>));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear<Device>));
  m.impl("quantized_linear_backward", TORCH_BOX(&quantized_linear_backward<Device>));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear<Device>));
  m.impl("grouped_linear_backward", TORCH_BOX(&grouped_linear_backward<Device>));
  m.impl("add_low_rank", TORCH_BOX(&add_low_rank<Device>));
  m.impl("add_low_rank_backward", TORCH_BOX(&add_low_rank_backward<Device>));
  m.impl("token_scores", TORCH_BOX(&token_scores<Device>));
  m.impl("quantized_token_scores", TORCH_BOX(&quantized_token_scores<Device>));
}

}  // namespace pissa::ops
