// A gated activation, only on the CPU.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "pissa/torch/tensors.h"

namespace pissa::ops {

inline Activation activation_of(const std::string& name) {
  PISSA_CHECK(name == "silu" || name == "gelu_tanh", "activation: got ", name, "; allowed: silu, gelu_tanh");
  return name == "silu" ? Activation::silu : Activation::gelu_tanh;
}

inline void check_gated(const Tensor& gate, const Tensor& other, const char* name) {
  PISSA_CHECK(gate.dim() >= 1 && other.sizes().equals(gate.sizes()) && other.scalar_type() == gate.scalar_type(), name,
              ": needed gate's shape and dtype");
}

// f(gate) up, like gate
template <class Device>
Tensor gated(const Tensor& gate, const Tensor& up, const std::string& activation) {
  Device device(gate, up);
  check_gated(gate, up, "up");
  const Tensor g = torch::stable::contiguous(gate), u = torch::stable::contiguous(up);
  const Tensor y = new_tensor(gate, {gate.sizes().begin(), gate.sizes().end()}, gate.scalar_type());
  device.gated_forward(matrix(g), matrix(u), activation_of(activation), mutable_matrix(y));
  return y;
}

// (dgate, dup)
template <class Device>
std::tuple<Tensor, Tensor> gated_backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                          const std::string& activation) {
  Device device(dy, gate, up);
  check_gated(gate, up, "up");
  check_gated(gate, dy, "dy");
  const Tensor d = torch::stable::contiguous(dy), g = torch::stable::contiguous(gate),
               u = torch::stable::contiguous(up);
  const std::vector<std::int64_t> sizes(gate.sizes().begin(), gate.sizes().end());
  const Tensor dgate = new_tensor(gate, sizes, gate.scalar_type()), dup = new_tensor(up, sizes, up.scalar_type());
  device.gated_backward(matrix(d), matrix(g), matrix(u), activation_of(activation), mutable_matrix(dgate),
                        mutable_matrix(dup));
  return {dgate, dup};
}

}  // namespace pissa::ops
