// A weight as a product takes it: dense, in the product's format, as a whole or a chunk at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pissa/core/types.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// scale * op(weight), by its columns, in a format. As it is where nothing has to be converted; otherwise in chunks of
/// at most `chunk_bytes`, but of 64 columns at least: whole tiles of a product, which adds up nothing twice.
class WeightChunks {
 public:
  /// scale is 1 for a quantised weight.
  WeightChunks(const Context& context, const Matrix& weight, Op op, float scale, Format format,
               std::int64_t chunk_bytes);

  /// The first chunk, of step() columns; its elements are there only in for_each.
  Matrix front() const { return converts_ ? part(0) : weight_; }
  std::int64_t step() const { return step_; }

  /// Calls multiply(chunk, first, count) for columns [first, first + count) of op(weight), in order.
  template <class F>
  void for_each(F multiply) const {
    if (!converts_) return multiply(front(), 0, cols_);
    for (std::int64_t first = 0; first < cols_; first += step_) {
      load(first);
      multiply(part(first), first, count(first));
    }
  }

 private:
  std::int64_t count(std::int64_t first) const { return std::min(step_, cols_ - first); }
  MutableMatrix part(std::int64_t first) const;
  void load(std::int64_t first) const;

  const Context& context_;
  Matrix weight_;
  Op op_;
  float scale_;
  bool converts_;
  std::int64_t cols_;
  std::int64_t step_;
  std::vector<Buffer> buffers_;
};

}  // namespace pissa::cuda
