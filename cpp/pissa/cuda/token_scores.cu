#include "pissa/cuda/token_scores.h"

#include "pissa/core/score_state.h"
#include "pissa/cuda/codes.h"
#include "pissa/cuda/reduce_device.h"

namespace pissa::cuda {
namespace {

constexpr unsigned kThreads = 256;

// What the block's first thread tells the others.
struct Growth {
  float factor;
};

// A block takes one token. Between two reductions of one type the block synchronises.
__global__ void add_scores_kernel(MutableMatrix logits, const std::int64_t* labels, std::int64_t first, float scale,
                                  float cap, MutableMatrix states, MutableMatrix earlier, bool gradient) {
  float* row = static_cast<float*>(logits.data) + blockIdx.x * logits.ld;
  ScoreState& state = static_cast<ScoreState*>(states.data)[blockIdx.x];
  const std::int64_t count = logits.cols, label = labels[blockIdx.x] - first;
  if (threadIdx.x == 0 && first == 0) state = {};
  __syncthreads();
  float largest = state.largest;
  double sum = 0.0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    const float z = cap > 0.0f ? cap * tanhf(scale * row[i] / cap) : scale * row[i];
    row[i] = z;
    largest = max(largest, z);
    sum += z;
  }
  largest = block_reduce(largest, Larger{});
  sum = block_reduce(sum, Add{});
  if (threadIdx.x == 0 && label >= 0 && label < count) state.of_label = row[label];
  __syncthreads();
  double total = 0.0, squares = 0.0, weighted = 0.0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    const float z = row[i];
    const float less = z - largest;
    const float e = i == label ? 0.0f : expf(less);
    total += e;
    squares += e * e;
    weighted += e > 0.0f ? e * less : e;
    if (gradient) row[i] = cap > 0.0f ? e * (1.0f - z / cap * (z / cap)) : e;
  }
  total = block_reduce(total, Add{});
  __syncthreads();
  squares = block_reduce(squares, Add{});
  __syncthreads();
  weighted = block_reduce(weighted, Add{});
  Growth& growth = shared_memory<Growth>();
  if (threadIdx.x == 0) {
    growth.factor = state.add({largest, static_cast<float>(total), static_cast<float>(squares),
                               static_cast<float>(weighted), static_cast<float>(sum)},
                              [](float grown) { return expf(grown); });
  }
  __syncthreads();
  if (!earlier || growth.factor == 1.0f) return;
  float* sums = static_cast<float*>(earlier.data) + blockIdx.x * earlier.ld;
  for (std::int64_t i = threadIdx.x; i < earlier.cols; i += kThreads) sums[i] *= growth.factor;
}

// A block takes one token. Its label's row is one of the weight, dense; or, decoded, the token's of `of_labels`.
__global__ void finish_scores_kernel(Matrix states, const std::int64_t* labels, std::int64_t vocabulary,
                                     Matrix of_labels, bool decoded, float scale, float cap, MutableMatrix scores,
                                     Matrix sum, MutableMatrix dx) {
  const ScoreState& state = static_cast<const ScoreState*>(states.data)[blockIdx.x];
  const std::int64_t label = labels[blockIdx.x];
  const bool known = label >= 0 && label < vocabulary;
  float found[kScores];
  const double e = exp(static_cast<double>(state.of_label) - static_cast<double>(state.largest));
  const ScoreShares shares =
      pissa::finish_scores(state, known, e, vocabulary, scale, cap, [](double value) { return log(value); }, found);
  float* to = static_cast<float*>(scores.data) + blockIdx.x * scores.ld;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kScores; ++i) to[i] = found[i];
  }
  const std::int64_t from = (decoded ? blockIdx.x : known ? label : 0) * of_labels.ld;
  for (std::int64_t i = threadIdx.x; i < dx.cols; i += kThreads) {
    const float others = static_cast<const float*>(sum.data)[blockIdx.x * sum.ld + i];
    store(dx.data, dx.format, blockIdx.x * dx.ld + i,
          shares.label * load(of_labels.data, of_labels.format, from + i) + shares.others * others);
  }
}

}  // namespace

void add_scores(const Context& context, const MutableMatrix& logits, const std::int64_t* labels, std::int64_t first,
                float scale, float cap, const MutableMatrix& state, const MutableMatrix& earlier, bool gradient) {
  launch(context, "add_scores", add_scores_kernel, dim3(static_cast<unsigned>(logits.rows)), kThreads, logits, labels,
         first, scale, cap, state, earlier, gradient);
}

void finish_scores(const Context& context, const Matrix& state, const std::int64_t* labels, const Matrix& weight,
                   float scale, float cap, const MutableMatrix& scores, const Matrix& sum, const MutableMatrix& dx) {
  const bool decoded = dx && is_quantized(weight.format);
  const Buffer rows(context, decoded ? dx.rows : 0, dx.cols, Format::f32);
  if (decoded) decode_rows(context, weight, labels, rows.view());
  const Matrix of_labels = decoded ? static_cast<Matrix>(rows.view()) : weight;
  launch(context, "finish_scores", finish_scores_kernel, dim3(static_cast<unsigned>(scores.rows)), kThreads, state,
         labels, weight.rows, of_labels, decoded, scale, cap, scores, sum, dx);
}

}  // namespace pissa::cuda
