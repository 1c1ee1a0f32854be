#include "pissa/cpu/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "pissa/cpu/backend.h"
#include "pissa/cpu/gemm_blocks.h"
#include "pissa/cpu/parallel.h"

namespace pissa::cpu {
namespace {

float* row_of(const MutableMatrix& matrix, std::int64_t i) { return static_cast<float*>(matrix.data) + i * matrix.ld; }

// Queries in a block. With 128, more scores are computed that the causal mask hides: 127 tokens then take 15% longer
// (Zen 4).
constexpr std::int64_t kQueries = 64;

// Keys whose scores the forward pass holds at a time, 512 KB, in L2.
constexpr std::int64_t kForwardKeys = 2048;

// The same for the backward pass: with their gradients and the turned ones 192 KB, in L2.
constexpr std::int64_t kKeys = 256;

// The backward pass has at least kTasks tasks, unless one would have fewer than kLeastQueries queries, with which
// adding its sums takes longer than it saves, or all sums together would be larger than kSums, 64 MB.
constexpr std::int64_t kTasks = 32, kLeastQueries = 384, kSums = 16 << 20;

// The keys [first, end) that a query sees: all of them or, if there is a mask, those where it is not 0. The mask begins
// at `first`.
struct Seen {
  std::int64_t first = 0, end = 0;
  const std::uint8_t* mask = nullptr;
};

// What a row of a mask lets a query see of the keys [0, end). Masks for causality, padding and packed sequences hide no
// key between two that they show, so that they need not be looked at again.
Seen seen_through(const std::uint8_t* mask, std::int64_t end) {
  const auto word_is_hidden = [&](std::int64_t at) {
    std::uint64_t word;
    if (at < 0 || at + 8 > end) return false;
    std::memcpy(&word, mask + at, sizeof word);
    return word == 0;
  };
  while (word_is_hidden(end - 8)) end -= 8;
  while (end > 0 && !mask[end - 1]) --end;
  if (end == 0) return {};
  std::int64_t first = 0;
  while (word_is_hidden(first)) first += 8;
  while (!mask[first]) ++first;
  const bool all = !std::memchr(mask + first, 0, static_cast<std::size_t>(end - first));
  return {first, end, all ? nullptr : mask + first};
}

// The keys that every query sees. A mask is read once, for all heads that it is the same for.
class Sight {
 public:
  Sight(const Executor& executor, const Attention& problem)
      : problem_(problem), of_batch_(problem.mask_batch ? problem.q.length : 0) {
    if (!problem.mask) return;
    const std::int64_t heads = problem.mask_head ? problem.q.heads : 1, queries = problem.q.length;
    of_batch_ *= heads;
    masked_.resize((problem.mask_batch ? problem.q.batch : 1) * heads * queries);
    const std::int64_t rows = std::ssize(masked_);
    parallel_for(executor, ceil_div(rows, kQueries), rows * problem.k.length, [&](std::int64_t task) {
      for (std::int64_t row = task * kQueries; row < std::min(rows, (task + 1) * kQueries); ++row) {
        const std::int64_t b = row / queries / heads, h = row / queries % heads, i = row % queries;
        const std::uint8_t* mask = problem.mask + b * problem.mask_batch + h * problem.mask_head + i * problem.mask_row;
        masked_[row] = seen_through(mask, end_of(i));
      }
    });
  }

  Seen of(std::int64_t b, std::int64_t h, std::int64_t i) const {
    if (masked_.empty()) return {0, end_of(i)};
    return masked_[b * of_batch_ + (problem_.mask_head ? h * problem_.q.length : 0) + i];
  }

 private:
  std::int64_t end_of(std::int64_t i) const {
    const std::int64_t keys = problem_.k.length;
    return problem_.causal ? std::clamp<std::int64_t>(i + 1 + keys - problem_.q.length, 0, keys) : keys;
  }

  const Attention& problem_;
  std::int64_t of_batch_;
  std::vector<Seen> masked_;
};

// Numbers of adjacent keys that a query sees, all or where the mask is not 0.
struct Visible {
  float* row;
  std::int64_t count;
  const std::uint8_t* mask;

