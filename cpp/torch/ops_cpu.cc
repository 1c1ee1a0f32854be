// The ops on the CPU: the core over CpuBackend, on torch's thread pool.
#include "backend.h"
#include "isa.h"
#include "ops.h"
#include "split_many.h"

namespace pissa::ops {
namespace {

class TorchExecutor final : public cpu::Executor {
 public:
  std::int64_t threads() const override { return torch::stable::get_num_threads(); }
  void parallel_for(std::int64_t count, const std::function<void(std::int64_t)>& task) const override {
    torch::stable::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) task(i);
    });
  }
};

const cpu::Executor& executor() {
  static const TorchExecutor executor;
  return executor;
}

cpu::CpuBackend backend() { return {executor(), cpu::kernels()}; }

std::tuple<Tensor, Tensor, Tensor> svd_lowrank_cpu(const Tensor& weight, std::int64_t r, const std::string& svd,
                                                   std::int64_t passes, std::int64_t seed) {
  return svd_lowrank(backend(), weight, r, svd, passes, seed);
}

std::tuple<Tensor, Tensor> split_cpu(const Tensor& weight, std::int64_t r, double scaling, const std::string& svd,
                                     std::int64_t passes, std::int64_t seed) {
  return split(backend(), weight, r, scaling, svd, passes, seed);
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> split_many_cpu(const std::vector<Tensor>& weights,
                                                                    const std::vector<std::int64_t>& ranks,
                                                                    const std::vector<double>& scalings,
                                                                    const std::string& svd, std::int64_t passes,
                                                                    std::int64_t seed) {
  PISSA_CHECK(ranks.size() == weights.size() && scalings.size() == weights.size(), "ranks, scalings: got ",
              ranks.size(), " and ", scalings.size(), "; needed: one for each of the ", weights.size(), " weights");
  const SvdOptions options = svd_options(svd, passes, seed);
  std::vector<Tensor> contiguous_weights, a0, b0;
  std::vector<cpu::SplitTask> tasks;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    contiguous_weights.push_back(torch::stable::contiguous(weights[i]));
    const Matrix w = matrix(contiguous_weights.back());
    check_svd(w, ranks[i], options);  // before the rank becomes a size
    a0.push_back(new_tensor(weights[i], {ranks[i], w.cols}, ScalarType::Float));
    b0.push_back(new_tensor(weights[i], {w.rows, ranks[i]}, ScalarType::Float));
    tasks.push_back({w, static_cast<float>(scalings[i]), mutable_matrix(a0.back()), mutable_matrix(b0.back())});
  }
  cpu::split_many(tasks, options, executor(), cpu::kernels());
  return {a0, b0};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> split_nf4_cpu(const Tensor& weight, std::int64_t r, double scaling,
                                                         const std::string& svd, std::int64_t passes, std::int64_t seed,
                                                         std::int64_t quant_iters, std::int64_t blocksize) {
  return split_nf4(backend(), weight, r, scaling, svd, passes, seed, quant_iters, blocksize);
}

Tensor residual_cpu(const Tensor& weight, const Tensor& a0, const Tensor& b0, double scaling) {
  return residual(backend(), weight, a0, b0, scaling);
}

std::tuple<Tensor, Tensor> residual_nf4_cpu(const Tensor& weight, const Tensor& a0, const Tensor& b0, double scaling,
                                            std::int64_t blocksize) {
  return residual_nf4(backend(), weight, a0, b0, scaling, blocksize);
}

std::tuple<Tensor, Tensor> nf4_quantize_cpu(const Tensor& weight, std::int64_t blocksize) {
  return nf4_quantize(backend(), weight, blocksize);
}

std::tuple<Tensor, Tensor> quantize_absmax_cpu(const Tensor& absmax, const Tensor& offset) {
  return quantize_absmax(backend(), absmax, offset);
}

Tensor nf4_dequantize_cpu(const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
                          const OptionalTensor& offset, std::int64_t rows, std::int64_t cols, std::int64_t blocksize,
                          ScalarType dtype) {
  return nf4_dequantize(backend(), codes, absmax, nested_absmax, offset, rows, cols, blocksize, dtype);
}

std::tuple<Tensor, Tensor> linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& delta_a, const OptionalTensor& delta_b,
                                      const OptionalTensor& a0, const OptionalTensor& b0, double scaling,
                                      bool implicit) {
  const Tensor w = torch::stable::contiguous(weight);
  return linear_forward(backend(), x, dense_weight(w, x), bias, {delta_a, delta_b, a0, b0, scaling, implicit});
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                       const OptionalTensor& delta_a, const OptionalTensor& delta_b,
                                                       const OptionalTensor& a0, const OptionalTensor& b0,
                                                       const Tensor& xa, double scaling, bool implicit, bool need_dx) {
  const Tensor w = torch::stable::contiguous(weight);
  return linear_backward(backend(), dy, x, dense_weight(w, x), {delta_a, delta_b, a0, b0, scaling, implicit}, xa,
                         need_dx);
}

