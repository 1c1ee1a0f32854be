// Attention against float64: heads that share keys, masks, causality, layouts, blocks of queries, threads.
#include "pissa/cpu/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "support/isa_test.h"
#include "support/matrices.h"
#include "support/reference.h"
#include "support/threads.h"

namespace pissa::test {
namespace {

// [batch, heads, length, dim] as transformers has it: heads of one position are neighbours.
class HeadsOf {
 public:
  HeadsOf(Random& random, std::int64_t batch, std::int64_t heads, std::int64_t length, std::int64_t dim, Format format)
      : HeadsOf(Stored(random.dense(batch * length, heads * dim), format, 0, 0), batch, heads, length, dim) {}
  HeadsOf(const Stored& stored, std::int64_t batch, std::int64_t heads, std::int64_t length, std::int64_t dim)
      : stored_(stored), batch_(batch), heads_(heads), length_(length), dim_(dim) {}
  static HeadsOf poisoned(const HeadsOf& like) {
    const Matrix view = like.stored_.view();
    return {Stored::poisoned(view.rows, view.cols, view.format, 0, 0), like.batch_, like.heads_, like.length_,
            like.dim_};
  }
  Heads view() {
    const MutableMatrix all = stored_.mutable_view();
    return {all.data, batch_, heads_, length_, dim_, length_ * heads_ * dim_, dim_, heads_ * dim_, all.format};
  }
  Dense head(std::int64_t b, std::int64_t h) const {
    const Dense all = stored_.values();
    Dense found(length_, dim_);
    for (std::int64_t i = 0; i < length_; ++i) {
      for (std::int64_t j = 0; j < dim_; ++j) found(i, j) = all(b * length_ + i, h * dim_ + j);
    }
    return found;
  }
  std::vector<std::uint8_t> bytes() const { return stored_.bytes(); }
  std::int64_t batch() const { return batch_; }
  std::int64_t heads() const { return heads_; }
  std::int64_t length() const { return length_; }

 private:
  Stored stored_;
  std::int64_t batch_, heads_, length_, dim_;
};

// Which keys a mask shows: any; those of the same of three packed sequences; not the first, or not the last, which are
// padding.
enum class Mask { none, random, packed, padded_left, padded_right };

bool shown(Mask mask, Random& random, std::int64_t query, std::int64_t queries, std::int64_t key, std::int64_t keys) {
  const auto sequence = [](std::int64_t at, std::int64_t length) { return (5 * at > length) + (2 * at > length); };
  switch (mask) {
    case Mask::random:
      return random.below(3) > 0 && query != 2;  // which sees nothing
    case Mask::packed:
      return sequence(query, queries) == sequence(key, keys);
    case Mask::padded_left:
      return key >= keys / 3;
    case Mask::padded_right:
      return key < keys - keys / 3;
    default:
      return true;
  }
}

struct Case {
  std::int64_t batch = 1, heads = 2, group = 1, queries = 7, keys = 7, dim = 16, values = 16;
  bool causal = false;
  Mask masked = Mask::none;
  bool mask_of_heads = false;
  Format format = Format::f32;
};

struct Tensors {
  HeadsOf q, k, v, dout, out, dq, dk, dv;
  std::vector<float> log_sums;
  std::vector<std::uint8_t> mask;
  float scale;
  Attention problem;
  std::int64_t mask_heads = 1;