  // Ends with a number that the mask shows. Sets those after it to 0.
  Visible without_hidden_end() const {
    std::int64_t shown = count;
    while (mask && shown > 0 && !mask[shown - 1]) row[--shown] = 0.0f;
    return {row, shown, mask};
  }
};

// Queries [first, first + count) of a head, and the keys [begin, begin + keys) that include all that they see.
struct Rows {
  Rows(const Sight& sight, const Attention& problem, std::int64_t b, std::int64_t h, std::int64_t block)
      : first(block * kQueries), count(std::min(kQueries, problem.q.length - first)) {
    std::int64_t end = 0;
    begin = problem.k.length;
    for (std::int64_t i = 0; i < count; ++i) {
      seen[i] = sight.of(b, h, first + i);
      if (seen[i].first == seen[i].end) continue;
      begin = std::min(begin, seen[i].first);
      end = std::max(end, seen[i].end);
    }
    if (end == 0) begin = 0, end = 1;  // nothing is seen
    keys = end - begin;
  }

  // What row i sees of the scores' keys, of which `from` is the first. Sets the others to 0.
  Visible visible(const MutableMatrix& scores, std::int64_t i, std::int64_t from) const {
    float* row = row_of(scores, i);
    const auto place = [&](std::int64_t key) { return std::clamp<std::int64_t>(key - from, 0, scores.cols); };
    const std::int64_t start = place(seen[i].first), end = place(seen[i].end);
    std::fill(row, row + start, 0.0f);
    std::fill(row + end, row + scores.cols, 0.0f);
    return {row + start, end - start, seen[i].mask ? seen[i].mask + from + start - seen[i].first : nullptr};
  }

  std::int64_t first, count, begin, keys;
  std::array<Seen, kQueries> seen;
};

// Memory for a number for each query of a block and each of `keys` keys. Every block takes it from the same piece:
// fresh pages for each, larger than the last, took 27% of the backward pass at 2,048 tokens.
class Scores {
 public:
  explicit Scores(std::int64_t keys) : buffer_(kQueries, keys) {}
  MutableMatrix view(std::int64_t rows, std::int64_t cols) const {
    return {buffer_.view().data, rows, cols, cols, Format::f32};
  }

 private:
  Buffer buffer_;
};

// Sums [length, dim] over queries.
struct Sums {
  Sums(std::int64_t length, std::int64_t k_dim, std::int64_t v_dim) : k(length, k_dim), v(length, v_dim) {}
  void clear() const {
    for (const Buffer* sum : {&k, &v}) std::fill_n(row_of(sum->view(), 0), sum->view().rows * sum->view().cols, 0.0f);
  }
  Buffer k, v;
};

struct Products {
  const Kernels& kernels;
  Precision precision;

