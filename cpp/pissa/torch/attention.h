// Softmax attention, only on the CPU: on other devices torch's own is as fast.
#pragma once

#include <tuple>

#include "pissa/core/attention.h"
#include "pissa/torch/tensors.h"

namespace pissa::ops {

// A tensor [batch, heads, length, dim] with adjacent elements in a row; with `transposed`, given as [batch, length,
// heads, dim].
inline Heads heads_of(const char* name, const Tensor& tensor, bool transposed = false) {
  PISSA_CHECK(tensor.dim() == 4 && (tensor.stride(3) == 1 || tensor.size(3) == 1 || tensor.numel() == 0), name,
              ": needed four dimensions, and neighbours in the last");
  const int head = transposed ? 2 : 1, row = transposed ? 1 : 2;
  return {const_cast<void*>(tensor.const_data_ptr()),
          tensor.size(0),
          tensor.size(head),
          tensor.size(row),
          tensor.size(3),
          tensor.stride(0),
          tensor.stride(head),
          tensor.stride(row),
          format_of(tensor.scalar_type())};
}

inline Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                              double scale, bool causal) {
  Attention found{heads_of("q", q), heads_of("k", k), heads_of("v", v), static_cast<float>(scale), causal};
  const auto& [batch, heads, queries, dim] = std::tuple{found.q.batch, found.q.heads, found.q.length, found.q.dim};
  const std::int64_t keys = found.k.length, shared = found.k.heads;
  PISSA_CHECK(found.k.batch == batch && found.k.dim == dim && found.v.batch == batch && found.v.heads == shared &&
                  found.v.length == keys && keys > 0 && shared > 0 && heads % shared == 0,
              "k, v: shapes do not fit q");
  PISSA_CHECK(found.k.format == found.q.format && found.v.format == found.q.format, "q, k, v: of one dtype");
  if (mask) {
    PISSA_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 4 && mask->size(0) == batch &&
                    mask->size(1) == heads && mask->size(2) == queries && mask->size(3) == keys && mask->stride(3) == 1,
                "mask: needed bool, [batch, heads, queries, keys]");
    found.mask = static_cast<const std::uint8_t*>(mask->const_data_ptr());
    found.mask_batch = mask->stride(0);
    found.mask_head = mask->stride(1);
    found.mask_row = mask->stride(2);
  }
  return found;
}

// (out [batch, queries, heads, dim of values], logarithms of sums [batch, heads, queries])
template <class Device>
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                     double scale, bool causal) {
  Device device(q, k, v, mask);
  const Attention problem = attention_of(q, k, v, mask, scale, causal);
  const Tensor out = new_tensor(q, {q.size(0), q.size(2), q.size(1), v.size(3)}, q.scalar_type());
  const Tensor log_sums = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  device.attention_forward(problem, heads_of("out", out, true), static_cast<float*>(log_sums.mutable_data_ptr()));
  return {out, log_sums};
}

// Gradients [batch, length, heads, dim] of q, k and v; out and dout as in the forward.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const OptionalTensor& mask, const Tensor& out,
                                                      const Tensor& log_sums, double scale, bool causal) {
  Device device(dout, q, k, v, mask, out, log_sums);
  const Attention problem = attention_of(q, k, v, mask, scale, causal);
  const Tensor dout_tensor = torch::stable::contiguous(dout), out_tensor = torch::stable::contiguous(out);
  const auto like = [](const Tensor& x) {
    return new_tensor(x, {x.size(0), x.size(2), x.size(1), x.size(3)}, x.scalar_type());
  };
  for (const Tensor* tensor : {&dout_tensor, &out_tensor}) {
    const Heads heads = heads_of("out", *tensor, true);
    PISSA_CHECK(heads.batch == problem.q.batch && heads.heads == problem.q.heads && heads.length == problem.q.length &&
                    heads.dim == problem.v.dim && heads.format == problem.q.format,
                "out, dout: needed what the forward returned");
  }
  PISSA_CHECK(log_sums.numel() == problem.q.batch * problem.q.heads * problem.q.length &&
                  log_sums.scalar_type() == ScalarType::Float && log_sums.is_contiguous(),
              "log_sums: needed what the forward returned");
  const Tensor dq = like(q), dk = like(k), dv = like(v);
  device.attention_backward(problem, heads_of("out", out_tensor, true),
                            static_cast<const float*>(log_sums.const_data_ptr()), heads_of("dout", dout_tensor, true),
                            heads_of("dq", dq, true), heads_of("dk", dk, true), heads_of("dv", dv, true));
  return {dq, dk, dv};
}

}  // namespace pissa::ops
