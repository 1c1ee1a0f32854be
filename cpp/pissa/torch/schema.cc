// The schemas of torch.ops.pissa.*. python/pissa/ops.py documents, validates, and registers fakes and gradients.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pissa, m) {
  m.def("svd_lowrank(Tensor weight, int r, str svd, int? passes, int seed) -> (Tensor u, Tensor s, Tensor v)");
  m.def("split(Tensor weight, int r, float scaling, str svd, int? passes, int seed) -> (Tensor a0, Tensor b0)");
  m.def(
      "split_many(Tensor[] weights, int[] ranks, float[] scalings, str svd, int? passes, int seed) -> (Tensor[] a0, "
      "Tensor[] b0)");
  m.def(
      "split_nf4(Tensor weight, int r, float scaling, str svd, int? passes, int seed, int quant_iters, int blocksize) "
      "-> "
      "(Tensor a0, Tensor b0, Tensor codes, Tensor absmax)");
  m.def("residual(Tensor weight, Tensor a0, Tensor b0, float scaling) -> Tensor");
  m.def(
      "residual_nf4(Tensor weight, Tensor a0, Tensor b0, float scaling, int blocksize) -> (Tensor codes, Tensor "
      "absmax)");
  m.def("nf4_quantize(Tensor weight, int blocksize) -> (Tensor codes, Tensor absmax)");
  m.def("quantize_absmax(Tensor absmax, Tensor offset) -> (Tensor codes8, Tensor nested_absmax)");
  m.def(
      "nf4_dequantize(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, int rows, int cols, "
      "int blocksize, ScalarType dtype) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? delta_a, Tensor? delta_b, Tensor? a0, Tensor? b0, "
      "float scaling, bool implicit) -> (Tensor y, Tensor xa)");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? delta_a, Tensor? delta_b, Tensor? a0, Tensor? b0, "
      "Tensor xa, float scaling, bool implicit, bool need_dx) -> (Tensor dx, Tensor grad_a, Tensor grad_b)");
  m.def(
      "nf4_linear(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, int out_features, "
      "int blocksize, Tensor? bias, Tensor? delta_a, Tensor? delta_b, Tensor? a0, Tensor? b0, float scaling, "
      "bool implicit) -> (Tensor y, Tensor xa)");
  m.def(
      "nf4_linear_backward(Tensor dy, Tensor x, Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, "
      "int out_features, int blocksize, Tensor? delta_a, Tensor? delta_b, Tensor? a0, Tensor? b0, Tensor xa, "
      "float scaling, bool implicit, bool need_dx) -> (Tensor dx, Tensor grad_a, Tensor grad_b)");
  m.def(
      "add_low_rank(Tensor base, Tensor x, Tensor delta_a, Tensor delta_b, Tensor? a0, Tensor? b0, float scaling, "
      "bool implicit) -> (Tensor y, Tensor xa)");
  m.def(
      "add_low_rank_backward(Tensor dy, Tensor x, Tensor delta_a, Tensor delta_b, Tensor? a0, Tensor? b0, Tensor xa, "
      "float scaling, bool implicit, bool need_dx) -> (Tensor dx, Tensor grad_a, Tensor grad_b)");
}
