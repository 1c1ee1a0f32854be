#include "pissa/cuda/eigh.h"

#include <algorithm>

#include "pissa/core/format.h"
#include "pissa/core/philox.h"
#include "pissa/core/tridiagonal.h"
#include "pissa/cuda/elementwise.h"
#include "pissa/cuda/factorize.h"
#include "pissa/cuda/gemm.h"
#include "pissa/cuda/reduce_device.h"

namespace pissa::cuda {
namespace {

// Columns that are reduced between two updates of the rest of the matrix. It is then read once a column, and read and
// written once a panel.
constexpr int kPanel = 32;

// A block has one multiprocessor to itself: its loads under way, 8 of 8 bytes a thread, shall be as many as memory
// with a latency of 800 ns needs for its share of 3 TB/s.
constexpr int kMostThreads = 512;
constexpr int kMostWarps = kMostThreads / kWarp;

// The smallest pivot: below any rounding error of a Gram matrix of f32, and what is divided by it stays finite.
constexpr double kLeast = 0x1p-400;

// What reduces the matrices of a stack, and what is left of it; all but the tridiagonal form is dead with the panel or
// holds the reflections. Matrix number i has part i of each array.
struct Reduction {
  double* matrix;       // [k, k]; row j becomes the vector of reflection j, which is 0 up to column j
  double* diagonal;     // [k]
  double* subdiagonal;  // [k], the last is not used
  double* triangle;     // [panels * kPanel, kPanel]: of each panel the upper T with H_0 H_1 ... = I - V^T T V
  double* panel;        // [3 * kPanel, k]: rows V, W and V again: the rest of the matrix becomes A - V^T W - W^T V
  double* partial;      // [kMostWarps, k]
  std::int64_t k;

