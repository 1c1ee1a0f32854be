// The torch ops: check, allocate, call the core. Templates over a Device, so that a device's own file says only where
// its backend comes from. Arguments were validated in python/pissa/ops.py with better messages; what is checked here
// again is what would otherwise read or write out of bounds. Exceptions keep their text; which Python type they become
// depends on the torch version.
//
// Tensors may be non-contiguous (they are made contiguous) and x may have any number of leading dimensions.
//
// A Device is made from the tensors of a call, all on one device, and has
//   backend()                   the backend that computes there, while the Device lives
//   split_many(tasks, options)  the backend's way with many weights
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "pissa/core/error.h"
#include "pissa/core/fused_linear.h"
#include "pissa/core/nf4.h"
#include "pissa/core/rsvd.h"
#include "pissa/core/split.h"

namespace pissa::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Codec codec_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Codec::f32;
    case ScalarType::BFloat16:
      return Codec::bf16;
    case ScalarType::Half:
      return Codec::f16;
    default:
      PISSA_CHECK(false, "dtype: allowed are float32, bfloat16 and float16");
  }
  return Codec::f32;
}

inline Tensor new_tensor(const Tensor& like, const std::vector<std::int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// A tensor [..., cols] as a matrix [rows, cols].
inline Matrix matrix(const Tensor& tensor) {
  PISSA_CHECK(tensor.dim() >= 1, "a tensor with at least one dimension is needed");
  const std::int64_t cols = tensor.size(tensor.dim() - 1);
  const std::int64_t rows = cols == 0 ? 0 : tensor.numel() / cols;
  return {tensor.const_data_ptr(), rows, cols, cols, codec_of(tensor.scalar_type())};
}

inline MutableMatrix mutable_matrix(const Tensor& tensor) {
  const Matrix view = matrix(tensor);
  return {tensor.mutable_data_ptr(), view.rows, view.cols, view.ld, view.codec};
}

// Throws unless every tensor is where the first one is: what a device is handed is read without looking.
inline void check_same_device(const Tensor& first, const Tensor& other) {
  PISSA_CHECK(first.is_cpu() == other.is_cpu() && first.get_device_index() == other.get_device_index(),
              "all tensors must be on one device");
}
inline void check_same_device(const Tensor& first, const OptionalTensor& other) {
  if (other) check_same_device(first, *other);
}
inline void check_same_device(const Tensor& first, const std::vector<Tensor>& others) {
  for (const Tensor& other : others) check_same_device(first, other);
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

inline void check_shape(const char* name, const Matrix& got, std::int64_t rows, std::int64_t cols) {
  PISSA_CHECK(got.rows == rows && got.cols == cols, name, ": got shape [", got.rows, ", ", got.cols, "]; needed: [",
              rows, ", ", cols, "]");
}

// passes: none, as many as the rank needs.
inline SvdOptions svd_options(const std::string& svd, std::optional<std::int64_t> passes, std::int64_t seed) {
  PISSA_CHECK(svd == "krylov" || svd == "subspace", "svd: got '", svd, "'; allowed: 'krylov', 'subspace'");
  return {svd == "krylov" ? SvdMethod::krylov : SvdMethod::subspace, passes, static_cast<std::uint64_t>(seed)};
}

// NF4 codes and scales as they cross the op boundary.
struct Nf4Tensors {
  Tensor codes;
  Tensor absmax;  // float32, or uint8 when nested
  OptionalTensor nested_absmax;
  OptionalTensor offset;

  Nf4Tensors(const Tensor& codes_, const Tensor& absmax_, const OptionalTensor& nested, const OptionalTensor& offset_)
      : codes(torch::stable::contiguous(codes_)),
        absmax(torch::stable::contiguous(absmax_)),
        nested_absmax(contiguous(nested)),
        offset(contiguous(offset_)) {}

  Matrix view(std::int64_t rows, std::int64_t cols, std::int64_t blocksize) const {
    PISSA_CHECK(is_nf4_blocksize(blocksize), "blocksize: got ", blocksize, "; allowed: a power of two from 32 to 4096");
    const std::int64_t blocks = ceil_div(rows * cols, blocksize);
    PISSA_CHECK(codes.scalar_type() == ScalarType::Byte && codes.numel() == nf4_bytes(rows * cols), "codes: got ",
                codes.numel(), " elements; needed: ", nf4_bytes(rows * cols), " bytes of uint8 for [", rows, ", ", cols,
                "]");
    PISSA_CHECK(absmax.numel() == blocks, "absmax: got ", absmax.numel(), " elements; needed: ", blocks);
    Matrix result{codes.const_data_ptr(), rows, cols, cols, Codec::nf4};
    result.scales.blocksize = blocksize;
    if (!nested_absmax) {
      PISSA_CHECK(absmax.scalar_type() == ScalarType::Float,
                  "absmax: needed float32, or uint8 with nested_absmax and offset");
      result.scales.absmax = absmax.const_data_ptr<float>();
      return result;
    }
    PISSA_CHECK(absmax.scalar_type() == ScalarType::Byte && nested_absmax->scalar_type() == ScalarType::Float &&
                    nested_absmax->numel() == ceil_div(blocks, kNestedBlocksize) && offset &&
                    offset->scalar_type() == ScalarType::Float && offset->numel() == 1,
                "nested scales: needed absmax uint8 [", blocks, "], nested_absmax float32 [",
                ceil_div(blocks, kNestedBlocksize), "], offset float32 []");
    result.scales.absmax8 = absmax.const_data_ptr<std::uint8_t>();
    result.scales.nested_absmax = nested_absmax->const_data_ptr<float>();
    result.scales.offset = offset->const_data_ptr<float>();
    return result;
  }
};

// The adapter's factors as they cross the op boundary: all of delta_a and delta_b, and a0 and b0, or neither.
struct AdapterTensors {
  OptionalTensor delta_a, delta_b, a0, b0;
  float scaling;
  bool implicit;

  AdapterTensors(const OptionalTensor& delta_a_, const OptionalTensor& delta_b_, const OptionalTensor& a0_,
                 const OptionalTensor& b0_, double scaling_, bool implicit_)
      : delta_a(contiguous(delta_a_)),
        delta_b(contiguous(delta_b_)),
        a0(contiguous(a0_)),
        b0(contiguous(b0_)),
        scaling(static_cast<float>(scaling_)),
        implicit(implicit_) {
    PISSA_CHECK(delta_a.has_value() == delta_b.has_value() && a0.has_value() == b0.has_value() && (delta_a || !a0),
                "factors: give delta_a and delta_b, and a0 and b0, in pairs");
  }

  Adapter view(std::int64_t out, std::int64_t in) const {
    if (!delta_a) return {};
    Adapter adapter;
    const std::int64_t r = delta_a->size(0);
    PISSA_CHECK(r >= 1, "delta_a: got rank 0; needed: at least 1");
    const auto factor = [&](const char* name, const Tensor& tensor, std::int64_t rows, std::int64_t cols) {
      const Matrix view = matrix(tensor);
      check_shape(name, view, rows, cols);
      PISSA_CHECK(view.codec == Codec::f32, name, ": needed float32");
      return view;
    };
    adapter.delta_a = factor("delta_a", *delta_a, r, in);
    adapter.delta_b = factor("delta_b", *delta_b, out, r);
    if (a0) {
      adapter.a0 = factor("a0", *a0, r, in);
      adapter.b0 = factor("b0", *b0, out, r);
    }
    adapter.scaling = scaling;
    adapter.residual = implicit ? Residual::implicit : Residual::stored;
    return adapter;
  }
};

// ---- Decomposition -------------------------------------------------------------------------------------------------

// (u [r, out], s [r], v [r, in]), one singular vector per row.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> svd_lowrank(const Tensor& weight, std::int64_t r, const std::string& svd,
                                               std::optional<std::int64_t> passes, std::int64_t seed) {
  Device device(weight);
  auto& backend = device.backend();
  const Tensor w_tensor = torch::stable::contiguous(weight);
  const Matrix w = matrix(w_tensor);
  const auto factors = pissa::svd_lowrank(backend, w, r, svd_options(svd, passes, seed));
  const Tensor u = new_tensor(weight, {r, w.rows}, ScalarType::Float);
  const Tensor s = new_tensor(weight, {r}, ScalarType::Float);
  const Tensor v = new_tensor(weight, {r, w.cols}, ScalarType::Float);
  backend.copy(factors.u.view(), mutable_matrix(u));
  backend.copy(factors.s.view(), mutable_matrix(s));
  backend.copy(factors.v.view(), mutable_matrix(v));
  return {u, s, v};
}

template <class Device>
std::tuple<Tensor, Tensor> split(const Tensor& weight, std::int64_t r, double scaling, const std::string& svd,
                                 std::optional<std::int64_t> passes, std::int64_t seed) {
  Device device(weight);
  auto& backend = device.backend();
  const Tensor w_tensor = torch::stable::contiguous(weight);
  const Matrix w = matrix(w_tensor);
  const SvdOptions options = svd_options(svd, passes, seed);
  check_svd(w, r, options);  // before r becomes a size
  const Tensor a0 = new_tensor(weight, {r, w.cols}, ScalarType::Float);
  const Tensor b0 = new_tensor(weight, {w.rows, r}, ScalarType::Float);
  pissa::split(backend, w, static_cast<float>(scaling), options, mutable_matrix(a0), mutable_matrix(b0));
  return {a0, b0};
}

template <class Device>
std::tuple<std::vector<Tensor>, std::vector<Tensor>> split_many(const std::vector<Tensor>& weights,
                                                                const std::vector<std::int64_t>& ranks,
                                                                const std::vector<double>& scalings,
                                                                const std::string& svd,
                                                                std::optional<std::int64_t> passes, std::int64_t seed) {
  PISSA_CHECK(!weights.empty() && ranks.size() == weights.size() && scalings.size() == weights.size(),
              "ranks, scalings: got ", ranks.size(), " and ", scalings.size(), "; needed: one for each of the ",
              weights.size(), " weights, of which there must be one");
  Device device(weights[0], weights);
  const SvdOptions options = svd_options(svd, passes, seed);
  std::vector<Tensor> contiguous_weights, a0, b0;
  std::vector<SplitTask> tasks;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    contiguous_weights.push_back(torch::stable::contiguous(weights[i]));
    const Matrix w = matrix(contiguous_weights.back());
    check_svd(w, ranks[i], options);  // before the rank becomes a size
    a0.push_back(new_tensor(weights[i], {ranks[i], w.cols}, ScalarType::Float));
    b0.push_back(new_tensor(weights[i], {w.rows, ranks[i]}, ScalarType::Float));
    tasks.push_back({w, static_cast<float>(scalings[i]), mutable_matrix(a0.back()), mutable_matrix(b0.back())});
  }
  device.split_many(tasks, options);
  return {a0, b0};
}

