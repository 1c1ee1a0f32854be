#include "pissa/cuda/elementwise.h"

#include <algorithm>

#include "pissa/core/format.h"
#include "pissa/core/philox.h"
#include "pissa/cuda/reduce_device.h"

namespace pissa::cuda {
namespace {

constexpr unsigned kThreads = 256;

// Up to eight neighbours of a row, one thread's share.
struct Octet {
  std::int64_t row, col;
  int count;
};

std::int64_t octets_of(std::int64_t rows, std::int64_t cols) { return rows * ceil_div(cols, kOctet); }
std::int64_t blocks_of(std::int64_t rows, std::int64_t cols) { return ceil_div(octets_of(rows, cols), kThreads); }

__device__ __forceinline__ std::int64_t thread_index() {
  return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ __forceinline__ bool find_octet(std::int64_t rows, std::int64_t cols, Octet& octet,
                                           std::int64_t index = thread_index()) {
  const std::int64_t octets = (cols + kOctet - 1) / kOctet;
  if (index >= rows * octets) return false;
  octet.row = divide(index, octets, octet.col);
  octet.col *= kOctet;
  octet.count = cols - octet.col < kOctet ? static_cast<int>(cols - octet.col) : kOctet;
  return true;
}

// Of the octet's first element in matrix number blockIdx.y of the stack.
__device__ __forceinline__ std::int64_t place(std::int64_t ld, std::int64_t stride, const Octet& octet) {
  return blockIdx.y * stride + octet.row * ld + octet.col;
}

__global__ void convert_kernel(Matrix a, float scale, MutableMatrix out) {
  Octet octet;
  if (!find_octet(out.rows, out.cols, octet)) return;
  float values[kOctet];
  load_octet(a.data, a.format, place(a.ld, a.stride, octet), octet.count, values);
#pragma unroll
  for (float& value : values) value *= scale;
  store_octet(out.data, out.format, place(out.ld, out.stride, octet), octet.count, values);
}

__device__ __forceinline__ void add_octet(const Sum& sum, std::int64_t index) {
  Octet octet;
  if (!find_octet(sum.out.rows, sum.out.cols, octet, index)) return;
  float values[kOctet];
  float others[kOctet];
  load_octet(sum.a.data, sum.a.format, place(sum.a.ld, sum.a.stride, octet), octet.count, values);
  load_octet(sum.b.data, sum.b.format, place(sum.b.ld, sum.b.stride, octet), octet.count, others);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) values[i] += others[i];
  store_octet(sum.out.data, sum.out.format, place(sum.out.ld, sum.out.stride, octet), octet.count, values);
}

// The first `blocks` are for the first sum.
__global__ void add_kernel(Sum first, Sum second, std::int64_t blocks) {
  if (blockIdx.x < blocks) add_octet(first, thread_index());
  else add_octet(second, thread_index() - blocks * kThreads);
}

// sums[block] += the squares of its octets.
__global__ void subtract_kernel(Matrix a, Matrix b, MutableMatrix out, double* sums) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  double squares = 0.0;
  Octet octet;
  for (std::int64_t index = thread_index(); find_octet(out.rows, out.cols, octet, index); index += step) {
    float values[kOctet];
    float others[kOctet];
    load_octet(a.data, a.format, octet.row * a.ld + octet.col, octet.count, values);
    load_octet(b.data, b.format, octet.row * b.ld + octet.col, octet.count, others);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      values[i] -= others[i];
      const double stored = rounded(values[i], out.format);
      squares += stored * stored;
    }
    store_octet(out.data, out.format, octet.row * out.ld + octet.col, octet.count, values);
  }
  const double total = block_reduce(squares, Add{});
  if (threadIdx.x == 0) sums[blockIdx.x] += total;
}

// One block of threads.
__global__ void sum_kernel(const double* values, std::int64_t count, double* sum) {
  double value = 0.0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) value += values[i];
  value = block_reduce(value, Add{});
  if (threadIdx.x == 0) *sum = value;
}

__global__ void fill_signs_kernel(MutableMatrix out, std::uint64_t seed, float scale) {
  Octet octet;
  if (!find_octet(out.rows, out.cols, octet)) return;
  float values[kOctet];
  PhiloxBlock bits{};
  for (int i = 0; i < octet.count; ++i) {
    const std::uint64_t index = static_cast<std::uint64_t>(octet.row * out.cols + octet.col + i);
    if (i == 0 || index % 128 == 0) bits = philox_signs(index / 128, seed);
    values[i] = (bits[index % 128 / 32] >> (index % 32)) & 1u ? -scale : scale;
  }
  store_octet(out.data, out.format, place(out.ld, out.stride, octet), octet.count, values);
}

