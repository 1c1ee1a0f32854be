#include "pissa/cpu/attention.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "pissa/cpu/backend.h"
#include "pissa/cpu/gemm_blocks.h"
#include "pissa/cpu/parallel.h"

namespace pissa::cpu {
namespace {

// Queries in a block: their scores of 2,048 keys are 512 KB. With 128, more scores are computed that the causal mask
// hides: 127 tokens then take 15% longer (Zen 4).
constexpr std::int64_t kQueries = 64;

// Fewer tasks leave threads idle: 3 heads of keys keep two threads at 3/4. More sums, 64 MB at most, cost up to 10%.
constexpr std::int64_t kFewTasks = 12, kSums = 16 << 20;

// Queries [first, first + count) of a head, and the keys that they see.
class Rows {
 public:
  Rows(const Attention& problem, std::int64_t b, std::int64_t h, std::int64_t first)
      : problem_(problem),
        mask_(problem.mask ? problem.mask + b * problem.mask_batch + h * problem.mask_head : nullptr),
        first(first),
        count(std::min(kQueries, problem.q.length - first)) {
    for (std::int64_t i = 0; i < count; ++i) end = std::max(end, seen(i));
  }

  // The number of keys, from 0 on, that include all keys which row i sees.
  std::int64_t seen(std::int64_t i) const {
    const std::int64_t keys = problem_.k.length;
    std::int64_t limit = keys;
    if (problem_.causal) limit = std::clamp<std::int64_t>(first + i + 1 + keys - problem_.q.length, 0, keys);
    while (mask_ && limit > 0 && !mask(i)[limit - 1]) --limit;
    return limit;
  }
  const std::uint8_t* mask(std::int64_t i) const { return mask_ ? mask_ + (first + i) * problem_.mask_row : nullptr; }

 private:
  const Attention& problem_;
  const std::uint8_t* mask_;

 public:
  const std::int64_t first, count;
  std::int64_t end = 1;
};

float* row_of(const Buffer& buffer, std::int64_t i) {
  return static_cast<float*>(buffer.view().data) + i * buffer.view().ld;
}

// Sums [length, dim] over queries, from 0 on.
struct Sums {
  Sums() : Sums(0, 0, 0) {}
  Sums(std::int64_t length, std::int64_t k_dim, std::int64_t v_dim) : k(length, k_dim), v(length, v_dim) {
    for (Buffer* sum : {&k, &v}) std::fill_n(row_of(*sum, 0), sum->view().rows * sum->view().cols, 0.0f);
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

std::int64_t work_of(const Attention& problem) {
  return problem.q.batch * problem.q.heads * problem.q.length * problem.k.length * (problem.q.dim + problem.v.dim);
}

void store(const Kernels& kernels, const Buffer& from, const MutableMatrix& to) {
  for (std::int64_t i = 0; i < to.rows; ++i) {
    kernels.encode(row_of(from, i), to.cols, to.format, rows_of(to, i, 1).data);
  }
}

float dot(const Kernels& kernels, const Matrix& a, const Matrix& b, std::int64_t row, Buffer& scratch) {
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
  parallel_for(executor, q.batch * q.heads * blocks, work_of(problem), [&](std::int64_t task) {
    const std::int64_t head = task / blocks, b = head / q.heads, h = head % q.heads;
    const Rows rows(problem, b, h, task % blocks * kQueries);
    const Matrix keys = rows_of(problem.k.head(b, h / group), 0, rows.end);
    const Matrix values = rows_of(problem.v.head(b, h / group), 0, rows.end);
    const Buffer p(rows.count, rows.end);
    multiply(rows_of(q.head(b, h), rows.first, rows.count), Op::n, keys, Op::t, p.view());
    for (std::int64_t i = 0; i < rows.count; ++i) {
      log_sums[head * q.length + rows.first + i] =
          kernels.softmax_row(row_of(p, i), rows.seen(i), rows.end, rows.mask(i), problem.scale);
    }
    multiply(p.view(), Op::n, values, Op::n, rows_of(out.head(b, h), rows.first, rows.count));
  });
}

// A task takes all heads of queries that share a head of keys or, where such tasks are few, one of these. Neither
// this choice nor the order of sums depends on the number of threads.
void attention_backward(const Executor& executor, const Kernels& kernels, const Attention& problem, const Heads& out,
                        const float* log_sums, const Heads& dout, const Heads& dq, const Heads& dk, const Heads& dv) {
  const Heads &q = problem.q, &k = problem.k, &v = problem.v;
  const std::int64_t group = q.heads / k.heads, key_heads = q.batch * k.heads;
  const Products multiply{kernels, precision_of(q.format)};

  // Writes dq of a head of queries, and adds its part of dk and dv.
  const auto add_head = [&](std::int64_t b, std::int64_t h, const Sums& sums) {
    Buffer scratch(2, v.dim);
    for (std::int64_t first = 0; first < q.length; first += kQueries) {
      const Rows rows(problem, b, h, first);
      const auto part = [&](const Heads& heads) { return rows_of(heads.head(b, h), first, rows.count); };
      const Matrix keys = rows_of(k.head(b, h / group), 0, rows.end);
      const Matrix values = rows_of(v.head(b, h / group), 0, rows.end);
      const Buffer p(rows.count, rows.end), ds(rows.count, rows.end), turned(rows.end, rows.count);
      multiply(part(q), Op::n, keys, Op::t, p.view());
      multiply(part(dout), Op::n, values, Op::t, ds.view());
      for (std::int64_t i = 0; i < rows.count; ++i) {
        const float log_sum = log_sums[(b * q.heads + h) * q.length + first + i];
        const float less = dot(kernels, part(dout), part(out), i, scratch);
        kernels.softmax_backward_row(row_of(p, i), row_of(ds, i), rows.seen(i), rows.end, rows.mask(i), log_sum, less,
                                     problem.scale);
      }
      // Packing a first operand across its rows takes as long as its product with 64 columns.
      const auto add_transposed = [&](const Buffer& a, const Matrix& other, const Buffer& sum) {
        kernels.transpose(row_of(a, 0), rows.count, rows.end, row_of(turned, 0));
        multiply(turned.view(), Op::n, other, Op::n, rows_of(sum.view(), 0, rows.end), true);
      };
      add_transposed(p, part(dout), sums.v);
      add_transposed(ds, part(q), sums.k);
      multiply(ds.view(), Op::n, keys, Op::n, part(dq));
    }
  };
  const auto finish = [&](std::int64_t key_head, const Sums& sums) {
    store(kernels, sums.k, dk.head(key_head / k.heads, key_head % k.heads));
    store(kernels, sums.v, dv.head(key_head / k.heads, key_head % k.heads));
  };

  const bool few = key_heads < kFewTasks && q.batch * q.heads * k.length * (k.dim + v.dim) <= kSums;
  const std::int64_t parts = few ? group : 1, heads = group / parts;
  std::vector<Sums> kept(parts > 1 ? key_heads * parts : 0);
  parallel_for(executor, key_heads * parts, 2 * work_of(problem), [&](std::int64_t task) {
    Sums sums(k.length, k.dim, v.dim);
    for (std::int64_t i = task * heads; i < (task + 1) * heads; ++i) add_head(i / q.heads, i % q.heads, sums);
    if (parts == 1) return finish(task, sums);
    kept[task] = std::move(sums);
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