// codes and absmax for a weight of `count` elements
inline std::tuple<Tensor, Tensor, Nf4Output> new_nf4(const Tensor& like, std::int64_t count, std::int64_t blocksize) {
  PISSA_CHECK(is_nf4_blocksize(blocksize), "blocksize: got ", blocksize, "; allowed: a power of two from 32 to 4096");
  const Tensor codes = new_tensor(like, {nf4_bytes(count)}, ScalarType::Byte);
  const Tensor absmax = new_tensor(like, {ceil_div(count, blocksize)}, ScalarType::Float);
  return {codes, absmax,
          Nf4Output{blocksize, codes.mutable_data_ptr<std::uint8_t>(), absmax.mutable_data_ptr<float>()}};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> split_nf4(const Tensor& weight, std::int64_t r, double scaling,
                                                     const std::string& svd, std::optional<std::int64_t> passes,
                                                     std::int64_t seed, std::int64_t quant_iters,
                                                     std::int64_t blocksize) {
  Device device(weight);
  auto& backend = device.backend();
  const Tensor w_tensor = torch::stable::contiguous(weight);
  const Matrix w = matrix(w_tensor);
  const SvdOptions options = svd_options(svd, passes, seed);
  check_svd(w, r, options);
  const Tensor a0 = new_tensor(weight, {r, w.cols}, ScalarType::Float);
  const Tensor b0 = new_tensor(weight, {w.rows, r}, ScalarType::Float);
  const auto [codes, absmax, q] = new_nf4(weight, w.rows * w.cols, blocksize);
  pissa::split_nf4(backend, w, static_cast<float>(scaling), options, quant_iters, mutable_matrix(a0),
                   mutable_matrix(b0), q);
  return {a0, b0, codes, absmax};
}

template <class Device>
Tensor residual(const Tensor& weight, const Tensor& a0, const Tensor& b0, double scaling) {
  Device device(weight, a0, b0);
  auto& backend = device.backend();
  const Tensor tensors[] = {torch::stable::contiguous(weight), torch::stable::contiguous(a0),
                            torch::stable::contiguous(b0)};
  const Matrix w = matrix(tensors[0]);
  const Matrix a = matrix(tensors[1]);
  check_shape("a0", a, a.rows, w.cols);
  check_shape("b0", matrix(tensors[2]), w.rows, a.rows);
  const Tensor out = new_tensor(weight, {w.rows, w.cols}, weight.scalar_type());
  const std::array terms{minus_factors(a, matrix(tensors[2]), static_cast<float>(scaling))};
  backend.gemm(terms, w, mutable_matrix(out));
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> residual_nf4(const Tensor& weight, const Tensor& a0, const Tensor& b0, double scaling,
                                        std::int64_t blocksize) {
  Device device(weight, a0, b0);
  auto& backend = device.backend();
  const Tensor tensors[] = {torch::stable::contiguous(weight), torch::stable::contiguous(a0),
                            torch::stable::contiguous(b0)};
  const Matrix w = matrix(tensors[0]);
  const Matrix a = matrix(tensors[1]);
  check_shape("a0", a, a.rows, w.cols);
  check_shape("b0", matrix(tensors[2]), w.rows, a.rows);
  const auto [codes, absmax, q] = new_nf4(weight, w.rows * w.cols, blocksize);
  const std::array terms{minus_factors(a, matrix(tensors[2]), static_cast<float>(scaling))};
  backend.gemm_nf4(terms, w, q);
  return {codes, absmax};
}

// ---- NF4 -----------------------------------------------------------------------------------------------------------

template <class Device>
std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight, std::int64_t blocksize) {
  Device device(weight);
  auto& backend = device.backend();
  const Tensor w = torch::stable::contiguous(weight);
  const auto [codes, absmax, q] = new_nf4(weight, w.numel(), blocksize);
  backend.gemm_nf4({}, matrix(w), q);
  return {codes, absmax};
}

template <class Device>
std::tuple<Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& offset) {
  Device device(absmax, offset);
  auto& backend = device.backend();
  PISSA_CHECK(
      absmax.scalar_type() == ScalarType::Float && offset.scalar_type() == ScalarType::Float && offset.numel() == 1,
      "absmax, offset: needed float32 [blocks] and float32 []");
  const Tensor from = torch::stable::contiguous(absmax);
  const std::int64_t count = from.numel();
  const Tensor codes8 = new_tensor(absmax, {count}, ScalarType::Byte);
  const Tensor nested = new_tensor(absmax, {ceil_div(count, kNestedBlocksize)}, ScalarType::Float);
  backend.quantize_absmax(from.const_data_ptr<float>(), count, offset.const_data_ptr<float>(),
                          codes8.mutable_data_ptr<std::uint8_t>(), nested.mutable_data_ptr<float>());
  return {codes8, nested};
}