__global__ void scale_rows_kernel(Matrix a, Matrix s, float divisor, MutableMatrix out, Op op) {
  Octet octet;
  if (!find_octet(a.rows, a.cols, octet)) return;
  const float singular = static_cast<const float*>(s.data)[blockIdx.y * s.stride + octet.row];
  const float scale = sqrtf(singular / divisor);
  float values[kOctet];
  load_octet(a.data, a.format, place(a.ld, a.stride, octet), octet.count, values);
#pragma unroll
  for (float& value : values) value *= scale;
  if (op == Op::n) return store_octet(out.data, out.format, place(out.ld, out.stride, octet), octet.count, values);
  for (int i = 0; i < octet.count; ++i) {
    store(out.data, out.format, blockIdx.y * out.stride + (octet.col + i) * out.ld + octet.row, values[i]);
  }
}

// A block takes one row of one matrix. The exponent is that of f32's bits; where those are of a denormal, as if they
// were of the least normal number.
__global__ void normalize_rows_kernel(Matrix a, MutableMatrix out) {
  const float* from = static_cast<const float*>(a.data) + blockIdx.y * a.stride + blockIdx.x * a.ld;
  unsigned largest = 0;
  for (std::int64_t i = threadIdx.x; i < a.cols; i += kThreads) {
    largest = max(largest, __float_as_uint(from[i]) & 0x7fffffffu);
  }
  largest = block_reduce(largest, Larger{});
  // 2^-e in two steps, for it may be more than f32 holds.
  const int exponent = static_cast<int>(max(largest >> 23, 1u)) - 127;
  const int half = -exponent / 2;
  const float first = __uint_as_float(static_cast<unsigned>(half + 127) << 23);
  const float second = __uint_as_float(static_cast<unsigned>(-exponent - half + 127) << 23);
  const std::int64_t to = blockIdx.y * out.stride + blockIdx.x * out.ld;
  for (std::int64_t i = threadIdx.x; i < a.cols; i += kThreads) {
    store(out.data, out.format, to + i, from[i] * first * second);
  }
}

// Dense matrices of one launch, as the kernel's parameter, of which there are at most 4 KB: a table in device memory
// would have to be copied there, and the host might have to wait for it.
constexpr int kMatricesOfLaunch = 64;

struct MatrixTable {
  struct Entry {
    const void* data;
    std::int64_t rows, cols, ld;
    Format format;
    int place;
  };
  Entry entries[kMatricesOfLaunch];
};
static_assert(sizeof(MatrixTable) + sizeof(unsigned*) <= 4096);

// The bits of numbers that are not negative order as the numbers do.
__global__ void max_abs_kernel(MatrixTable table, unsigned* bits) {
  const MatrixTable::Entry& a = table.entries[blockIdx.y];
  Octet octet;
  unsigned largest = 0;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t index = thread_index(); find_octet(a.rows, a.cols, octet, index); index += step) {
    float values[kOctet];
    load_octet(a.data, a.format, octet.row * a.ld + octet.col, octet.count, values);
#pragma unroll
    for (const float value : values) largest = max(largest, __float_as_uint(value) & 0x7fffffffu);
  }
  largest = warp_reduce(largest, Larger{});
  if (threadIdx.x % kWarp == 0) atomicMax(bits + a.place, largest);
}

__global__ void widen_kernel(Matrix a, double* wide) {
  Octet octet;
  if (!find_octet(a.rows, a.cols, octet)) return;
  const float* from = static_cast<const float*>(a.data) + place(a.ld, a.stride, octet);
  double* to = wide + place(a.cols, a.rows * a.cols, octet);
  for (int i = 0; i < octet.count; ++i) to[i] = from[i];
}

__global__ void narrow_kernel(const double* wide, MutableMatrix out) {
  Octet octet;
  if (!find_octet(out.rows, out.cols, octet)) return;
  const double* from = wide + place(out.cols, out.rows * out.cols, octet);
  float* to = static_cast<float*>(out.data) + place(out.ld, out.stride, octet);
  for (int i = 0; i < octet.count; ++i) to[i] = static_cast<float>(from[i]);
}

