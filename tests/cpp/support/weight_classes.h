// Weights of every kind that a decomposition meets.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/reference.h"

namespace pissa::test {

struct WeightClass {
  std::string name;
  bool fits_f16;  // its elements are within the range of f16
  Dense values;
};

/// U diag(s) V^T with random orthonormal U, V.
inline Dense with_spectrum(Random& random, std::int64_t rows, std::int64_t cols,
                           const std::function<double(std::int64_t)>& s) {
  const std::int64_t rank = std::min(rows, cols);
  Dense u = random_orthonormal(random, rank, rows);
  for (std::int64_t i = 0; i < rank; ++i) {
    for (std::int64_t k = 0; k < rows; ++k) u(i, k) *= s(i);
  }
  return transposed(u) * random_orthonormal(random, rank, cols);
}

/// Of shape [rows, cols], besides those that have a shape of their own.
inline std::vector<WeightClass> weight_classes(std::int64_t rows, std::int64_t cols) {
  Random random(2024);
  const auto power = [](double exponent) { return [=](std::int64_t i) { return std::pow(i + 1.0, -exponent); }; };
  std::vector<WeightClass> classes;
  const auto add = [&](const std::string& name, const Dense& values, bool fits_f16 = true) {
    classes.push_back({name, fits_f16, values});
  };
  add("flat", random.dense(rows, cols));
  add("power law", 10.0 * with_spectrum(random, rows, cols, power(0.7)));
  add("steep",
      with_spectrum(random, rows, cols, [](std::int64_t i) { return std::pow(10.0, -static_cast<double>(i)); }));
  add("rank 1", random.dense(rows, 1) * random.dense(1, cols));
  add("rank 5", random.dense(rows, 5) * random.dense(5, cols));
  add("zero", Dense(rows, cols));
  add("equal singular values", with_spectrum(random, rows, cols, [](std::int64_t) { return 2.0; }));
  add("pairs of singular values",
      with_spectrum(random, rows, cols, [](std::int64_t i) { return 8.0 / static_cast<double>(i / 2 + 1); }));
  Dense outlier = 1e-3 * random.dense(rows, cols), single(rows, cols), sparse = random.dense(rows, cols);
  outlier(rows / 3, cols / 2) = -1e4;
  single(rows - 1, cols - 1) = 3;
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    if (i / cols % 3 != 0) sparse.values[i] = 0;
  }
  add("ones", Dense(rows, cols, 1));
  add("one outlier", outlier);
  add("one element", single);
  add("zero rows", sparse);
  add("duplicate rows", transposed(random.dense(cols, 4) * [&] {
        Dense choose(4, rows);
        for (std::int64_t i = 0; i < rows; ++i) choose(i % 4, i) = 1;
        return choose;
      }()));
  const Dense law = with_spectrum(random, rows, cols, power(1.0));
  add("huge", 1e37 * law, false);
  add("tiny", 1e-37 * law, false);
  add("denormal", 1e-39 * law, false);
  Dense identity(std::min(rows, cols), std::min(rows, cols));
  for (std::int64_t i = 0; i < identity.rows; ++i) identity(i, i) = 1;
  add("identity", identity);
  add("row", random.dense(1, cols));
  add("column", random.dense(rows, 1));
  add("1 x 1", Dense(1, 1, -2.5));
  add("two rows", random.dense(2, cols));
  return classes;
}

}  // namespace pissa::test
