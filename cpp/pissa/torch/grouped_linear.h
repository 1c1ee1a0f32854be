// The op that multiplies a group of layers at once: lists of what quantized_linear takes one of.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "pissa/core/grouped_linear.h"
#include "pissa/torch/linear.h"

namespace pissa::ops {

using TensorList = std::vector<Tensor>;
using OptionalList = std::optional<TensorList>;

// The weights and adapters of a group's layers: equally many of everything that is given, equal in shape and kind.
class GroupTensors {
 public:
  GroupTensors(const TensorList& codes, const TensorList& absmax, const OptionalList& nested_absmax,
               const OptionalList& offset, const std::string& format, std::int64_t blocksize, const TensorList& a,
               const TensorList& b, const OptionalList& a0, const OptionalList& b0, double scaling) {
    const std::size_t count = codes.size();
    PISSA_CHECK(count > 0, "codes: got none; needed: one layer at least");
    for (const auto* list : {&absmax, &a, &b}) check_count(list->size(), count);
    for (const auto* list : {&nested_absmax, &offset, &a0, &b0}) check_count(*list ? (*list)->size() : count, count);
    const auto of = [](const OptionalList& list, std::size_t i) {
      return list ? OptionalTensor((*list)[i]) : std::nullopt;
    };
    for (std::size_t i = 0; i < count; ++i) {
      PISSA_CHECK(absmax[i].scalar_type() == absmax[0].scalar_type() && absmax[i].numel() == absmax[0].numel(),
                  "absmax: needed scales of one dtype and number");
      weights_.emplace_back(codes[i], absmax[i], of(nested_absmax, i), of(offset, i), format, blocksize);
      adapters_.emplace_back(a[i], b[i], of(a0, i), of(b0, i), scaling, false);
    }
  }

  // Views, with rows [offsets[i], offsets[i + 1]) of `rows` for layer i.
  std::vector<GroupedLayer> layers(const std::vector<std::int64_t>& offsets, std::int64_t rows, std::int64_t out,
                                   std::int64_t in) const {
    check_count(offsets.size(), weights_.size() + 1);
    PISSA_CHECK(offsets.front() == 0 && offsets.back() == rows, "offsets: needed from 0 to x's ", rows, " rows");
    std::vector<GroupedLayer> result;
    for (std::size_t i = 0; i < weights_.size(); ++i) {
      PISSA_CHECK(offsets[i] <= offsets[i + 1], "offsets: needed ascending numbers");
      result.push_back(
          {weights_[i].view(out, in), adapters_[i].view(out, in), offsets[i], offsets[i + 1] - offsets[i]});
      PISSA_CHECK(result[i].adapter.rank() == result[0].adapter.rank(), "a: needed factors of one rank");
    }
    return result;
  }

 private:
  static void check_count(std::size_t got, std::size_t needed) {
    PISSA_CHECK(got == needed, "layers: got a list of ", got, "; needed: ", needed);
  }
  std::vector<QuantizedTensors> weights_;
  std::vector<AdapterTensors> adapters_;
};

// (y [rows, out] in x's dtype, x A^T of all rows, float32 [rows, r])
template <class Device>
std::tuple<Tensor, Tensor> grouped_linear(const Tensor& x, const std::vector<std::int64_t>& offsets,
                                          const TensorList& codes, const TensorList& absmax,
                                          const OptionalList& nested_absmax, const OptionalList& offset,
                                          const std::string& format, std::int64_t blocksize, std::int64_t out_features,
                                          const TensorList& a, const TensorList& b, const OptionalList& a0,
                                          const OptionalList& b0, double scaling, bool int8) {
  const auto given = [](const OptionalList& list) { return list.value_or(TensorList()); };
  Device device(x, codes, absmax, given(nested_absmax), given(offset), a, b, given(a0), given(b0));
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Matrix x_view = matrix(x_tensor);
  const GroupTensors group(codes, absmax, nested_absmax, offset, format, blocksize, a, b, a0, b0, scaling);
  const auto layers = group.layers(offsets, x_view.rows, out_features, x_view.cols);
  const Tensor y = new_tensor(x, {x_view.rows, out_features}, x.scalar_type());
  const Tensor xa = new_tensor(x, {x_view.rows, layers[0].adapter.rank()}, ScalarType::Float);
  pissa::grouped_linear_forward(device.backend(), x_view, layers, mutable_matrix(y), mutable_matrix(xa), int8);
  return {y, xa};
}

// (dx, empty unless needed; the gradients of each a; those of each b)
template <class Device>
std::tuple<Tensor, TensorList, TensorList> grouped_linear_backward(
    const Tensor& dy, const Tensor& x, const std::vector<std::int64_t>& offsets, const TensorList& codes,
    const TensorList& absmax, const OptionalList& nested_absmax, const OptionalList& offset, const std::string& format,
    std::int64_t blocksize, std::int64_t out_features, const TensorList& a, const TensorList& b, const OptionalList& a0,
    const OptionalList& b0, const Tensor& kept, double scaling, bool need_dx, bool int8) {
  const auto given = [](const OptionalList& list) { return list.value_or(TensorList()); };
  Device device(dy, x, codes, absmax, given(nested_absmax), given(offset), a, b, given(a0), given(b0), kept);
  const Tensor dy_tensor = torch::stable::contiguous(dy);
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Tensor xa = torch::stable::contiguous(kept);
  const Matrix x_view = matrix(x_tensor);
  const GroupTensors group(codes, absmax, nested_absmax, offset, format, blocksize, a, b, a0, b0, scaling);
  const auto layers = group.layers(offsets, x_view.rows, out_features, x_view.cols);
  check_shape("dy", matrix(dy_tensor), x_view.rows, out_features);
  check_shape("kept", matrix(xa), x_view.rows, layers[0].adapter.rank());
  PISSA_CHECK(kept.scalar_type() == ScalarType::Float, "kept: needed float32");
  const std::vector<std::int64_t> dx_sizes =
      need_dx ? std::vector{x_view.rows, x_view.cols} : std::vector{std::int64_t{0}};
  const Tensor dx = new_tensor(x, dx_sizes, x.scalar_type());
  TensorList grads_a, grads_b;
  std::vector<MutableMatrix> views_a, views_b;
  for (const GroupedLayer& layer : layers) {
    grads_a.push_back(new_tensor(x, {layer.adapter.a.rows, layer.adapter.a.cols}, ScalarType::Float));
    grads_b.push_back(new_tensor(x, {layer.adapter.b.rows, layer.adapter.b.cols}, ScalarType::Float));
    views_a.push_back(mutable_matrix(grads_a.back()));
    views_b.push_back(mutable_matrix(grads_b.back()));
  }
  pissa::grouped_linear_backward(device.backend(), matrix(dy_tensor), x_view, layers, matrix(xa),
                                 need_dx ? mutable_matrix(dx) : MutableMatrix{}, views_a, views_b, int8);
  return {dx, grads_a, grads_b};
}

}  // namespace pissa::ops
