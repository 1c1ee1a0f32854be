// The kernels of pissa/core/token_scores.h: sums over logits, and the gradient's last step.
#pragma once

#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// Backend::add_scores.
void add_scores(const Context& context, const MutableMatrix& logits, const std::int64_t* labels, std::int64_t first,
                float scale, float cap, const MutableMatrix& state, const MutableMatrix& earlier, bool gradient);

/// Backend::finish_scores.
void finish_scores(const Context& context, const Matrix& state, const std::int64_t* labels, const Matrix& weight,
                   float scale, float cap, const MutableMatrix& scores, const Matrix& sum, const MutableMatrix& dx);

}  // namespace pissa::cuda