template <class Device>
Tensor nf4_dequantize(const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
                      const OptionalTensor& offset, std::int64_t rows, std::int64_t cols, std::int64_t blocksize,
                      ScalarType dtype) {
  Device device(codes, absmax, nested_absmax, offset);
  auto& backend = device.backend();
  const Nf4Tensors weight(codes, absmax, nested_absmax, offset);
  const Tensor out = new_tensor(codes, {rows, cols}, dtype);
  backend.copy(weight.view(rows, cols, blocksize), mutable_matrix(out));
  return out;
}

// ---- Linear --------------------------------------------------------------------------------------------------------

// (y [..., out] in x's dtype, xa [tokens, r] float32 for the backward, empty without an adapter)
template <Backend B>
std::tuple<Tensor, Tensor> linear_forward(B& backend, const Tensor& x, const Matrix& weight, const OptionalTensor& bias,
                                          const AdapterTensors& factors) {
  const Tensor x_tensor = torch::stable::contiguous(x);
  const OptionalTensor bias_tensor = contiguous(bias);
  const Matrix bias_row = bias_tensor ? matrix(*bias_tensor) : Matrix{};
  if (bias_row) check_shape("bias", bias_row, 1, weight.rows);
  const Adapter adapter = factors.view(weight.rows, weight.cols);

  std::vector<std::int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.rows;
  const Tensor y = new_tensor(x, sizes, x.scalar_type());
  const std::int64_t tokens = matrix(x_tensor).rows;
  const Tensor xa = new_tensor(x, {adapter ? tokens : 0, adapter ? adapter.rank() : 0}, ScalarType::Float);
  pissa::linear_forward(backend, matrix(x_tensor), weight, bias_row, adapter, mutable_matrix(y), mutable_matrix(xa));
  return {y, xa};
}

