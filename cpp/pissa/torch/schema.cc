// The schemas of torch.ops.pissa.*. python/pissa/ops documents, validates, and registers fakes and gradients.
//
// `largest` is the result of max_abs for the weight: callers that must know whether it is finite have already read it.
// int8: whether a product with the weight may be in Precision::int8.
// kept is what a forward keeps for its backward, in one tensor: Kept in linear.h.
// A quantised weight is (codes, absmax, nested_absmax, offset, format, blocksize), as in core/format.h and Scales:
// fixed slots, not a list of scales. With a list, torch's register_autograd takes 165 us more for a forward and
// backward, and expects a list of None as the result.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pissa, m) {
  m.def("closed_routes(Tensor on) -> int");  // on CUDA: bit i for route i of cuda/routes.h
  m.def("max_abs(Tensor[] weights) -> Tensor");
  m.def(
      "svd_lowrank(Tensor weight, float largest, int r, str svd, int? passes, int seed) -> (Tensor u, Tensor s, "
      "Tensor v)");
  m.def(
      "split_many(Tensor[] weights, float[] largest, int[] ranks, float[] scalings, str svd, int? passes, int seed, "
      "Tensor[]? second_moments=None) "
      "-> (Tensor[] a0, Tensor[] b0, Tensor[] s)");
  m.def("add_second_moment(Tensor(a!) total, Tensor x) -> ()");
  m.def("residual(Tensor weight, Tensor a0, Tensor b0, float scaling) -> Tensor");
  m.def(
      "quantize(Tensor weight, str format, int blocksize, Tensor? global_scale=None) -> (Tensor codes, Tensor absmax)");
  m.def(
      "feedback_codes(Tensor weight, Tensor lower, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str format, "
      "int blocksize) -> Tensor");
  m.def(
      "merge_codes(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str format, int blocksize, "
      "Tensor a, Tensor b, float scaling, Tensor? lower, bool dither, int seed) -> (Tensor codes, Tensor sums)");
  m.def("quantize_absmax(Tensor absmax, Tensor? offset) -> (Tensor codes8, Tensor nested_absmax, Tensor offset)");
  m.def(
      "dequantize(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str format, int blocksize, "
      "int rows, int cols, ScalarType dtype) -> Tensor");
  m.def(
      "dequantize_rows(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str format, int blocksize, "
      "int rows, int cols, Tensor indices, ScalarType dtype) -> Tensor");
  m.def(
      "quantization_error(Tensor weight, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, "
      "str format, int blocksize, Tensor(a!) error) -> Tensor squares");
  m.def(
      "residual_quantized(Tensor weight, Tensor a0, Tensor b0, float scaling, str format, int blocksize) "
      "-> (Tensor codes, Tensor absmax)");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, Tensor? a0, Tensor? b0, float scaling, "
      "bool implicit) -> (Tensor y, Tensor kept)");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? a, Tensor? b, Tensor? a0, Tensor? b0, Tensor kept, "
      "float scaling, bool implicit, bool need_dx) -> (Tensor dx, Tensor grad_a, Tensor grad_b)");
  m.def(
      "quantized_linear(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str format, "
      "int blocksize, int out_features, Tensor? bias, Tensor? a, Tensor? b, Tensor? a0, Tensor? b0, float scaling, "
      "bool implicit, *, bool int8=False) -> (Tensor y, Tensor kept)");
  m.def(
      "quantized_linear_backward(Tensor dy, Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, "
      "Tensor? offset, str format, int blocksize, int out_features, Tensor? a, Tensor? b, Tensor? a0, Tensor? b0, "
      "Tensor kept, float scaling, bool implicit, bool need_dx, *, bool int8=False) -> (Tensor dx, Tensor grad_a, "
      "Tensor grad_b)");
  m.def(
      "grouped_linear(Tensor x, int[] offsets, Tensor[] codes, Tensor[] absmax, Tensor[]? nested_absmax, "
      "Tensor[]? offset, str format, int blocksize, int out_features, Tensor[] a, Tensor[] b, Tensor[]? a0, "
      "Tensor[]? b0, float scaling, *, bool int8=False) -> (Tensor y, Tensor kept)");
  m.def(
      "grouped_linear_backward(Tensor dy, Tensor x, int[] offsets, Tensor[] codes, Tensor[] absmax, "
      "Tensor[]? nested_absmax, Tensor[]? offset, str format, int blocksize, int out_features, Tensor[] a, Tensor[] b, "
      "Tensor[]? a0, Tensor[]? b0, Tensor kept, float scaling, bool need_dx, *, bool int8=False) "
      "-> (Tensor dx, Tensor[] grads_a, Tensor[] grads_b)");
  m.def(
      "add_low_rank(Tensor base, Tensor x, Tensor a, Tensor b, Tensor? a0, Tensor? b0, float scaling, bool implicit) "
      "-> (Tensor y, Tensor kept)");
  m.def(
      "add_low_rank_backward(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor? a0, Tensor? b0, Tensor kept, "
      "float scaling, bool implicit, bool need_dx) -> (Tensor dx, Tensor grad_a, Tensor grad_b)");
  m.def(
      "token_scores(Tensor x, Tensor weight, Tensor? bias, Tensor labels, float scale, float cap, bool need_dx) "
      "-> (Tensor scores, Tensor dx)");
  m.def(
      "quantized_token_scores(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, "
      "str format, int blocksize, int out_features, Tensor? bias, Tensor labels, float scale, float cap, bool need_dx) "
      "-> (Tensor scores, Tensor dx)");
  m.def("rms_norm(Tensor x, Tensor weight, float offset, float eps) -> (Tensor y, Tensor scales)");
  m.def("gated(Tensor gate, Tensor up, str activation) -> Tensor");
  m.def("gated_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor scales, float offset) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) "
      "-> (Tensor out, Tensor log_sums)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor log_sums, "
      "float scale, bool causal) -> (Tensor dq, Tensor dk, Tensor dv)");
}
