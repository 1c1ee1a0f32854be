// The ops on the CPU: CpuBackend, on torch's thread pool.
#include <algorithm>

#include "pissa/cpu/attention.h"
#include "pissa/cpu/backend.h"
#include "pissa/cpu/gated.h"
#include "pissa/cpu/isa.h"
#include "pissa/cpu/rms_norm.h"
#include "pissa/cpu/split_many.h"
#include "pissa/torch/attention.h"
#include "pissa/torch/gated.h"
#include "pissa/torch/ops.h"
#include "pissa/torch/rms_norm.h"

namespace pissa::ops {
namespace {

class TorchExecutor final : public cpu::Executor {
 public:
  std::int64_t threads() const override { return torch::stable::get_num_threads(); }

 private:
  void run(std::int64_t count, const std::function<void(std::int64_t)>& task) const override {
    cpu::TaskNumbers numbers(count);
    torch::stable::parallel_for(0, std::min(threads(), count), 1,
                                [&](std::int64_t, std::int64_t) { numbers.take_all(task); });
  }
};

class CpuDevice {
 public:
  template <class... Tensors>
  explicit CpuDevice(const Tensor& first, const Tensors&... others) {
    (check_same_device(first, others), ...);
  }
  cpu::CpuBackend& backend() { return backend_; }
  void split_many(std::span<const SplitTask> tasks, const SvdOptions& options) const {
    cpu::split_many(tasks, options, executor_, cpu::kernels());
  }
  template <class... Args>
  void attention_forward(const Args&... args) const {
    cpu::attention_forward(executor_, cpu::kernels(), args...);
  }
  template <class... Args>
  void attention_backward(const Args&... args) const {
    cpu::attention_backward(executor_, cpu::kernels(), args...);
  }
  template <class... Args>
  void rms_norm_forward(const Args&... args) const {
    cpu::rms_norm_forward(executor_, cpu::kernels(), args...);
  }
  template <class... Args>
  void rms_norm_backward(const Args&... args) const {
    cpu::rms_norm_backward(executor_, cpu::kernels(), args...);
  }
  template <class... Args>
  void gated_forward(const Args&... args) const {
    cpu::gated_forward(executor_, cpu::kernels(), args...);
  }
  template <class... Args>
  void gated_backward(const Args&... args) const {
    cpu::gated_backward(executor_, cpu::kernels(), args...);
  }

 private:
  TorchExecutor executor_;
  cpu::CpuBackend backend_{executor_, cpu::kernels()};
};

}  // namespace
}  // namespace pissa::ops

STABLE_TORCH_LIBRARY_IMPL(pissa, CPU, m) {
  pissa::ops::implement<pissa::ops::CpuDevice>(m);
  m.impl("merge_codes", PISSA_BOX(&pissa::ops::merge_codes<pissa::ops::CpuDevice>));
  m.impl("attention", PISSA_BOX(&pissa::ops::attention<pissa::ops::CpuDevice>));
  m.impl("rms_norm", PISSA_BOX(&pissa::ops::rms_norm<pissa::ops::CpuDevice>));
  m.impl("rms_norm_backward", PISSA_BOX(&pissa::ops::rms_norm_backward<pissa::ops::CpuDevice>));
  m.impl("gated", PISSA_BOX(&pissa::ops::gated<pissa::ops::CpuDevice>));
  m.impl("gated_backward", PISSA_BOX(&pissa::ops::gated_backward<pissa::ops::CpuDevice>));
  m.impl("attention_backward", PISSA_BOX(&pissa::ops::attention_backward<pissa::ops::CpuDevice>));
}
