#include "pissa/cuda/nf4.h"

#include <algorithm>
#include <bit>

#include "pissa/cuda/nf4_device.h"

namespace pissa::cuda {
namespace {

// Of blocks: sizes are powers of two.
int shift_of(std::int64_t blocksize) { return std::countr_zero(static_cast<std::uint64_t>(blocksize)); }

// ---- Decoding
// --------------------------------------------------------------------------------------------------------

constexpr unsigned kDecodeThreads = 128;
constexpr int kDecodeGroups = 4;  // of a thread: that many loads are under way before the first is used
constexpr std::int64_t kSegment = kDecodeThreads * kDecodeGroups * kGroup;  // of a row, one block's share

// Rows, columns and the start are multiples of 8, so that eight elements share a word of codes, a scale and a row.
__global__ void decode_kernel(Matrix weight, int shift, std::int64_t first_row, std::int64_t first_col,
                              MutableMatrix out) {
  const std::int64_t segments = (out.cols + kSegment - 1) / kSegment;
  std::int64_t segment;
  const std::int64_t row = divide(blockIdx.x, segments, segment);
  const std::int64_t first = (first_row + row) * weight.cols + first_col;
  const float lane_level = nf4_lane_level();
  unsigned words[kDecodeGroups] = {};
  float scales[kDecodeGroups] = {};
  std::int64_t cols[kDecodeGroups];
#pragma unroll
  for (int i = 0; i < kDecodeGroups; ++i) {
    cols[i] = segment * kSegment + (i * static_cast<int>(kDecodeThreads) + static_cast<int>(threadIdx.x)) * kGroup;
    if (cols[i] >= out.cols) continue;
    const std::int64_t at = first + cols[i];
    words[i] = static_cast<const unsigned*>(weight.data)[at / kGroup];
    scales[i] = nf4_scale(weight.scales, at >> shift);
  }
#pragma unroll
  for (int i = 0; i < kDecodeGroups; ++i) {
    float values[kGroup];
    nf4_levels(lane_level, words[i], values);  // by all lanes
    if (cols[i] >= out.cols) continue;
#pragma unroll
    for (float& value : values) value *= scales[i];
    store_group(out.data, out.codec, row * out.ld + cols[i], kGroup, values);
  }
}

// Any shape, an element at a time.
__global__ void decode_any_kernel(Matrix weight, int shift, std::int64_t first_row, std::int64_t first_col,
                                  MutableMatrix out) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kDecodeThreads + threadIdx.x;
  if (index >= out.rows * out.cols) return;
  std::int64_t col;
  const std::int64_t row = divide(index, out.cols, col);
  const std::int64_t at = (first_row + row) * weight.cols + first_col + col;
  const unsigned codes = static_cast<const std::uint8_t*>(weight.data)[at / 2];
  const float level = kDeviceNf4Levels.value[(at % 2 == 0 ? codes >> 4 : codes) & 15u];
  store(out.data, out.codec, row * out.ld + col, level * nf4_scale(weight.scales, at >> shift));
}

// ---- Quantisation
// ----------------------------------------------------------------------------------------------------

constexpr unsigned kQuantizeThreads = 256;
constexpr int kStep = kWarp * kGroup;  // elements that a warp reads at a time

struct QuantizeArgs {
  Matrix values;
  const float* change;  // f32, contiguous, from `change_first` on; or null
  std::int64_t change_first, first, end;
  Nf4Output out;
};

__device__ __forceinline__ void load_values(const QuantizeArgs& args, std::int64_t at, float (&values)[kGroup]) {
  const std::int64_t left = args.end - at;
  const int count = left <= 0 ? 0 : left < kGroup ? static_cast<int>(left) : kGroup;
  const Matrix& from = args.values;
  if (from.ld == from.cols) {
    load_group(from.data, from.codec, at, count, values);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      std::int64_t col = 0;
      const std::int64_t row = i < count ? divide(at + i, from.cols, col) : 0;
      values[i] = i < count ? load(from.data, from.codec, row * from.ld + col) : 0.0f;
    }
  }
  if (!args.change) return;
  float change[kGroup];
  load_group(args.change, Codec::f32, at - args.change_first, count, change);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) values[i] += change[i];
}

__device__ __forceinline__ unsigned nf4_code_of(float lane_threshold, int lane_base, float scaled) {
  const int cell = static_cast<int>(fmaf(scaled, Nf4Search::kFactor, Nf4Search::kShift));
  const float threshold = __shfl_sync(kAllLanes, lane_threshold, cell);
  const int base = __shfl_sync(kAllLanes, lane_base, cell);
  return static_cast<unsigned>(base + (scaled > threshold));
}

