// What the kernels for few rows are given, and how those of a format of weights are launched. They are a unit for each
// format (few_rows_of.cu.in), so that formats compile side by side: 96 kernels in one unit took 47 s an architecture.
// Included by .cu files only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "pissa/core/types.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/device.h"
#include "pissa/cuda/few_rows.h"

namespace pissa::cuda {

inline constexpr int kRows = static_cast<int>(kFewRows);  ///< also of a tile of the tensor cores
inline constexpr unsigned kThreads = 256;
inline constexpr int kMostTerms = 2;

/// The terms of a sum, and what is added to it, as a kernel's argument.
struct RowSum {
  Term terms[kMostTerms];
  int count;
  Matrix addend, bias;
  MutableMatrix out;

  __device__ __forceinline__ const Term& term(int i) const { return terms[i]; }
};

inline RowSum sum_of(std::span<const Term> terms, const Matrix& addend, const Matrix& bias, const MutableMatrix& out) {
  RowSum sum{{}, static_cast<int>(terms.size()), addend, bias, out};
  std::copy(terms.begin(), terms.end(), sum.terms);
  return sum;
}

// ---- The layers of a group ---------------------------------------------------------------------------------------
// What the layers share is in a sum of all rows and a weight; what each has of its own, in a table that is a part of
// the kernel's argument: no copy to the device, nothing to wait for.

inline constexpr int kLayersOfLaunch = 128;
inline constexpr std::size_t kArgumentBytes = 32764;  // that CUDA 13 allows

struct LayerFactors {
  const void* data[kMostTerms];  // the second factor of each term
  int first, rows;
};

struct LayerWeight {
  const void* codes;
  const void* absmax;  // absmax8 or absmax16, where the weight has these
  const void* table;   // nested_absmax or levels
  const float* offset;
};

struct Group {
  RowSum sum;
  LayerFactors layers[kLayersOfLaunch];
};

struct QuantizedGroup {
  Group group;
  Matrix x, weight;
  int shift;
  int count;  // of layers
  LayerWeight weights[kLayersOfLaunch];
};
static_assert(sizeof(QuantizedGroup) <= kArgumentBytes);

// ---- Of one format -----------------------------------------------------------------------------------------------

template <Format format>
struct FewRowsOf {
  /// The launch of few_rows_quantized.
  static void multiply(const Context& context, const Matrix& x, const Matrix& weight, const RowSum& sum);
  /// That of few_rows_group, for layers of at most `most_rows` rows.
  static void multiply_group(const Context& context, std::int64_t most_rows, const QuantizedGroup& all);
};

}  // namespace pissa::cuda