// The gradients' tensors: dx like x, empty unless needed; those of delta_a and delta_b, empty without an adapter.
struct LinearGradients {
  Tensor dx, grad_a, grad_b;
  bool need_dx;

  LinearGradients(const Tensor& x, const Adapter& adapter, bool need_dx_)
      : dx(new_tensor(
            x, need_dx_ ? std::vector<std::int64_t>(x.sizes().begin(), x.sizes().end()) : std::vector<std::int64_t>{0},
            x.scalar_type())),
        grad_a(new_tensor(x, {adapter.delta_a.rows, adapter.delta_a.cols}, ScalarType::Float)),
        grad_b(new_tensor(x, {adapter.delta_b.rows, adapter.delta_b.cols}, ScalarType::Float)),
        need_dx(need_dx_) {}

  MutableMatrix dx_view() const { return need_dx ? mutable_matrix(dx) : MutableMatrix{}; }
  std::tuple<Tensor, Tensor, Tensor> tensors() const { return {dx, grad_a, grad_b}; }
};

template <Backend B>
std::tuple<Tensor, Tensor, Tensor> linear_backward(B& backend, const Tensor& dy, const Tensor& x, const Matrix& weight,
                                                   const AdapterTensors& factors, const Tensor& xa, bool need_dx) {
  const Tensor dy_tensor = torch::stable::contiguous(dy);
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Tensor xa_tensor = torch::stable::contiguous(xa);
  const Adapter adapter = factors.view(weight.rows, weight.cols);
  const Matrix x_view = matrix(x_tensor);
  check_shape("x", x_view, x_view.rows, weight.cols);
  check_shape("dy", matrix(dy_tensor), x_view.rows, weight.rows);
  if (adapter) check_shape("xa", matrix(xa_tensor), x_view.rows, adapter.rank());
  const LinearGradients gradients(x, adapter, need_dx);
  pissa::linear_backward(backend, matrix(dy_tensor), x_view, weight, adapter, matrix(xa_tensor), gradients.dx_view(),
                         mutable_matrix(gradients.grad_a), mutable_matrix(gradients.grad_b));
  return gradients.tensors();
}