// A warp takes blocks of 32 to 256 elements side by side, a larger one in steps of 256; the second reading hits a
// cache.
__global__ void quantize_kernel(QuantizeArgs args, int shift) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t blocksize = std::int64_t{1} << shift;
  const std::int64_t unit = blocksize > kStep ? blocksize : kStep;
  const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * kQuantizeThreads + threadIdx.x) / kWarp;
  const std::int64_t start = args.first + warp * unit;
  const int lanes = blocksize < kStep ? static_cast<int>(blocksize) / kGroup : kWarp;  // of a block
  const std::int64_t block_start = start + (lane / lanes) * blocksize;
  const bool whole = block_start + blocksize <= args.end;
  if (start >= args.end) return;  // the whole warp

  float largest = 0.0f;
  float values[kGroup];
  for (std::int64_t step = 0; step < unit; step += kStep) {
    load_values(args, start + step + lane * kGroup, values);
#pragma unroll
    for (const float value : values) largest = fmaxf(largest, fabsf(value));
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  const float divisor = fmaxf(largest, kSmallestAbsmax);
  // bitsandbytes multiplies whole blocks by 1 / absmax and divides the short last one; the codes can differ.
  const float factor = 1.0f / divisor;
  if (lane % lanes == 0 && block_start < args.end) args.out.absmax[block_start >> shift] = whole ? largest : divisor;

  const float lane_threshold = kDeviceNf4Search.threshold[lane];
  const int lane_base = kDeviceNf4Search.base[lane];
  for (std::int64_t step = 0; step < unit; step += kStep) {
    const std::int64_t at = start + step + lane * kGroup;
    if (unit > kStep) load_values(args, at, values);
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float scaled = whole ? values[i] * factor : values[i] / divisor;
      word |= nf4_code_of(lane_threshold, lane_base, scaled)
              << (4 * (i ^ 1));  // the first of a pair in the high nibble
    }
    std::uint8_t* to = args.out.codes + at / 2;
    if (at + kGroup <= args.end && (reinterpret_cast<std::uintptr_t>(to) & 3u) == 0) {
      *reinterpret_cast<unsigned*>(to) = word;
    } else {
      for (int byte = 0; byte < 4 && at + 2 * byte < args.end; ++byte) to[byte] = word >> (8 * byte) & 0xffu;
    }
  }
}

// A block takes one of the nested blocks, a thread one scale.
__global__ void quantize_absmax_kernel(const float* absmax, std::int64_t count, const float* offset,
                                       std::uint8_t* codes8, float* nested_absmax) {
  struct Shared {
    float largest[kNestedBlocksize / kWarp];
  };
  Shared& shared = shared_memory<Shared>();
  const std::int64_t at = blockIdx.x * kNestedBlocksize + threadIdx.x;
  const float value = at < count ? absmax[at] - *offset : 0.0f;
  float largest = fabsf(value);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  if (threadIdx.x % kWarp == 0) shared.largest[threadIdx.x / kWarp] = largest;
  __syncthreads();
#pragma unroll
  for (const float other : shared.largest) largest = fmaxf(largest, other);
  if (threadIdx.x == 0) nested_absmax[blockIdx.x] = largest;
  if (at >= count) return;
  if (!(largest > 0)) {
    codes8[at] = 0;
    return;
  }
  const float grid = static_cast<float>(dynamic_point(value / largest)) / 32767.5f - 1.0f;
  int low = 0;
  int high = 255;
  while (low < high) {  // as dynamic_code, over the table in the device's memory
    const int middle = (low + high) / 2;
    if (grid > (kDeviceDynamicMap.value[middle] + kDeviceDynamicMap.value[middle + 1]) / 2) low = middle + 1;
    else high = middle;
  }
  codes8[at] = static_cast<std::uint8_t>(low);
}

}  // namespace

void nf4_decode(const Context& context, const Matrix& weight, std::int64_t row, std::int64_t col,
                const MutableMatrix& out) {
  const auto fits = [](std::int64_t n) { return n % kGroup == 0; };
  const bool aligned = reinterpret_cast<std::uintptr_t>(weight.data) % sizeof(unsigned) == 0;
  const int shift = shift_of(weight.scales.blocksize);
  if (out.rows == 0 || out.cols == 0) return;
  if (aligned && fits(weight.cols) && fits(col) && fits(out.cols)) {
    const std::int64_t blocks = out.rows * ceil_div(out.cols, kSegment);
    launch(context, "nf4_decode", decode_kernel, dim3(static_cast<unsigned>(blocks)), kDecodeThreads, weight, shift,
           row, col, out);
  } else {
    const std::int64_t blocks = ceil_div(out.rows * out.cols, kDecodeThreads);
    launch(context, "nf4_decode", decode_any_kernel, dim3(static_cast<unsigned>(blocks)), kDecodeThreads, weight, shift,
           row, col, out);
  }
}

void nf4_quantize(const Context& context, const Matrix& values, const Matrix& change, std::int64_t first,
                  std::int64_t count, const Nf4Output& out) {
  if (count == 0) return;
  const std::int64_t unit = std::max<std::int64_t>(out.blocksize, kStep);
  const std::int64_t blocks = ceil_div(ceil_div(count, unit), kQuantizeThreads / kWarp);
  const QuantizeArgs args{
      values, static_cast<const float*>(change.data), change ? first - first % values.cols : 0, first, first + count,
      out};
  launch(context, "nf4_quantize", quantize_kernel, dim3(static_cast<unsigned>(blocks)), kQuantizeThreads, args,
         shift_of(out.blocksize));
}

void nf4_quantize_absmax(const Context& context, const float* absmax, std::int64_t count, const float* offset,
                         std::uint8_t* codes8, float* nested_absmax) {
  if (count == 0) return;
  launch(context, "nf4_quantize_absmax", quantize_absmax_kernel,
         dim3(static_cast<unsigned>(ceil_div(count, kNestedBlocksize))), kNestedBlocksize, absmax, count, offset,
         codes8, nested_absmax);
}

}  // namespace pissa::cuda
