#include "pissa/cuda/weight.h"

#include "pissa/core/quantized.h"
#include "pissa/cuda/codes.h"
#include "pissa/cuda/elementwise.h"

namespace pissa::cuda {

Weight::Weight(const Context& context, const Matrix& weight, Format format) {
  decoded_.emplace(context, weight.rows, weight.cols, format);
  view_ = decoded_->view();
  side_.emplace(context);
  side_->fork();
  decode_codes(side_->context(), weight, 0, 0, decoded_->view());
}

WeightChunks::WeightChunks(const Context& context, const Weight& weight, Op op, float scale, Format format,
                           std::int64_t chunk_bytes, bool ahead)
    : context_(context),
      weight_(weight),
      op_(op),
      scale_(scale),
      converts_(weight.view().format != format || scale != 1.0f),
      cols_(op == Op::t ? weight.view().rows : weight.view().cols),
      step_(cols_) {
  if (!converts_) return;
  weight.wait();
  constexpr std::int64_t kTile = 64;
  const std::int64_t inner = op == Op::t ? weight.view().cols : weight.view().rows;
  const std::int64_t fitting = chunk_bytes / (inner * element_size(format)) / kTile * kTile;
  step_ = std::min(std::max(fitting, kTile), cols_);
  const int chunks = step_ < cols_ ? 2 : 1;
  for (int i = 0; i < chunks; ++i) {
    buffers_.emplace_back(context, op == Op::t ? step_ : inner, op == Op::t ? inner : step_, format);
  }
  if (ahead || chunks > 1) {
    side_.emplace(context);
    side_->fork();
  }
  load(0);
}

MutableMatrix WeightChunks::part(std::int64_t first) const {
  const MutableMatrix whole = buffers_[static_cast<std::size_t>(first / step_) % buffers_.size()].view();
  return op_ == Op::t ? rows_of(whole, 0, count(first)) : cols_of(whole, 0, count(first));
}

void WeightChunks::load(std::int64_t first) const {
  const Context& where = side_ ? side_->context() : context_;
  const Matrix& weight = weight_.view();
  const MutableMatrix to = part(first);
  if (is_quantized(weight.format)) {
    decode_codes(where, weight, op_ == Op::t ? first : 0, op_ == Op::t ? 0 : first, to);
  } else {
    convert(where, op_ == Op::t ? rows_of(weight, first, to.rows) : cols_of(weight, first, to.cols), scale_, to);
  }
}

}  // namespace pissa::cuda
