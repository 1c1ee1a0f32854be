// The ops that decompose: the largest element, SVD, split, and the dense residual.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "pissa/core/rsvd.h"
#include "pissa/core/split.h"
#include "pissa/torch/tensors.h"

namespace pissa::ops {

// passes: none means as many as the rank needs.
inline SvdOptions svd_options(const std::string& svd, std::optional<std::int64_t> passes, std::int64_t seed) {
  PISSA_CHECK(svd == "krylov" || svd == "subspace", "svd: got '", svd, "'; allowed: 'krylov', 'subspace'");
  return {svd == "krylov" ? SvdMethod::krylov : SvdMethod::subspace, passes, static_cast<std::uint64_t>(seed)};
}

// All elements of a weight, in any order; in place if they are the rows or the columns of a matrix.
inline Matrix elements(const Tensor& weight, std::vector<Tensor>& copies) {
  if (weight.dim() == 2) {
    const std::int64_t rows = weight.size(0), cols = weight.size(1);
    const Format format = format_of(weight.scalar_type());
    if (weight.stride(1) == 1) return {weight.const_data_ptr(), rows, cols, weight.stride(0), format};
    if (weight.stride(0) == 1) return {weight.const_data_ptr(), cols, rows, weight.stride(1), format};
  }
  copies.push_back(torch::stable::contiguous(weight));
  return matrix(copies.back());
}

// Largest |element| of each weight, float32 [weights]; not finite if any element is not. Nothing waits for it.
template <class Device>
Tensor max_abs(const std::vector<Tensor>& weights) {
  PISSA_CHECK(!weights.empty(), "weights: got none; needed: one at least, by which torch finds the device");
  Device device(weights[0], weights);
  std::vector<Tensor> copies;
  std::vector<Matrix> matrices;
  for (const Tensor& weight : weights) matrices.push_back(elements(weight, copies));
  const Tensor largest = new_tensor(weights[0], {static_cast<std::int64_t>(weights.size())}, ScalarType::Float);
  device.backend().max_abs(matrices, largest.mutable_data_ptr<float>());
  return largest;
}

// (u [r, out], s [r], v [r, in]), with one singular vector per row.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> svd_lowrank(const Tensor& weight, double largest, std::int64_t r,
                                               const std::string& svd, std::optional<std::int64_t> passes,
                                               std::int64_t seed) {
  Device device(weight);
  auto& backend = device.backend();
  const Tensor w_tensor = torch::stable::contiguous(weight);
  const Matrix w = matrix(w_tensor);
  const auto factors = pissa::svd_lowrank(backend, w, r, svd_options(svd, passes, seed), static_cast<float>(largest));
  const Tensor u = new_tensor(weight, {r, w.rows}, ScalarType::Float);
  const Tensor s = new_tensor(weight, {r}, ScalarType::Float);
  const Tensor v = new_tensor(weight, {r, w.cols}, ScalarType::Float);
  backend.copy(factors.u.view(), mutable_matrix(u));
  backend.copy(factors.s.view(), mutable_matrix(s));
  backend.copy(factors.v.view(), mutable_matrix(v));
  return {u, s, v};
}

// (a0 [r, in], b0 [out, r], singular values [r]) for each weight, optionally with second moments, [in, in] for each.
template <class Device>
std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> split_many(
    const std::vector<Tensor>& weights, const std::vector<double>& largest, const std::vector<std::int64_t>& ranks,
    const std::vector<double>& scalings, const std::string& svd, std::optional<std::int64_t> passes, std::int64_t seed,
    const std::optional<std::vector<Tensor>>& second_moments) {
  const std::size_t count = weights.size();
  PISSA_CHECK(!second_moments || second_moments->size() == count, "second_moments: got ", second_moments->size(),
              "; needed: none, or one for each of the ", count, " weights");
  PISSA_CHECK(count > 0 && largest.size() == count && ranks.size() == count && scalings.size() == count,
              "largest, ranks, scalings: got ", largest.size(), ", ", ranks.size(), " and ", scalings.size(),
              "; needed: one for each of the ", count, " weights, of which there must be one");
  Device device(weights[0], weights, second_moments.value_or(std::vector<Tensor>()));
  const SvdOptions options = svd_options(svd, passes, seed);
  std::vector<Tensor> contiguous_weights, moments, a0, b0, s;
  std::vector<SplitTask> tasks;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    contiguous_weights.push_back(torch::stable::contiguous(weights[i]));
    const Matrix w = matrix(contiguous_weights.back());
    check_svd(w, ranks[i], options);  // before the rank becomes a size
    a0.push_back(new_tensor(weights[i], {ranks[i], w.cols}, ScalarType::Float));
    b0.push_back(new_tensor(weights[i], {w.rows, ranks[i]}, ScalarType::Float));
    s.push_back(new_tensor(weights[i], {ranks[i]}, ScalarType::Float));
    tasks.push_back({w, static_cast<float>(scalings[i]), mutable_matrix(a0.back()), mutable_matrix(b0.back()),
                     static_cast<float>(largest[i]), mutable_matrix(s.back())});
    if (!second_moments) continue;
    moments.push_back(torch::stable::contiguous((*second_moments)[i]));
    tasks.back().moment = matrix(moments.back());
  }
  device.split_many(tasks, options);
  return {a0, b0, s};
}

// total [in, in] += x^T x for x [tokens, in], in and below the diagonal, a panel of columns at a time.
template <class Device>
void add_second_moment(Tensor total, const Tensor& x) {
  Device device(total, x);
  PISSA_CHECK(total.is_contiguous(), "total: needed a contiguous tensor");
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Matrix rows = matrix(x_tensor);
  const MutableMatrix sum = mutable_matrix(total);
  check_shape("total", sum, rows.cols, rows.cols);
  constexpr std::int64_t kPanel = 512;
  for (std::int64_t first = 0; first < rows.cols; first += kPanel) {
    const std::int64_t count = std::min(kPanel, rows.cols - first);
    const MutableMatrix part = cols_of(rows_of(sum, first, rows.cols - first), first, count);
    const std::array terms{Term{cols_of(rows, first, rows.cols - first), Op::t, cols_of(rows, first, count), Op::n}};
    device.backend().gemm(terms, part, part);
  }
}

// A weight and its factors as they cross the op boundary.
struct FactoredTensors {
  Tensor weight, a0, b0;

  FactoredTensors(const Tensor& weight_, const Tensor& a0_, const Tensor& b0_)
      : weight(torch::stable::contiguous(weight_)),
        a0(torch::stable::contiguous(a0_)),
        b0(torch::stable::contiguous(b0_)) {
    const Matrix w = matrix(weight);
    const Matrix a = matrix(a0);
    check_shape("a0", a, a.rows, w.cols);
    check_shape("b0", matrix(b0), w.rows, a.rows);
  }
  Term minus_factors(double scaling) const {
    return pissa::minus_factors(matrix(a0), matrix(b0), static_cast<float>(scaling));
  }
};

template <class Device>
Tensor residual(const Tensor& weight, const Tensor& a0, const Tensor& b0, double scaling) {
  Device device(weight, a0, b0);
  const FactoredTensors tensors(weight, a0, b0);
  const Matrix w = matrix(tensors.weight);
  const Tensor out = new_tensor(weight, {w.rows, w.cols}, weight.scalar_type());
  const std::array terms{tensors.minus_factors(scaling)};
  device.backend().gemm(terms, w, mutable_matrix(out));
  return out;
}

}  // namespace pissa::ops
