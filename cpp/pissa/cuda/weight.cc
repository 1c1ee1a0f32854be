#include "pissa/cuda/weight.h"

#include "pissa/core/quantized.h"
#include "pissa/cuda/codes.h"
#include "pissa/cuda/elementwise.h"

namespace pissa::cuda {

WeightChunks::WeightChunks(const Context& context, const Matrix& weight, Op op, float scale, Format format,
                           std::int64_t chunk_bytes)
    : context_(context),
      weight_(weight),
      op_(op),
      scale_(scale),
      converts_(weight.format != format || scale != 1.0f),
      cols_(op == Op::t ? weight.rows : weight.cols),
      step_(cols_) {
  if (!converts_) return;
  constexpr std::int64_t kTile = 64;
  const std::int64_t inner = op == Op::t ? weight.cols : weight.rows;
  const std::int64_t fitting = chunk_bytes / (inner * element_size(format)) / kTile * kTile;
  step_ = std::min(std::max(fitting, kTile), cols_);
  buffers_.emplace_back(context, op == Op::t ? step_ : inner, op == Op::t ? inner : step_, format);
}

MutableMatrix WeightChunks::part(std::int64_t first) const {
  const MutableMatrix whole = buffers_[0].view();
  return op_ == Op::t ? rows_of(whole, 0, count(first)) : cols_of(whole, 0, count(first));
}

void WeightChunks::load(std::int64_t first) const {
  const MutableMatrix to = part(first);
  if (is_quantized(weight_.format)) {
    decode_codes(context_, weight_, op_ == Op::t ? first : 0, op_ == Op::t ? 0 : first, to);
  } else {
    const Matrix from = op_ == Op::t ? rows_of(weight_, first, to.rows) : cols_of(weight_, first, to.cols);
    convert(context_, from, scale_, to);
  }
}

}  // namespace pissa::cuda
