// A weight as a product takes it: dense, in the product's format, decoded beside what the product waits for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "pissa/core/types.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/side_stream.h"

namespace pissa::cuda {

/// A weight, as it is or all of it decoded ahead of the products that take it.
class Weight {
 public:
  /// As it is.
  Weight(const Matrix& weight) : view_(weight) {}

  /// A quantised weight, being decoded on the side stream from now on. The context must outlive it.
  Weight(const Context& context, const Matrix& weight, Format format);

  Weight(const Weight&) = delete;

  /// Its elements are there for what is queued after wait().
  const Matrix& view() const { return view_; }
  void wait() const {
    if (side_) side_->join();
  }

 private:
  Matrix view_;
  std::optional<Buffer> decoded_;
  mutable std::optional<SideStream> side_;
};

/// scale * op(weight), by its columns, in a format. As it is where nothing has to be converted; otherwise in chunks of
/// at most `chunk_bytes`, but of 64 columns at least: whole tiles of a product, which adds up nothing twice. A chunk is
/// converted on the side stream while the one before is multiplied, so there is memory for two.
class WeightChunks {
 public:
  /// scale is 1 for a quantised weight. `ahead`: whether other work is queued before for_each. The context and the
  /// weight must outlive it.
  WeightChunks(const Context& context, const Weight& weight, Op op, float scale, Format format,
               std::int64_t chunk_bytes, bool ahead);

  /// The first chunk, of step() columns; its elements are there only in for_each.
  Matrix front() const { return converts_ ? part(0) : weight_.view(); }
  std::int64_t step() const { return step_; }

  /// Calls multiply(chunk, first, count) for columns [first, first + count) of op(weight), in order. Once.
  template <class F>
  void for_each(F multiply) {
    if (!converts_) {
      weight_.wait();
      return multiply(front(), 0, cols_);
    }
    for (std::int64_t first = 0; first < cols_; first += step_) {
      if (side_) side_->join();
      if (first + step_ < cols_) {
        side_->fork();  // behind what was multiplied from the same memory
        load(first + step_);
      }
      multiply(part(first), first, count(first));
    }
  }

 private:
  std::int64_t count(std::int64_t first) const { return std::min(step_, cols_ - first); }
  MutableMatrix part(std::int64_t first) const;
  void load(std::int64_t first) const;

  const Context& context_;
  const Weight& weight_;
  Op op_;
  float scale_;
  bool converts_;
  std::int64_t cols_;
  std::int64_t step_;
  std::vector<Buffer> buffers_;  // one, or two by turns
  std::optional<SideStream> side_;
};

}  // namespace pissa::cuda
