#include "pissa/cuda/elementwise.h"

#include <algorithm>

#include "pissa/core/format.h"
#include "pissa/core/philox.h"
#include "pissa/cuda/device.h"

namespace pissa::cuda {
namespace {

constexpr unsigned kThreads = 256;

// Up to eight neighbours of a row, one thread's share.
struct Group {
  std::int64_t row, col;
  int count;
};

std::int64_t groups_of(std::int64_t rows, std::int64_t cols) { return rows * ceil_div(cols, kGroup); }
std::int64_t blocks_of(std::int64_t rows, std::int64_t cols) { return ceil_div(groups_of(rows, cols), kThreads); }

__device__ __forceinline__ std::int64_t thread_index() {
  return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ __forceinline__ bool find_group(std::int64_t rows, std::int64_t cols, Group& group,
                                           std::int64_t index = thread_index()) {
  const std::int64_t groups = (cols + kGroup - 1) / kGroup;
  if (index >= rows * groups) return false;
  group.row = divide(index, groups, group.col);
  group.col *= kGroup;
  group.count = cols - group.col < kGroup ? static_cast<int>(cols - group.col) : kGroup;
  return true;
}

// Of the group's first element in matrix number blockIdx.y of the stack.
__device__ __forceinline__ std::int64_t place(std::int64_t ld, std::int64_t stride, const Group& group) {
  return blockIdx.y * stride + group.row * ld + group.col;
}

__global__ void convert_kernel(Matrix a, float scale, MutableMatrix out) {
  Group group;
  if (!find_group(out.rows, out.cols, group)) return;
  float values[kGroup];
  load_group(a.data, a.format, place(a.ld, a.stride, group), group.count, values);
#pragma unroll
  for (float& value : values) value *= scale;
  store_group(out.data, out.format, place(out.ld, out.stride, group), group.count, values);
}

__device__ __forceinline__ void add_group(const Sum& sum, std::int64_t index) {
  Group group;
  if (!find_group(sum.out.rows, sum.out.cols, group, index)) return;
  float values[kGroup];
  float others[kGroup];
  load_group(sum.a.data, sum.a.format, place(sum.a.ld, sum.a.stride, group), group.count, values);
  load_group(sum.b.data, sum.b.format, place(sum.b.ld, sum.b.stride, group), group.count, others);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) values[i] += others[i];
  store_group(sum.out.data, sum.out.format, place(sum.out.ld, sum.out.stride, group), group.count, values);
}

// The first `blocks` are for the first sum.
__global__ void add_kernel(Sum first, Sum second, std::int64_t blocks) {
  if (blockIdx.x < blocks) add_group(first, thread_index());
  else add_group(second, thread_index() - blocks * kThreads);
}

// The sum of all threads' values, in thread 0.
__device__ __forceinline__ double block_sum(double value) {
  struct SumOfWarps {
    double sums[kThreads / kWarp];
  };
  SumOfWarps& warps = shared_memory<SumOfWarps>();
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  if (threadIdx.x % kWarp == 0) warps.sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (const double sum : warps.sums) total += sum;
  return total;
}

__device__ __forceinline__ float rounded(float value, Format format) {
  if (format == Format::bf16) return __bfloat162float(__float2bfloat16_rn(value));
  if (format == Format::f16) return __half2float(__float2half_rn(value));
  return value;
}

// sums[block] += the squares of its groups.
__global__ void subtract_kernel(Matrix a, Matrix b, MutableMatrix out, double* sums) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  double squares = 0.0;
  Group group;
  for (std::int64_t index = thread_index(); find_group(out.rows, out.cols, group, index); index += step) {
    float values[kGroup];
    float others[kGroup];
    load_group(a.data, a.format, group.row * a.ld + group.col, group.count, values);
    load_group(b.data, b.format, group.row * b.ld + group.col, group.count, others);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      values[i] -= others[i];
      const double stored = rounded(values[i], out.format);
      squares += stored * stored;
    }
    store_group(out.data, out.format, group.row * out.ld + group.col, group.count, values);
  }
  const double total = block_sum(squares);
  if (threadIdx.x == 0) sums[blockIdx.x] += total;
}

// One block of threads.
__global__ void sum_kernel(const double* values, std::int64_t count, double* sum) {
  double value = 0.0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) value += values[i];
  value = block_sum(value);
  if (threadIdx.x == 0) *sum = value;
}

__global__ void fill_signs_kernel(MutableMatrix out, std::uint64_t seed, float scale) {
  Group group;
  if (!find_group(out.rows, out.cols, group)) return;
  float values[kGroup];
  PhiloxBlock bits{};
  for (int i = 0; i < group.count; ++i) {
    const std::uint64_t index = static_cast<std::uint64_t>(group.row * out.cols + group.col + i);
    if (i == 0 || index % 128 == 0) bits = philox_signs(index / 128, seed);
    values[i] = (bits[index % 128 / 32] >> (index % 32)) & 1u ? -scale : scale;
  }
  store_group(out.data, out.format, place(out.ld, out.stride, group), group.count, values);
}

