// A weight to split among others, and room for its start factors and singular values.
#pragma once

#include <cstdint>
#include <optional>

#include "pissa/core/split.h"
#include "support/matrices.h"

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

}  // namespace pissa::test