  Tensors(Random& random, const Case& c)
      : q(random, c.batch, c.heads, c.queries, c.dim, c.format),
        k(random, c.batch, c.heads / c.group, c.keys, c.dim, c.format),
        v(random, c.batch, c.heads / c.group, c.keys, c.values, c.format),
        dout(random, c.batch, c.heads, c.queries, c.values, c.format),
        out(HeadsOf::poisoned(dout)),
        dq(HeadsOf::poisoned(q)),
        dk(HeadsOf::poisoned(k)),
        dv(HeadsOf::poisoned(v)),
        log_sums(static_cast<std::size_t>(c.batch * c.heads * c.queries)),
        scale(1.0f / std::sqrt(static_cast<float>(c.dim))) {
    problem = {q.view(), k.view(), v.view(), scale, c.causal};
    if (c.masked == Mask::none) return;
    mask_heads = c.mask_of_heads ? c.heads : 1;
    for (std::int64_t row = 0; row < c.batch * mask_heads * c.queries; ++row) {
      for (std::int64_t key = 0; key < c.keys; ++key) {
        const bool seen = shown(c.masked, random, row % c.queries, c.queries, key, c.keys);
        mask.push_back(seen ? static_cast<std::uint8_t>(1 + 127 * (key % 3)) : 0);  // any bytes, viewed as bool
      }
    }
    problem.mask = mask.data();
    problem.mask_batch = mask_heads * c.queries * c.keys;
    problem.mask_head = c.mask_of_heads ? c.queries * c.keys : 0;
    problem.mask_row = c.keys;
  }
  void run(const cpu::Executor& executor, const cpu::Kernels& kernels) {
    attention_forward(executor, kernels, problem, out.view(), log_sums.data());
    attention_backward(executor, kernels, problem, out.view(), log_sums.data(), dout.view(), dq.view(), dk.view(),
                       dv.view());
  }
  bool sees(const Case& c, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    if (c.causal && j > i + c.keys - c.queries) return false;
    const std::int64_t row = (b * mask_heads + h % mask_heads) * c.queries + i;
    return c.masked == Mask::none || mask[static_cast<std::size_t>(row * c.keys + j)];
  }
};

class AttentionTest : public IsaTest {
 protected:
  // A score is off by the roundings of its product, a share by twice that in proportion; then it is rounded to half
  // precision, as are the shares' gradients. `size`: what would be there if nothing cancelled.
  void check(const Case& c) const {
    SCOPED_TRACE(::testing::Message() << c.batch << " x " << c.heads << " / " << c.group << ", " << c.queries << " of "
                                      << c.keys << ", " << c.dim << ", " << c.values << (c.causal ? " causal" : "")
                                      << " mask " << static_cast<int>(c.masked) << " " << name(c.format));
    Random random(7);
    Tensors t(random, c);
    const cpu::ThreadExecutor executor(1);
    t.run(executor, kernels());
    const double unit = 0x1p-24;
    const double half = c.format == Format::f32 ? 0 : c.format == Format::bf16 ? 0x1p-8 : 0x1p-11;
    const auto expect_near = [&](const Dense& found, const Dense& value, const Dense& size, double rel,
                                 const char* what) {
      for (std::int64_t i = 0; i < found.rows; ++i) {
        for (std::int64_t j = 0; j < found.cols; ++j) {
          ASSERT_NEAR(found(i, j), value(i, j), rel * size(i, j) + half * std::abs(value(i, j)) + 1e-30)
              << what << " " << i << ", " << j;
        }
      }
    };
    for (std::int64_t b = 0; b < c.batch; ++b) {
      for (std::int64_t shared = 0; shared < c.heads / c.group; ++shared) {
        const Dense k = t.k.head(b, shared), v = t.v.head(b, shared);
        Dense dk(c.keys, c.dim), dv(c.keys, c.values), size_k = dk, size_v = dv;
        double worst = 0;
        for (std::int64_t h = shared * c.group; h < (shared + 1) * c.group; ++h) {
          const Dense q = t.q.head(b, h), dout = t.dout.head(b, h), out = t.out.head(b, h);
          const Dense scores = q * transposed(k), sizes = absolute(q) * transposed(absolute(k));
          Dense p(c.queries, c.keys);
          double off = 0;
          for (std::int64_t i = 0; i < c.queries; ++i) {
            double sum = 0;
            for (std::int64_t j = 0; j < c.keys; ++j) {
              p(i, j) = t.sees(c, b, h, i, j) ? std::exp(double{t.scale} * scores(i, j)) : 0;
              sum += p(i, j);
              off = std::max(off, unit * static_cast<double>(c.dim + 8) * t.scale * sizes(i, j));
            }
            for (std::int64_t j = 0; j < c.keys && sum > 0; ++j) p(i, j) /= sum;
            const float log_sum = t.log_sums[static_cast<std::size_t>((b * c.heads + h) * c.queries + i)];
            if (sum > 0) {
              ASSERT_NEAR(log_sum, std::log(sum), 2 * off + 1e-5);
            } else {
              ASSERT_EQ(log_sum, -INFINITY);
            }
          }
          const double rel = 2 * off + half + unit * static_cast<double>(c.keys + c.values + 100);
          worst = std::max(worst, 2 * rel + 4 * half);
          const Dense exact = p * v, size = p * absolute(v);
          expect_near(out, exact, size, rel, "out");

          const Dense dp = dout * transposed(v), dp_size = absolute(dout) * transposed(absolute(v));
          Dense ds(c.queries, c.keys), ds_size = ds;
          for (std::int64_t i = 0; i < c.queries; ++i) {
            double less = 0, less_size = 0;
            for (std::int64_t j = 0; j < c.values; ++j) {
              less += dout(i, j) * exact(i, j);
              less_size += std::abs(dout(i, j)) * size(i, j);
            }
            for (std::int64_t j = 0; j < c.keys; ++j) {
              ds(i, j) = t.scale * p(i, j) * (dp(i, j) - less);
              ds_size(i, j) = t.scale * p(i, j) * (dp_size(i, j) + less_size);
            }
          }
          expect_near(t.dq.head(b, h), ds * k, ds_size * absolute(k), worst, "dq");
          dk = dk + transposed(ds) * q;
          size_k = size_k + transposed(ds_size) * absolute(q);
          dv = dv + transposed(p) * dout;
          size_v = size_v + transposed(p) * absolute(dout);
        }
        expect_near(t.dk.head(b, shared), dk, size_k, worst, "dk");
        expect_near(t.dv.head(b, shared), dv, size_v, worst, "dv");
      }
    }
  }
};

TEST_P(AttentionTest, AgreesWithFloat64) {
  for (const Format format : kFloatFormats) {
    check({.format = format});
    check({.batch = 2,
           .heads = 6,
           .group = 3,
           .queries = 33,
           .keys = 33,
           .dim = 20,
           .values = 12,
           .causal = true,
           .format = format});
    check({.batch = 2, .queries = 20, .keys = 31, .masked = Mask::random, .format = format});
    check({.queries = 19, .keys = 40, .causal = true, .masked = Mask::random, .format = format});
    check({.queries = 90, .keys = 90, .causal = true, .masked = Mask::packed, .format = format});
  }
  for (const Mask mask : {Mask::none, Mask::random, Mask::packed, Mask::padded_left, Mask::padded_right}) {
    // several blocks of queries and of keys, and several tasks for a head of keys
    check({.heads = 4, .group = 4, .queries = 300, .keys = 300, .dim = 8, .values = 8, .causal = true, .masked = mask});
    check({.batch = 2, .queries = 75, .keys = 80, .masked = mask, .mask_of_heads = true});
    // several parts of the keys also in the forward pass, of which a query may see none
    check({.queries = 9, .keys = 4200, .dim = 8, .values = 8, .masked = mask});
  }
  check({.batch = 3, .heads = 8, .group = 2});  // a task for each head of keys
  check({.queries = 1, .keys = 5});
  check({.batch = 0, .causal = true});
  check({.batch = 2, .queries = 0, .keys = 5, .masked = Mask::padded_left});
  check({.queries = 9, .keys = 4, .causal = true});  // of which the first see nothing
}

TEST_P(AttentionTest, AQueryThatSeesNoKeyGetsZeros) {
  Random random(3);
  Tensors t(random, {.queries = 9, .keys = 4, .causal = true});
  const cpu::ThreadExecutor executor(1);
  t.run(executor, kernels());
  for (std::int64_t i = 0; i < 5; ++i) {
    for (std::int64_t j = 0; j < 16; ++j) EXPECT_EQ(t.out.head(0, 0)(i, j), 0) << i;
    EXPECT_EQ(t.dq.head(0, 1)(i, 3), 0) << i;
  }
}

TEST_P(AttentionTest, NanReachesWhatSeesIt) {
  Random random(4);
  Tensors t(random, {.heads = 1, .causal = true});
  static_cast<float*>(t.k.view().data)[5 * 16] = std::nanf("");
  const cpu::ThreadExecutor executor(1);
  t.run(executor, kernels());
  EXPECT_FALSE(std::isnan(t.out.head(0, 0)(4, 0)));
  EXPECT_TRUE(std::isnan(t.out.head(0, 0)(5, 0)));
}

TEST_P(AttentionTest, TheSameBits) {
  const auto run = [&](std::int64_t threads) {
    Random random(5);
    Tensors t(random, {.batch = 2,
                       .heads = 8,
                       .group = 4,
                       .queries = 250,
                       .keys = 250,
                       .dim = 32,
                       .values = 32,
                       .causal = true,
                       .masked = Mask::packed,
                       .format = Format::bf16});
    const cpu::ThreadExecutor executor(threads);
    t.run(executor, kernels());
    return std::vector{t.out.bytes(), t.dq.bytes(), t.dk.bytes(), t.dv.bytes()};
  };
  const auto expected = run(1);
  for (const std::int64_t threads : {2, 3, 7}) EXPECT_TRUE(run(threads) == expected) << threads;
}

PISSA_EVERY_ISA(AttentionTest);

}  // namespace
}  // namespace pissa::test