__global__ void scale_rows_kernel(Matrix a, Matrix s, float divisor, MutableMatrix out, Op op) {
  Group group;
  if (!find_group(a.rows, a.cols, group)) return;
  const float singular = static_cast<const float*>(s.data)[blockIdx.y * s.stride + group.row];
  const float scale = sqrtf(singular / divisor);
  float values[kGroup];
  load_group(a.data, a.format, place(a.ld, a.stride, group), group.count, values);
#pragma unroll
  for (float& value : values) value *= scale;
  if (op == Op::n) return store_group(out.data, out.format, place(out.ld, out.stride, group), group.count, values);
  for (int i = 0; i < group.count; ++i) {
    store(out.data, out.format, blockIdx.y * out.stride + (group.col + i) * out.ld + group.row, values[i]);
  }
}

__device__ __forceinline__ unsigned warp_max(unsigned value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

struct LargestOfWarps {
  unsigned bits[kThreads / kWarp];
};

// A block takes one row of one matrix. The exponent is that of f32's bits; where those are of a denormal, as if they
// were of the least normal number.
__global__ void normalize_rows_kernel(Matrix a, MutableMatrix out) {
  LargestOfWarps& warps = shared_memory<LargestOfWarps>();
  const float* from = static_cast<const float*>(a.data) + blockIdx.y * a.stride + blockIdx.x * a.ld;
  unsigned largest = 0;
  for (std::int64_t i = threadIdx.x; i < a.cols; i += kThreads) {
    largest = max(largest, __float_as_uint(from[i]) & 0x7fffffffu);
  }
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) warps.bits[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (const unsigned bits : warps.bits) largest = max(largest, bits);
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
  Group group;
  unsigned largest = 0;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t index = thread_index(); find_group(a.rows, a.cols, group, index); index += step) {
    float values[kGroup];
    load_group(a.data, a.format, group.row * a.ld + group.col, group.count, values);
#pragma unroll
    for (const float value : values) largest = max(largest, __float_as_uint(value) & 0x7fffffffu);
  }
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) atomicMax(bits + a.place, largest);
}

__global__ void widen_kernel(Matrix a, double* wide) {
  Group group;
  if (!find_group(a.rows, a.cols, group)) return;
  const float* from = static_cast<const float*>(a.data) + place(a.ld, a.stride, group);
  double* to = wide + place(a.cols, a.rows * a.cols, group);
  for (int i = 0; i < group.count; ++i) to[i] = from[i];
}

__global__ void narrow_kernel(const double* wide, MutableMatrix out) {
  Group group;
  if (!find_group(out.rows, out.cols, group)) return;
  const double* from = wide + place(out.cols, out.rows * out.cols, group);
  float* to = static_cast<float*>(out.data) + place(out.ld, out.stride, group);
  for (int i = 0; i < group.count; ++i) to[i] = static_cast<float>(from[i]);
}

// One thread for each group of the matrix, in each matrix of the stack.
template <class... Params, class... Args>
void launch_groups(const Context& context, const char* name, void (*kernel)(Params...), std::int64_t rows,
                   std::int64_t cols, std::int64_t count, Args... args) {
  const std::int64_t blocks = blocks_of(rows, cols);
  if (blocks == 0) return;
  launch(context, name, kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(count)), kThreads, args...);
}

}  // namespace

void convert(const Context& context, const Matrix& a, float scale, const MutableMatrix& out, std::int64_t count) {
  launch_groups(context, "convert", convert_kernel, out.rows, out.cols, count, a, scale, out);
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
  launch_groups(context, "fill_signs", fill_signs_kernel, out.rows, out.cols, count, out, seed, scale);
}

void scale_rows(const Context& context, const Matrix& a, const Matrix& s, float divisor, const MutableMatrix& out,
                Op op, std::int64_t count) {
  launch_groups(context, "scale_rows", scale_rows_kernel, a.rows, a.cols, count, a, s, divisor, out, op);
}

void normalize_rows(const Context& context, const Matrix& a, const MutableMatrix& out, std::int64_t count) {
  if (out.rows == 0 || out.cols == 0) return;
  launch(context, "normalize_rows", normalize_rows_kernel,
         dim3(static_cast<unsigned>(out.rows), static_cast<unsigned>(count)), kThreads, a, out);
}

void raise_max_abs(const Context& context, std::span<const Matrix> matrices, float* largest) {
  constexpr std::int64_t kBlocks = 1024;  // of a launch: several for each multiprocessor, but few atomic operations
  MatrixTable table{};
  std::int64_t count = 0, most_groups = 0;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& matrix = matrices[i];
    const std::int64_t groups = groups_of(matrix.rows, matrix.cols);
    if (!is_quantized(matrix.format) && groups > 0) {
      table.entries[count++] = {matrix.data, matrix.rows, matrix.cols, matrix.ld, matrix.format, static_cast<int>(i)};
      most_groups = std::max(most_groups, groups);
    }
    if (count == 0 || (count < kMatricesOfLaunch && i + 1 < matrices.size())) continue;
    const std::int64_t blocks = std::min(ceil_div(most_groups, kThreads), ceil_div(kBlocks, count));
    launch(context, "max_abs", max_abs_kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(count)),
           kThreads, table, reinterpret_cast<unsigned*>(largest));
    count = most_groups = 0;
  }
}

void widen(const Context& context, const Matrix& a, double* wide, std::int64_t count) {
  launch_groups(context, "widen", widen_kernel, a.rows, a.cols, count, a, wide);
}

void narrow(const Context& context, const double* wide, const MutableMatrix& out, std::int64_t count) {
  launch_groups(context, "narrow", narrow_kernel, out.rows, out.cols, count, wide, out);
}

}  // namespace pissa::cuda
