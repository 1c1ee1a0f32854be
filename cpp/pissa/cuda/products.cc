#include "pissa/cuda/products.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "pissa/core/quantized.h"
#include "pissa/cuda/codes.h"
#include "pissa/cuda/elementwise.h"
#include "pissa/cuda/few_rows.h"
#include "pissa/cuda/gemm.h"
#include "pissa/cuda/routes.h"

namespace pissa::cuda {
namespace {

// out = scale * a, rounded once.
void convert_scaled(const Context& context, const Matrix& a, float scale, const MutableMatrix& out,
                    std::int64_t count) {
  if (!is_quantized(a.format)) return convert(context, a, scale, out, count);
  if (scale == 1.0f) return decode_codes(context, a, 0, 0, out);
  const Buffer decoded(context, a.rows, a.cols, Format::f32);
  decode_codes(context, a, 0, 0, decoded.view());
  convert(context, decoded.view(), scale, out, 1);
}

// scale * matrix in the format wanted: itself, or a copy.
class Converted {
 public:
  Converted(const Context& context, const Matrix& matrix, Format format, std::int64_t count, float scale = 1.0f)
      : view_(matrix) {
    if (matrix.format == format && scale == 1.0f) return;
    const std::int64_t copies = matrix.stride == 0 ? 1 : count;
    copy_.emplace(context, matrix.rows, matrix.cols, format, copies);
    convert_scaled(context, matrix, scale, copy_->view(), copies);
    view_ = copy_->view();
  }
  const Matrix& view() const { return view_; }

 private:
  Matrix view_;
  std::optional<Buffer> copy_;
};

bool same_place(const Matrix& a, const Matrix& b) {
  return a.data == b.data && a.format == b.format && a.ld == b.ld && a.stride == b.stride;
}

bool of_one_scale(std::span<const Term> terms) {
  return std::ranges::all_of(terms, [&](const Term& term) { return term.scale == terms[0].scale; });
}

// Powers of two for the factors of a product and for its sum, by Precision::f16_scaled.
struct Powers {
  float a = 1.0f, b = 1.0f, sum = 1.0f;
};

Powers powers_of(const Term& term) {
  if (term.precision != Precision::f16_scaled) return {};
  if (term.a.format == Format::f32) return {.a = kScaledDown, .b = kScaledUp};
  return {.b = kScaledDown, .sum = kScaledUp};
}

// Several terms as one: their first factors side by side, their second ones too. One product rounds once. Its scale is
// theirs; where they differ, the smaller factor of each carries its own.
class Concatenation {
 public:
  Concatenation(const Context& context, std::span<const Term> terms, Format format, std::int64_t count)
      : a_(room(context, terms[0].a, terms[0].op_a == Op::n, terms, format, count)),
        b_(room(context, terms[0].b, terms[0].op_b == Op::t, terms, format, count)),
        term_{a_.view(), terms[0].op_a, b_.view(), terms[0].op_b} {
    const bool together = of_one_scale(terms);
    if (together) term_.scale = terms[0].scale;
    std::int64_t first = 0;
    for (const Term& term : terms) {
      const bool a_is_smaller = term.a.rows * term.a.cols < term.b.rows * term.b.cols;
      const Powers powers = powers_of(term);
      const float a_scale = powers.a * (together || !a_is_smaller ? 1.0f : term.scale);
      const float b_scale = powers.b * (together || a_is_smaller ? 1.0f : term.scale);
      place(context, term.a, a_scale, term.op_a == Op::n, a_.view(), first, count);
      place(context, term.b, b_scale, term.op_b == Op::t, b_.view(), first, count);
      first += term.inner();
    }
  }
  const Term& term() const { return term_; }

 private:
  // For all parts together, in columns side by side or in rows.
  static Buffer room(const Context& context, const Matrix& part, bool beside, std::span<const Term> terms,
                     Format format, std::int64_t count) {
    std::int64_t inner = 0;
    for (const Term& term : terms) inner += term.inner();
    return {context, beside ? part.rows : inner, beside ? inner : part.cols, format, count};
  }
  static void place(const Context& context, const Matrix& part, float scale, bool beside, const MutableMatrix& whole,
                    std::int64_t first, std::int64_t count) {
    convert_scaled(context, part, scale, beside ? cols_of(whole, first, part.cols) : rows_of(whole, first, part.rows),
                   count);
  }