inline Matrix dense_weight(const Tensor& weight, const Tensor& x) {
  const Matrix view = matrix(weight);
  PISSA_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(x.dim() - 1) == view.cols,
              "x: last dimension must be weight's ", view.cols, " columns");
  return view;
}

template <class Device>
std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& delta_a, const OptionalTensor& delta_b,
                                  const OptionalTensor& a0, const OptionalTensor& b0, double scaling, bool implicit) {
  Device device(x, weight, bias, delta_a, delta_b, a0, b0);
  const Tensor w = torch::stable::contiguous(weight);
  return linear_forward(device.backend(), x, dense_weight(w, x), bias, {delta_a, delta_b, a0, b0, scaling, implicit});
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   const OptionalTensor& delta_a, const OptionalTensor& delta_b,
                                                   const OptionalTensor& a0, const OptionalTensor& b0, const Tensor& xa,
                                                   double scaling, bool implicit, bool need_dx) {
  Device device(dy, x, weight, delta_a, delta_b, a0, b0, xa);
  const Tensor w = torch::stable::contiguous(weight);
  return linear_backward(device.backend(), dy, x, dense_weight(w, x), {delta_a, delta_b, a0, b0, scaling, implicit}, xa,
                         need_dx);
}

template <class Device>
std::tuple<Tensor, Tensor> nf4_linear(const Tensor& x, const Tensor& codes, const Tensor& absmax,
                                      const OptionalTensor& nested_absmax, const OptionalTensor& offset,
                                      std::int64_t out_features, std::int64_t blocksize, const OptionalTensor& bias,
                                      const OptionalTensor& delta_a, const OptionalTensor& delta_b,
                                      const OptionalTensor& a0, const OptionalTensor& b0, double scaling,
                                      bool implicit) {
  Device device(x, codes, absmax, nested_absmax, offset, bias, delta_a, delta_b, a0, b0);
  const Nf4Tensors weight(codes, absmax, nested_absmax, offset);
  return linear_forward(device.backend(), x, weight.view(out_features, x.size(x.dim() - 1), blocksize), bias,
                        {delta_a, delta_b, a0, b0, scaling, implicit});
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> nf4_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& codes,
                                                       const Tensor& absmax, const OptionalTensor& nested_absmax,
                                                       const OptionalTensor& offset, std::int64_t out_features,
                                                       std::int64_t blocksize, const OptionalTensor& delta_a,
                                                       const OptionalTensor& delta_b, const OptionalTensor& a0,
                                                       const OptionalTensor& b0, const Tensor& xa, double scaling,
                                                       bool implicit, bool need_dx) {
  Device device(dy, x, codes, absmax, nested_absmax, offset, delta_a, delta_b, a0, b0, xa);
  const Nf4Tensors weight(codes, absmax, nested_absmax, offset);
  return linear_backward(device.backend(), dy, x, weight.view(out_features, x.size(x.dim() - 1), blocksize),
                         {delta_a, delta_b, a0, b0, scaling, implicit}, xa, need_dx);
}