// One thread for each octet of the matrix, in each matrix of the stack.
template <class... Params, class... Args>
void launch_octets(const Context& context, const char* name, void (*kernel)(Params...), std::int64_t rows,
                   std::int64_t cols, std::int64_t count, Args... args) {
  const std::int64_t blocks = blocks_of(rows, cols);
  if (blocks == 0) return;
  launch(context, name, kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(count)), kThreads, args...);
}

}  // namespace

void convert(const Context& context, const Matrix& a, float scale, const MutableMatrix& out, std::int64_t count) {
  launch_octets(context, "convert", convert_kernel, out.rows, out.cols, count, a, scale, out);
}

void add(const Context& context, const Sum& first, const Sum& second, std::int64_t count) {
  const std::int64_t blocks = blocks_of(first.out.rows, first.out.cols);
  const std::int64_t all = blocks + blocks_of(second.out.rows, second.out.cols);
  if (all == 0) return;
  launch(context, "add", add_kernel, dim3(static_cast<unsigned>(all), static_cast<unsigned>(count)), kThreads, first,
         second, blocks);
}

namespace {

constexpr std::int64_t kSums = 1024;  // blocks of threads: several for each multiprocessor

}  // namespace

Differences::Differences(const Context& context) : context_(context), sums_(context, kSums) {
  constexpr std::size_t kBytes = kSums * sizeof(double);
  check(cudaMemsetAsync(sums_.data(), 0, kBytes, context.stream), context, "cudaMemsetAsync", "bytes", kBytes);
}

void Differences::subtract(const Matrix& a, const Matrix& b, const MutableMatrix& out) {
  const std::int64_t blocks = std::min(blocks_of(out.rows, out.cols), kSums);
  if (blocks == 0) return;
  launch(context_, "subtract", subtract_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, a, b, out, sums_.data());
}

void Differences::sum(double* squares) const {
  launch(context_, "sum_squares", sum_kernel, dim3(1), kThreads, sums_.data(), kSums, squares);
}

void fill_signs(const Context& context, const MutableMatrix& out, std::uint64_t seed, float scale, std::int64_t count) {
  launch_octets(context, "fill_signs", fill_signs_kernel, out.rows, out.cols, count, out, seed, scale);
}

void scale_rows(const Context& context, const Matrix& a, const Matrix& s, float divisor, const MutableMatrix& out,
                Op op, std::int64_t count) {
  launch_octets(context, "scale_rows", scale_rows_kernel, a.rows, a.cols, count, a, s, divisor, out, op);
}

void normalize_rows(const Context& context, const Matrix& a, const MutableMatrix& out, std::int64_t count) {
  if (out.rows == 0 || out.cols == 0) return;
  launch(context, "normalize_rows", normalize_rows_kernel,
         dim3(static_cast<unsigned>(out.rows), static_cast<unsigned>(count)), kThreads, a, out);
}

void raise_max_abs(const Context& context, std::span<const Matrix> matrices, float* largest) {
  constexpr std::int64_t kBlocks = 1024;  // of a launch: several for each multiprocessor, but few atomic operations
  MatrixTable table{};
  std::int64_t count = 0, most_octets = 0;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& matrix = matrices[i];
    const std::int64_t octets = octets_of(matrix.rows, matrix.cols);
    if (!is_quantized(matrix.format) && octets > 0) {
      table.entries[count++] = {matrix.data, matrix.rows, matrix.cols, matrix.ld, matrix.format, static_cast<int>(i)};
      most_octets = std::max(most_octets, octets);
    }
    if (count == 0 || (count < kMatricesOfLaunch && i + 1 < matrices.size())) continue;
    const std::int64_t blocks = std::min(ceil_div(most_octets, kThreads), ceil_div(kBlocks, count));
    launch(context, "max_abs", max_abs_kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(count)),
           kThreads, table, reinterpret_cast<unsigned*>(largest));
    count = most_octets = 0;
  }
}

void widen(const Context& context, const Matrix& a, double* wide, std::int64_t count) {
  launch_octets(context, "widen", widen_kernel, a.rows, a.cols, count, a, wide);
}

void narrow(const Context& context, const double* wide, const MutableMatrix& out, std::int64_t count) {
  launch_octets(context, "narrow", narrow_kernel, out.rows, out.cols, count, wide, out);
}

}  // namespace pissa::cuda