std::tuple<Tensor, Tensor> nf4_linear_cpu(const Tensor& x, const Tensor& codes, const Tensor& absmax,
                                          const OptionalTensor& nested_absmax, const OptionalTensor& offset,
                                          std::int64_t out_features, std::int64_t blocksize, const OptionalTensor& bias,
                                          const OptionalTensor& delta_a, const OptionalTensor& delta_b,
                                          const OptionalTensor& a0, const OptionalTensor& b0, double scaling,
                                          bool implicit) {
  const Nf4Tensors weight(codes, absmax, nested_absmax, offset);
  return linear_forward(backend(), x, weight.view(out_features, x.size(x.dim() - 1), blocksize), bias,
                        {delta_a, delta_b, a0, b0, scaling, implicit});
}

std::tuple<Tensor, Tensor, Tensor> nf4_linear_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& codes,
                                                           const Tensor& absmax, const OptionalTensor& nested_absmax,
                                                           const OptionalTensor& offset, std::int64_t out_features,
                                                           std::int64_t blocksize, const OptionalTensor& delta_a,
                                                           const OptionalTensor& delta_b, const OptionalTensor& a0,
                                                           const OptionalTensor& b0, const Tensor& xa, double scaling,
                                                           bool implicit, bool need_dx) {
  const Nf4Tensors weight(codes, absmax, nested_absmax, offset);
  return linear_backward(backend(), dy, x, weight.view(out_features, x.size(x.dim() - 1), blocksize),
                         {delta_a, delta_b, a0, b0, scaling, implicit}, xa, need_dx);
}

std::tuple<Tensor, Tensor> add_low_rank_cpu(const Tensor& base, const Tensor& x, const Tensor& delta_a,
                                            const Tensor& delta_b, const OptionalTensor& a0, const OptionalTensor& b0,
                                            double scaling, bool implicit) {
  return add_low_rank(backend(), base, x, {delta_a, delta_b, a0, b0, scaling, implicit});
}

std::tuple<Tensor, Tensor, Tensor> add_low_rank_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& delta_a,
                                                             const Tensor& delta_b, const OptionalTensor& a0,
                                                             const OptionalTensor& b0, const Tensor& xa, double scaling,
                                                             bool implicit, bool need_dx) {
  return add_low_rank_backward(backend(), dy, x, {delta_a, delta_b, a0, b0, scaling, implicit}, xa, need_dx);
}

}  // namespace
}  // namespace pissa::ops

STABLE_TORCH_LIBRARY_IMPL(pissa, CPU, m) {
  using namespace pissa::ops;
  m.impl("svd_lowrank", TORCH_BOX(&svd_lowrank_cpu));
  m.impl("split", TORCH_BOX(&split_cpu));
  m.impl("split_many", TORCH_BOX(&split_many_cpu));
  m.impl("split_nf4", TORCH_BOX(&split_nf4_cpu));
  m.impl("residual", TORCH_BOX(&residual_cpu));
  m.impl("residual_nf4", TORCH_BOX(&residual_nf4_cpu));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize_cpu));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax_cpu));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize_cpu));
  m.impl("linear", TORCH_BOX(&linear_cpu));
  m.impl("linear_backward", TORCH_BOX(&linear_backward_cpu));
  m.impl("nf4_linear", TORCH_BOX(&nf4_linear_cpu));
  m.impl("nf4_linear_backward", TORCH_BOX(&nf4_linear_backward_cpu));
  m.impl("add_low_rank", TORCH_BOX(&add_low_rank_cpu));
  m.impl("add_low_rank_backward", TORCH_BOX(&add_low_rank_backward_cpu));
}