  Buffer a_, b_;
  Term term_;
};

// Factors that keep every digit would lose some with a scale of their own.
bool can_concatenate(std::span<const Term> terms, Format format) {
  return format != Format::f32 && terms.size() > 1 && std::ranges::all_of(terms, [&](const Term& term) {
           return term.op_a == terms[0].op_a && term.op_b == terms[0].op_b &&
                  common_format(term.a, term.b, term.precision) == format &&
                  (term.precision != Precision::f32 || of_one_scale(terms)) && powers_of(term).sum == 1.0f;
         });
}

// sum (+)= scale * op(a) op(b)
void add_product(const Context& context, const Term& term, Format format, bool accumulate, const MutableMatrix& sum,
                 std::int64_t count) {
  const Powers powers = powers_of(term);
  const Converted a(context, term.a, format, count, powers.a);
  const Converted b(context, term.b, format, count, powers.b);
  matmul(context, {.a = a.view(),
                   .op_a = term.op_a,
                   .b = b.view(),
                   .op_b = term.op_b,
                   .alpha = powers.sum * term.scale,
                   .accumulate = accumulate,
                   .may_use_tf32 = term.precision == Precision::tf32,
                   .out = sum,
                   .count = count});
}

// How a product with a weight is computed: a function of formats, shapes and the scale.
struct WeightPlan {
  Format format;  // of both factors
  bool in_place;  // whether y takes the sum, or a conversion of it from f32
  // Where the scale goes: in half precision after the sum; in f32 before it, onto x, for sums of elements near 1e37
  // overflow. Beyond 2^+-64 onto the weight, which is then so small or so large that a product might take denormals for
  // zero: those of the weight, or what the scale makes of x. A power of two loses nothing.
  float x_scale = 1.0f, weight_scale = 1.0f, sum_scale = 1.0f;