  // out = op(a) op(b), or out += it
  void operator()(const Matrix& a, Op op_a, const Matrix& b, Op op_b, const MutableMatrix& out,
                  bool add = false) const {
    const Term term{a, op_a, b, op_b, 1.0f, precision};
    gemm_blocks(kernels, {&term, 1, add ? Matrix(out) : Matrix{}, {}, out});
  }
};

// The mean of some keys' values becomes that of these and of others, given the logarithms of their sums of exp. Returns
// that of all.
float average(float* values, float log_sum, const float* others, float log_sum_of_others, std::int64_t count) {
  if (log_sum_of_others == -INFINITY) return log_sum;
  const float largest = std::max(log_sum, log_sum_of_others);
  const float total = largest + std::log(std::exp(log_sum - largest) + std::exp(log_sum_of_others - largest));
  const float share = std::exp(log_sum - total), share_of_others = std::exp(log_sum_of_others - total);
  for (std::int64_t j = 0; j < count; ++j) values[j] = share * values[j] + share_of_others * others[j];
  return total;
}

std::int64_t work_of(const Attention& problem) {
  return problem.q.batch * problem.q.heads * problem.q.length * problem.k.length * (problem.q.dim + problem.v.dim);
}

void store(const Kernels& kernels, const MutableMatrix& from, const MutableMatrix& to) {
  for (std::int64_t i = 0; i < to.rows; ++i) {
    kernels.encode(row_of(from, i), to.cols, to.format, rows_of(to, i, 1).data);
  }
}

float dot(const Kernels& kernels, const Matrix& a, const Matrix& b, std::int64_t row, const MutableMatrix& scratch) {
  float* values = row_of(scratch, 0);
  float* others = row_of(scratch, 1);
  kernels.decode(a, row, 0, a.cols, values);
  kernels.decode(b, row, 0, b.cols, others);
  double sum = 0;
  kernels.gram(values, others, a.cols, a.cols, 0, 1, &sum, 1);
  return static_cast<float>(sum);
}

}  // namespace

void attention_forward(const Executor& executor, const Kernels& kernels, const Attention& problem, const Heads& out,
                       float* log_sums) {
  const Heads& q = problem.q;
  const std::int64_t group = q.heads / problem.k.heads;
  const std::int64_t blocks = ceil_div(q.length, kQueries);
  const Products multiply{kernels, precision_of(q.format)};
  const Sight sight(executor, problem);
  parallel_for(executor, q.batch * q.heads * blocks, work_of(problem), [&](std::int64_t task) {
    const std::int64_t head = task / blocks, b = head / q.heads, h = head % q.heads;
    const Rows rows(sight, problem, b, h, blocks - 1 - task % blocks);  // with causality, the longest task first
    const Scores p_memory(std::min(kForwardKeys, problem.k.length));
    const Buffer sums(2 * kQueries, problem.v.dim);
    const MutableMatrix sum = rows_of(sums.view(), 0, rows.count);
    float* const log_sum = log_sums + head * q.length + rows.first;
    for (std::int64_t from = rows.begin; from < rows.begin + rows.keys; from += kForwardKeys) {
      const bool first = from == rows.begin;
      const std::int64_t count = std::min(kForwardKeys, rows.begin + rows.keys - from);
      const auto part = [&](const Heads& heads) { return rows_of(heads.head(b, h / group), from, count); };
      const MutableMatrix p = p_memory.view(rows.count, count);
      const MutableMatrix others = first ? sum : rows_of(sums.view(), kQueries, rows.count);
      multiply(rows_of(q.head(b, h), rows.first, rows.count), Op::n, part(problem.k), Op::t, p);
      std::array<float, kQueries> logs, shares;
      for (std::int64_t i = 0; i < rows.count; ++i) {
        const auto [row, seen, mask] = rows.visible(p, i, from).without_hidden_end();
        logs[i] = kernels.softmax_row(row, seen, mask, problem.scale, &shares[i]);
      }
      multiply(p, Op::n, part(problem.v), Op::n, others);
      for (std::int64_t i = 0; i < rows.count; ++i) {
        for (std::int64_t j = 0; j < sum.cols; ++j) row_of(others, i)[j] *= shares[i];
        log_sum[i] = first ? logs[i] : average(row_of(sum, i), log_sum[i], row_of(others, i), logs[i], sum.cols);
      }
    }
    store(kernels, sum, rows_of(out.head(b, h), rows.first, rows.count));
  });
}

// Each of `parts` tasks takes every parts-th block of the queries that share a head of keys. Neither their number nor
// the order of sums depends on the number of threads.
void attention_backward(const Executor& executor, const Kernels& kernels, const Attention& problem, const Heads& out,
                        const float* log_sums, const Heads& dout, const Heads& dq, const Heads& dk, const Heads& dv) {
  const Heads &q = problem.q, &k = problem.k, &v = problem.v;
  const std::int64_t group = q.heads / k.heads, key_heads = q.batch * k.heads;
  const std::int64_t blocks = ceil_div(q.length, kQueries);
  const Products multiply{kernels, precision_of(q.format)};
  const Sight sight(executor, problem);

  const auto at_least_one = [](std::int64_t count) { return std::max<std::int64_t>(count, 1); };  // an empty batch
  const std::int64_t fitting = kSums / at_least_one(key_heads * k.length * (k.dim + v.dim));
  const std::int64_t parts =
      at_least_one(std::min({ceil_div(kTasks, at_least_one(key_heads)), group * q.length / kLeastQueries, fitting}));
  std::vector<Sums> kept;  // made by the thread that frees them, which keeps their memory for its own next buffers
  for (std::int64_t task = 0; parts > 1 && task < key_heads * parts; ++task) kept.emplace_back(k.length, k.dim, v.dim);
  const auto finish = [&](std::int64_t key_head, const Sums& sums) {
    store(kernels, sums.k.view(), dk.head(key_head / k.heads, key_head % k.heads));
    store(kernels, sums.v.view(), dv.head(key_head / k.heads, key_head % k.heads));
  };
  parallel_for(executor, key_heads * parts, 2 * work_of(problem), [&](std::int64_t task) {
    const std::int64_t key_head = task / parts, b = key_head / k.heads;
    const Sums own(parts > 1 ? 0 : k.length, k.dim, v.dim);
    const Sums& sums = parts > 1 ? kept[task] : own;
    sums.clear();
    const Scores p_memory(kKeys), ds_memory(kKeys), turned_memory(kKeys);
    const Buffer scratch(2, v.dim), dq_memory(kQueries, q.dim);
    for (std::int64_t i = task % parts; i < group * blocks; i += parts) {
      const std::int64_t h = key_head % k.heads * group + i % group;
      const Rows rows(sight, problem, b, h, i / group);
      const auto part = [&](const Heads& heads) { return rows_of(heads.head(b, h), rows.first, rows.count); };
      const float* log_sum = log_sums + (b * q.heads + h) * q.length + rows.first;
      std::array<float, kQueries> less;
      for (std::int64_t row = 0; row < rows.count; ++row) {
        less[row] = dot(kernels, part(dout), part(out), row, scratch.view());
      }
      const MutableMatrix dq_sum = rows_of(dq_memory.view(), 0, rows.count);
      for (std::int64_t from = rows.begin; from < rows.begin + rows.keys; from += kKeys) {
        const std::int64_t count = std::min(kKeys, rows.begin + rows.keys - from);
        const Matrix keys = rows_of(k.head(b, h / group), from, count);
        const MutableMatrix p = p_memory.view(rows.count, count), ds = ds_memory.view(rows.count, count);
        multiply(part(q), Op::n, keys, Op::t, p);
        multiply(part(dout), Op::n, rows_of(v.head(b, h / group), from, count), Op::t, ds);
        for (std::int64_t row = 0; row < rows.count; ++row) {
          const auto [to, seen, mask] = rows.visible(p, row, from);
          kernels.softmax_backward_row(to, rows.visible(ds, row, from).row, seen, mask, log_sum[row], less[row],
                                       problem.scale);
        }
        // Packing a first operand across its rows takes as long as its product with 64 columns.
        const auto add_transposed = [&](const MutableMatrix& a, const Matrix& other, const Buffer& sum) {
          MutableMatrix turned = turned_memory.view(count, rows.count);
          if (kernels.bf16 && multiply.precision == Precision::bf16 && rows.count % 32 == 0) {
            turned.format = Format::bf16;
            kernels.transpose_to_bf16(row_of(a, 0), rows.count, count, turned.data);
          } else {
            kernels.transpose(row_of(a, 0), rows.count, count, row_of(turned, 0));
          }
          multiply(turned, Op::n, other, Op::n, rows_of(sum.view(), from, count), true);
        };
        add_transposed(p, part(dout), sums.v);
        add_transposed(ds, part(q), sums.k);
        multiply(ds, Op::n, keys, Op::n, dq_sum, from > rows.begin);
      }
      store(kernels, dq_sum, part(dq));
    }
    if (parts == 1) finish(key_head, sums);
  });
  const CpuBackend backend(executor, kernels);
  for (std::int64_t task = 0; task < std::ssize(kept); task += parts) {
    const auto [k_sum, v_sum] = std::pair(kept[task].k.view(), kept[task].v.view());
    for (std::int64_t part = task + 1; part < task + parts; ++part) {
      backend.add(k_sum, kept[part].k.view(), k_sum);
      backend.add(v_sum, kept[part].v.view(), v_sum);
    }
    finish(task / parts, kept[task]);
  }
}

}  // namespace pissa::cpu