// (y like base, xa [tokens, r] float32 for the backward)
template <class Device>
std::tuple<Tensor, Tensor> add_low_rank(const Tensor& base, const Tensor& x, const Tensor& delta_a,
                                        const Tensor& delta_b, const OptionalTensor& a0, const OptionalTensor& b0,
                                        double scaling, bool implicit) {
  Device device(base, x, delta_a, delta_b, a0, b0);
  const AdapterTensors factors(delta_a, delta_b, a0, b0, scaling, implicit);
  const Tensor base_tensor = torch::stable::contiguous(base);
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Matrix base_view = matrix(base_tensor);
  const Matrix x_view = matrix(x_tensor);
  const Adapter adapter = factors.view(base_view.cols, x_view.cols);
  check_shape("base", base_view, x_view.rows, base_view.cols);
  const Tensor y = new_tensor(base, {base.sizes().begin(), base.sizes().end()}, base.scalar_type());
  const Tensor xa = new_tensor(x, {x_view.rows, adapter.rank()}, ScalarType::Float);
  pissa::add_low_rank_forward(device.backend(), base_view, x_view, adapter, mutable_matrix(y), mutable_matrix(xa));
  return {y, xa};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> add_low_rank_backward(const Tensor& dy, const Tensor& x, const Tensor& delta_a,
                                                         const Tensor& delta_b, const OptionalTensor& a0,
                                                         const OptionalTensor& b0, const Tensor& xa, double scaling,
                                                         bool implicit, bool need_dx) {
  Device device(dy, x, delta_a, delta_b, a0, b0, xa);
  const AdapterTensors factors(delta_a, delta_b, a0, b0, scaling, implicit);
  const Tensor dy_tensor = torch::stable::contiguous(dy);
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Tensor xa_tensor = torch::stable::contiguous(xa);
  const Matrix dy_view = matrix(dy_tensor);
  const Matrix x_view = matrix(x_tensor);
  const Adapter adapter = factors.view(dy_view.cols, x_view.cols);
  check_shape("dy", dy_view, x_view.rows, dy_view.cols);
  check_shape("xa", matrix(xa_tensor), x_view.rows, adapter.rank());
  const LinearGradients gradients(x, adapter, need_dx);
  pissa::add_low_rank_backward(device.backend(), dy_view, x_view, adapter, matrix(xa_tensor), gradients.dx_view(),
                               mutable_matrix(gradients.grad_a), mutable_matrix(gradients.grad_b));
  return gradients.tensors();
}

// ---- Registration --------------------------------------------------------------------------------------------------

template <class Device, class Library>
void implement(Library& m) {
  m.impl("svd_lowrank", TORCH_BOX(&svd_lowrank<Device>));
  m.impl("split", TORCH_BOX(&split<Device>));
  m.impl("split_many", TORCH_BOX(&split_many<Device>));
  m.impl("split_nf4", TORCH_BOX(&split_nf4<Device>));
  m.impl("residual", TORCH_BOX(&residual<Device>));
  m.impl("residual_nf4", TORCH_BOX(&residual_nf4<Device>));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize<Device>));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax<Device>));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize<Device>));
  m.impl("linear", TORCH_BOX(&linear<Device>));
  m.impl("linear_backward", TORCH_BOX(&linear_backward<Device>));
  m.impl("nf4_linear", TORCH_BOX(&nf4_linear<Device>));
  m.impl("nf4_linear_backward", TORCH_BOX(&nf4_linear_backward<Device>));
  m.impl("add_low_rank", TORCH_BOX(&add_low_rank<Device>));
  m.impl("add_low_rank_backward", TORCH_BOX(&add_low_rank_backward<Device>));
}

}  // namespace pissa::ops