  PISSA_INLINE constexpr std::int64_t panels() const { return ceil_div(k, kPanel); }
};

// The parts of the block's own matrix.
__device__ __forceinline__ Reduction of_block(Reduction all) {
  const std::int64_t i = blockIdx.x, k = all.k;
  return {all.matrix + i * k * k,
          all.diagonal + i * k,
          all.subdiagonal + i * k,
          all.triangle + i * all.panels() * kPanel * kPanel,
          all.panel + i * 3 * kPanel * k,
          all.partial + i * kMostWarps * k,
          k};
}

// Products of the panel's rows so far with a vector: V's and then W's.
struct Overlaps {
  double of_lane[2 * kPanel][kWarp + 1];
  double of_row[2 * kPanel];
};

// Columns [first, first + columns) as LAPACK's latrd reduces them: each is brought up to date with the reflections of
// the panel, H = I - v v^T with |v|^2 = 2 makes it 0 below the subdiagonal, and w = p - (p^T v / 2) v with p = A v is
// what A - v w^T - w v^T = H A H needs.
__global__ void __launch_bounds__(kMostThreads) reduce_panel_kernel(Reduction all, std::int64_t first, int columns) {
  const Reduction mine = of_block(all);
  const std::int64_t k = mine.k;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = thread / kWarp, warps = threads / kWarp, lane = thread % kWarp;
  const double* all_v = mine.panel;
  const double* all_w = mine.panel + kPanel * k;
  Overlaps& overlaps = shared_memory<Overlaps>();
  for (int p = 0; p < columns; ++p) {
    const std::int64_t j = first + p;
    double* row = mine.matrix + j * k;
    double* v = mine.panel + p * k;
    double* w = v + kPanel * k;
    double* v_again = w + kPanel * k;

    double squares = 0.0;
    for (std::int64_t i = first + thread; i < k; i += threads) {
      if (i < j) continue;
      double value = row[i];
#pragma unroll 4
      for (int q = 0; q < p; ++q) value -= all_v[q * k + i] * all_w[q * k + j] + all_w[q * k + i] * all_v[q * k + j];
      w[i] = value;  // for now
      if (i > j + 1) squares += value * value;
    }
    squares = block_reduce(squares, Add{});
    const double alpha = j + 1 < k ? w[j + 1] : 0.0;
    const bool reflects = squares > 0.0;  // if not, there is nothing to remove: H = I
    const double norm = sqrt(alpha * alpha + squares);
    const double beta = !reflects ? alpha : alpha > 0.0 ? -norm : norm;
    const double scale = reflects ? 1.0 / sqrt(norm * (norm + fabs(alpha))) : 0.0;
    if (thread == 0) {
      mine.diagonal[j] = w[j];
      mine.subdiagonal[j] = beta;
    }
    for (std::int64_t i = first + thread; i < k; i += threads) {
      const double value = i <= j ? 0.0 : (i == j + 1 ? alpha - beta : w[i]) * scale;
      v[i] = v_again[i] = row[i] = value;
    }
    __syncthreads();

    // A v by columns of A, which are its rows: neighbouring lanes have neighbouring columns, warps share the sum.
    for (std::int64_t i = j + 1 + lane; i < k; i += kWarp) {
      double sum = 0.0;
#pragma unroll 8
      for (std::int64_t l = j + 1 + warp; l < k; l += warps) sum += mine.matrix[l * k + i] * v[l];
      mine.partial[warp * k + i] = sum;
    }
    for (int q = warp; q < 2 * p; q += warps) {
      const double* other = q < p ? all_v + q * k : all_w + (q - p) * k;
      double sum = 0.0;
#pragma unroll 8
      for (std::int64_t i = j + 1 + lane; i < k; i += kWarp) sum += other[i] * v[i];
      overlaps.of_lane[q][lane] = sum;
    }
    __syncthreads();
    for (int q = thread; q < 2 * p; q += threads) {
      double sum = 0.0;
      for (int l = 0; l < kWarp; ++l) sum += overlaps.of_lane[q][l];
      overlaps.of_row[q] = sum;
    }
    __syncthreads();

    if (thread < kPanel) {  // column p of T (LAPACK's larft), a row a thread
      double* t = mine.triangle + (first + thread) * kPanel;
      double sum = thread == p ? 1.0 : 0.0;
      for (int q = thread; q < p; ++q) sum -= t[q] * overlaps.of_row[q];
      t[p] = sum;
    }
    double product = 0.0;
    for (std::int64_t i = first + thread; i < k; i += threads) {
      double value = 0.0;
      if (i > j) {
        for (int l = 0; l < warps; ++l) value += mine.partial[l * k + i];
#pragma unroll 4
        for (int q = 0; q < p; ++q) {
          value -= all_v[q * k + i] * overlaps.of_row[p + q] + all_w[q * k + i] * overlaps.of_row[q];
        }
      }
      w[i] = value;
      product += v[i] * value;
    }
    product = block_reduce(product, Add{});
    for (std::int64_t i = first + thread; i < k; i += threads) w[i] -= 0.5 * product * v[i];
    __syncthreads();
  }
}

// Where a thread's eigenpair is: number i of the r that are wanted of matrix number `matrix`.
struct Pair {
  std::int64_t matrix, i;
};

__device__ __forceinline__ Pair pair_of_thread(std::int64_t r) {
  const std::int64_t blocks = (r + kWarp - 1) / kWarp;
  std::int64_t block = 0;
  const std::int64_t matrix = divide(blockIdx.x, blocks, block);
  return {matrix, block * kWarp + threadIdx.x};
}

__device__ __forceinline__ Tridiagonal tridiagonal(const Reduction& all, std::int64_t matrix) {
  return {all.diagonal + matrix * all.k, all.subdiagonal + matrix * all.k, all.k};
}

// The largest sum of absolute values of a row, at least that of any eigenvalue.
__device__ __forceinline__ double norm_of(const Tridiagonal& t) {
  double largest = 0.0, left = 0.0;
  for (std::int64_t i = 0; i < t.n; ++i) {
    const double right = i + 1 < t.n ? fabs(t.subdiagonal[i]) : 0.0;
    largest = max(largest, left + fabs(t.diagonal[i]) + right);
    left = right;
  }
  return largest;
}

// The eigenvalues by bisection, descending whatever rounding does: of two threads that have gone the same way so far,
// the one with the larger eigenvalue goes up where the other does.
__global__ void eigenvalues_kernel(Reduction all, std::int64_t r, double scale, double* values, MutableMatrix s) {
  constexpr int kSteps = 57;  // an interval of twice the norm becomes 2^-56 of it
  const Pair pair = pair_of_thread(r);
  if (pair.i >= r) return;
  const Tridiagonal t = tridiagonal(all, pair.matrix);
  const std::int64_t smaller = t.n - 1 - pair.i;  // eigenvalues
  double high = norm_of(t);
  double low = -high;
  for (int step = 0; step < kSteps; ++step) {
    const double middle = 0.5 * (low + high);
    if (eigenvalues_below(t, middle, kLeast) <= smaller) low = middle;
    else high = middle;
  }
  values[pair.matrix * r + pair.i] = low;
  static_cast<float*>(s.data)[pair.matrix * s.stride + pair.i] = static_cast<float>(scale * sqrt(max(low, 0.0)));
}

// A step of inverse iteration: rows [count][r, k] = (T - value)^-1 rows, of length 1, a thread each; or, in the first
// step, of random starts. Work [count][4][k, r]: what a warp reads together lies together.
__global__ void inverse_iteration_kernel(Reduction all, std::int64_t r, const double* values, bool is_first,
                                         double* work, double* rows) {
  constexpr double kEpsilon = 0x1p-52;
  const Pair pair = pair_of_thread(r);
  if (pair.i >= r) return;
  const Tridiagonal t = tridiagonal(all, pair.matrix);
  const std::int64_t k = t.n;
  const auto vector = [&](int which) { return StridedVector{work + (pair.matrix * 4 + which) * k * r + pair.i, r}; };
  double* row = rows + (pair.matrix * r + pair.i) * k;
  const StridedVector x = vector(0);
  PhiloxBlock bits{};
  for (std::int64_t j = 0; j < k; ++j) {
    if (is_first && j % 4 == 0)
      bits = philox4x32({static_cast<std::uint32_t>(j / 4), static_cast<std::uint32_t>(pair.i), 0, 0}, 0);
    x[j] = is_first ? static_cast<double>(bits[j % 4]) * 0x1p-32 - 0.5 : row[j];
  }
  solve_tridiagonal(t, values[pair.matrix * r + pair.i], max(kEpsilon * norm_of(t), kLeast), x, vector(1), vector(2),
                    vector(3));
  double squares = 0.0;
  for (std::int64_t j = 0; j < k; ++j) squares += x[j] * x[j];
  const double inverse = 1.0 / sqrt(squares);
  for (std::int64_t j = 0; j < k; ++j) row[j] = x[j] * inverse;
}

void reduce(const Context& context, const Reduction& all, std::int64_t count) {
  const std::int64_t k = all.k;
  for (std::int64_t first = 0; first < k; first += kPanel) {
    const std::int64_t columns = std::min<std::int64_t>(kPanel, k - first), rest = k - first - columns;
    const std::int64_t threads = std::min<std::int64_t>(ceil_div(k - first, kWarp) * kWarp, kMostThreads);
    launch(context, "reduce_panel", reduce_panel_kernel, dim3(static_cast<unsigned>(count)),
           static_cast<unsigned>(threads), all, first, static_cast<int>(columns));
    if (rest == 0) break;
    double* from = all.panel + first + columns;
    const WideMatrix v_w{from, 2 * kPanel, rest, k, 3 * kPanel * k};
    const WideMatrix w_v{from + kPanel * k, 2 * kPanel, rest, k, 3 * kPanel * k};
    const WideMatrix target{all.matrix + (first + columns) * (k + 1), rest, rest, k, k * k};
    matmul(context, -1.0, v_w, Op::t, w_v, Op::n, 1.0, target, count);
  }
}

// rows [count][r, k], each x^T, become those of H_0 H_1 ... x: the last panel's reflections come first.
void turn_back(const Context& context, const Reduction& all, double* rows, std::int64_t r, std::int64_t count) {
  const std::int64_t k = all.k;
  const Array<double> overlap(context, count * r * kPanel), combined(context, count * r * kPanel);
  for (std::int64_t panel = all.panels() - 1; panel >= 0; --panel) {
    const std::int64_t first = panel * kPanel, rest = k - first, columns = std::min<std::int64_t>(kPanel, rest);
    const WideMatrix v{all.matrix + first * (k + 1), columns, rest, k, k * k};
    const WideMatrix t{all.triangle + first * kPanel, columns, columns, kPanel, all.panels() * kPanel * kPanel};
    const WideMatrix x{rows + first, r, rest, k, r * k};
    const WideMatrix x_v{overlap.data(), r, columns, kPanel, r * kPanel};
    const WideMatrix x_v_t{combined.data(), r, columns, kPanel, r * kPanel};
    matmul(context, 1.0, x, Op::n, v, Op::t, 0.0, x_v, count);
    matmul(context, 1.0, x_v, Op::n, t, Op::t, 0.0, x_v_t, count);
    matmul(context, -1.0, x_v_t, Op::n, v, Op::n, 1.0, x, count);
  }
}

// Rows of length 1 in descending order of their eigenvalues: what they share with rows before is of eigenvalues that
// are close, of which any combination will do.
void orthonormalize(const Context& context, double* rows, std::int64_t r, std::int64_t k, int* flags,
                    std::int64_t count) {
  constexpr double kLeastPivot = 1e-6;  // its square is lost to rounding, 1e-16
  const Array<double> overlaps(context, count * r * r);
  gram(context, rows, rows, r, k, true, overlaps.data(), count);
  cholesky(context, overlaps.data(), r, 0.0, kLeastPivot, kNotConverged, flags, count);
  solve_lower(context, overlaps.data(), r, rows, k, count);
}

}  // namespace

// A step of inverse iteration gives a vector all the digits that f32 has. But of eigenvalues that differ by rounding
// only, as the many zeros of a matrix without full rank, several vectors may come near the same one: so they are made
// orthonormal and do another step, after which none has lost more than a digit or two.
void leading_eigh(const Context& context, double* gram, std::int64_t k, float scale, const MutableMatrix& s,
                  const MutableMatrix& vectors, int* flags, std::int64_t count) {
  const std::int64_t r = vectors.rows;
  identity_unless_finite(context, gram, k, kNotConverged, flags, count);
  const Array<double> form(context, count * 2 * k), rows(context, count * r * k), values(context, count * r);
  Reduction all{gram, form.data(), form.data() + count * k, nullptr, nullptr, nullptr, k};
  const Array<double> triangle(context, count * all.panels() * kPanel * kPanel);
  all.triangle = triangle.data();
  {
    const Array<double> panel(context, count * 3 * kPanel * k), partial(context, count * kMostWarps * k);
    all.panel = panel.data();
    all.partial = partial.data();
    reduce(context, all, count);
  }
  const dim3 blocks(static_cast<unsigned>(count * ceil_div(r, kWarp)));
  launch(context, "eigenvalues", eigenvalues_kernel, blocks, kWarp, all, r, static_cast<double>(scale), values.data(),
         s);
  {
    const Array<double> work(context, count * 4 * k * r);
    for (const bool is_first : {true, false}) {
      launch(context, "inverse_iteration", inverse_iteration_kernel, blocks, kWarp, all, r, values.data(), is_first,
             work.data(), rows.data());
      orthonormalize(context, rows.data(), r, k, flags, count);
    }
  }
  turn_back(context, all, rows.data(), r, count);
  narrow(context, rows.data(), vectors, count);
}

}  // namespace pissa::cuda