  WeightPlan(const Matrix& x, const Matrix& weight, float scale, Precision precision, const MutableMatrix& y)
      : format(common_format(x, weight, precision)), in_place(y.format == Format::f32 || y.format == format) {
    const float size = std::fabs(scale);
    if (format != Format::f32) sum_scale = scale;
    else if (is_quantized(weight.format) || (size >= 0x1p-64f && size <= 0x1p64f)) x_scale = scale;
    else weight_scale = scale;
  }
};

// Turing's tensor cores multiply f16 alone.
bool has_tensor_cores(const Context& context, Format format) {
  return format == Format::f16 || capability(context.device) >= 80;
}

void fill_zero(const Context& context, const MutableMatrix& out, std::int64_t count) {
  const Buffer zero(context, 1, out.cols, Format::f32);
  check(cudaMemsetAsync(zero.view().data, 0, static_cast<std::size_t>(out.cols) * sizeof(float), context.stream),
        context, "cudaMemsetAsync", "bytes", out.cols * 4);
  convert(context, Matrix{zero.view().data, out.rows, out.cols, 0, Format::f32}, 1.0f, out, count);
}

}  // namespace

Format common_format(const Matrix& a, const Matrix& b, Precision precision) {
  if (format_of(precision) != Format::f32) return format_of(precision);
  return a.format == b.format && !is_quantized(a.format) ? a.format : Format::f32;
}

void convert_any(const Context& context, const Matrix& a, const MutableMatrix& out, std::int64_t count) {
  convert_scaled(context, a, 1.0f, out, count);
}

void sum_of_products(const Context& context, std::span<const Term> all_terms, const Matrix& addend,
                     const MutableMatrix& out, std::int64_t count) {
  check_terms(all_terms);
  if (out.rows == 0 || out.cols == 0) return;
  std::vector<Term> terms;
  std::ranges::copy_if(all_terms, std::back_inserter(terms), [](const Term& term) { return term.inner() > 0; });
  if (terms.empty()) {
    if (!addend) return fill_zero(context, out, count);
    if (!same_place(addend, out)) convert_any(context, addend, out, count);
    return;
  }
  if (count == 1 && few_rows_fit(terms, out) && !is_quantized(addend.format) &&
      is_open(context.device, Route::few_rows)) {
    return few_rows_gemm(context, terms, addend, {}, out);
  }

  const Format format = common_format(terms[0].a, terms[0].b, terms[0].precision);
  std::optional<Concatenation> concatenation;
  if (can_concatenate(terms, format)) {
    concatenation.emplace(context, terms, format, count);
    terms.assign(1, concatenation->term());
  }
  // cuBLAS rounds what it adds to; so halves take one product, and nothing that they could not hold exactly.
  const bool in_place =
      out.format == Format::f32 || (terms.size() == 1 && out.format == format && (!addend || addend.format == format));
  std::optional<Buffer> f32_sum;
  if (!in_place) f32_sum.emplace(context, out.rows, out.cols, Format::f32, count);
  const MutableMatrix sum = in_place ? out : f32_sum->view();
  if (addend && !same_place(addend, sum)) convert_any(context, addend, sum, count);
  bool accumulate = static_cast<bool>(addend);
  for (const Term& term : terms) {
    add_product(context, term, common_format(term.a, term.b, term.precision), accumulate, sum, count);
    accumulate = true;
  }
  if (!in_place) convert(context, sum, 1.0f, out, count);
}

void weight_product(const Context& context, const Matrix& x, const Weight& weight, Op op, float scale,
                    Precision precision, std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y,
                    std::int64_t chunk_bytes) {
  check_terms(tail, kMostTail);
  if (y.rows == 0 || y.cols == 0) return;
  const WeightPlan plan(x, weight.view(), scale, precision, y);
  if (op == Op::t && scale == 1.0f && plan.format == x.format && few_rows_quantized_fits(x, weight.view(), tail) &&
      has_tensor_cores(context, x.format) && is_open(context.device, Route::few_rows)) {
    return few_rows_quantized(context, x, weight.view(), tail, bias, y);
  }

  std::optional<Buffer> f32_sum;
  if (!plan.in_place) f32_sum.emplace(context, y.rows, y.cols, Format::f32);
  const MutableMatrix sum = plan.in_place ? y : f32_sum->view();

  const Matrix bias_rows = bias ? Matrix{bias.data, y.rows, y.cols, 0, bias.format} : Matrix{};  // the same everywhere
  if (x.cols == 0) {
    sum_of_products(context, tail, bias_rows, sum);
  } else {
    WeightChunks chunks(context, weight, op, plan.weight_scale, plan.format, chunk_bytes, !tail.empty());
    const Converted x_converted(context, x, plan.format, 1, plan.x_scale);
    Matmul product{.a = x_converted.view(),
                   .b = chunks.front(),
                   .op_b = op,
                   .alpha = plan.sum_scale,
                   .may_use_tf32 = precision == Precision::tf32,
                   .out = cols_of(sum, 0, chunks.step())};
    // The thin products first: the large one then adds to them what it computes, which costs it nothing.
    const bool bias_last = bias && takes_bias(context, product, bias);
    product.accumulate = !tail.empty() || (bias && !bias_last);
    if (product.accumulate) sum_of_products(context, tail, bias_last ? Matrix{} : bias_rows, sum);
    chunks.for_each([&](const Matrix& chunk, std::int64_t first, std::int64_t cols) {
      product.b = chunk;
      product.out = cols_of(sum, first, cols);
      if (bias_last) product.bias = cols_of(bias, first, cols);
      matmul(context, product);
    });
  }
  if (!plan.in_place) convert(context, sum, 1.0f, y);
}

bool grouped_product(const Context& context, const Matrix& x, std::span<const GroupedLayer> layers,
                     const MutableMatrix& y, const MutableMatrix& xa) {
  if (!has_tensor_cores(context, x.format) || !few_rows_group_fits(x, layers)) return false;
  if (!is_open(context.device, Route::group)) return false;
  few_rows_group(context, x, layers, y, xa);
  return true;
}

void quantized_sum(const Context& context, std::span<const Term> terms, const Matrix& addend, const QuantOutput& out,
                   std::int64_t chunk_bytes) {
  check_terms(terms);
  const std::int64_t cols = addend.cols;
  const std::int64_t total = addend.rows * cols;
  if (terms.empty() || total == 0) return quantize(context, addend, {}, 0, total, out);
  const std::int64_t fitting = chunk_bytes / (cols * element_size(Format::f32));
  const BlockRuns runs(addend.rows, cols, out.blocksize, std::max<std::int64_t>(fitting, 1));
  for (std::int64_t i = 0; i < runs.count(); ++i) {
    const BlockRuns::Run run = runs[i];
    const Buffer change(context, run.rows, cols, Format::f32);
    std::vector<Term> shifted(terms.begin(), terms.end());
    for (Term& term : shifted) term.a = rows_of(term.a, run.first_row, run.rows);
    sum_of_products(context, shifted, {}, change.view());
    quantize(context, addend, change.view(), run.first, run.count, out);
  }
}

}  // namespace pissa::cuda
