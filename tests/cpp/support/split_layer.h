// A weight to split among others, and room for its start factors and singular values.
#pragma once

#include <cstdint>
#include <optional>

#include "pissa/core/split.h"
#include "support/matrices.h"

#if defined(PISSA_TEST_CUDA)
#include <vector>

#include "pissa/cuda/split_many.h"
#include "support/transferring_backend.h"
#endif

namespace pissa::test {

struct SplitLayer {
  Stored weight, a0, b0, s;
  float scaling;
  SplitLayer(const Dense& values, Format format, std::int64_t r, float scaling_)
      : weight(values, format),
        a0(Stored::poisoned(r, values.cols, Format::f32)),
        b0(Stored::poisoned(values.rows, r, Format::f32)),
        s(Stored::poisoned(1, r, Format::f32)),
        scaling(scaling_) {}
  SplitTask task() {
    return {weight.view(), scaling, a0.mutable_view(), b0.mutable_view(), std::nullopt, s.mutable_view()};
  }
};

#if defined(PISSA_TEST_CUDA)
/// On the device and back; of weights whose largest elements are known there is nothing to ask.
template <class Layers>
void split_on_device(Layers& layers, const cuda::Context& context, const SvdOptions& options = {},
                     std::optional<float> largest = {}, std::int64_t stack_bytes = cuda::kStackBytes) {
  Staging at(cuda::standalone_context());
  std::vector<SplitTask> tasks;
  for (SplitLayer& layer : layers) {
    const SplitTask task = layer.task();
    tasks.push_back({at(task.w), task.scaling, at(task.a0), at(task.b0), largest, at(task.s)});
  }
  at.finish();
  cuda::split_many(tasks, options, context, stack_bytes);
  at.finish();
}
#endif

}  // namespace pissa::test
