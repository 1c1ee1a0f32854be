#include "pissa/cuda/codes.h"

#include <algorithm>
#include <cstring>

#include "pissa/cuda/formats_device.h"

namespace pissa::cuda {
namespace {

// ---- Decoding ----------------------------------------------------------------------------------------------------

constexpr unsigned kDecodeThreads = 128;
constexpr int kDecodeGroups = 4;  // of a thread: that many loads are under way before the first is used
constexpr std::int64_t kSegment = kDecodeThreads * kDecodeGroups * kGroup;  // of a row, one block's share

// Rows, columns and the start are multiples of 8, so that eight elements share a load of codes, a scale and a row.
template <class Codes>
__global__ void decode_kernel(Matrix weight, int shift, std::int64_t first_row, std::int64_t first_col,
                              MutableMatrix out) {
  const std::int64_t segments = (out.cols + kSegment - 1) / kSegment;
  std::int64_t segment;
  const std::int64_t row = divide(blockIdx.x, segments, segment);
  const std::int64_t first = (first_row + row) * weight.cols + first_col;
  const typename Codes::Decoder decoder;
  const BlockScales<Codes> scales(weight.scales, shift);
  typename Codes::Group codes[kDecodeGroups] = {};
  typename BlockScales<Codes>::Part parts[kDecodeGroups];
  std::int64_t cols[kDecodeGroups];
#pragma unroll
  for (int i = 0; i < kDecodeGroups; ++i) {
    cols[i] = segment * kSegment + (i * static_cast<int>(kDecodeThreads) + static_cast<int>(threadIdx.x)) * kGroup;
    if (cols[i] >= out.cols) continue;
    const std::int64_t at = first + cols[i];
    codes[i] = static_cast<const typename Codes::Group*>(weight.data)[at / kGroup];
    parts[i] = scales.load(first_row + row, at);
  }
  float scale[kDecodeGroups];
#pragma unroll
  for (int i = 0; i < kDecodeGroups; ++i) scale[i] = scales.value(parts[i]);
#pragma unroll
  for (int i = 0; i < kDecodeGroups; ++i) {
    float values[kGroup];
    decoder.levels(codes[i], values);  // by all lanes
    if (cols[i] >= out.cols) continue;
#pragma unroll
    for (float& value : values) value = Codes::element(value, scale[i]);
    store_group(out.data, out.format, row * out.ld + cols[i], kGroup, values);
  }
}

// Any shape, an element at a time.
template <class Codes>
__global__ void decode_any_kernel(Matrix weight, int shift, std::int64_t first_row, std::int64_t first_col,
                                  MutableMatrix out) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kDecodeThreads + threadIdx.x;
  if (index >= out.rows * out.cols) return;
  std::int64_t col;
  const std::int64_t row = divide(index, out.cols, col);
  const std::int64_t at = (first_row + row) * weight.cols + first_col + col;
  const BlockScales<Codes> scales(weight.scales, shift);
  const float scale = scales.value(scales.load(first_row + row, at));
  store(out.data, out.format, row * out.ld + col, Codes::element(Codes::level_at(weight.data, at), scale));
}

// ---- Quantisation ------------------------------------------------------------------------------------------------

constexpr unsigned kQuantizeThreads = 256;
constexpr int kStep = kWarp * kGroup;  // elements that a warp reads at a time

struct QuantizeArgs {
  Matrix values;
  const float* change;  // f32, contiguous, from `change_first` on; or null
  std::int64_t change_first, first, end;
  QuantOutput out;
};

__device__ __forceinline__ void load_values(const QuantizeArgs& args, std::int64_t at, std::int64_t end,
                                            float (&values)[kGroup]) {
  const std::int64_t left = end - at;
  const int count = left <= 0 ? 0 : left < kGroup ? static_cast<int>(left) : kGroup;
  const Matrix& from = args.values;
  if (from.ld == from.cols) {
    load_group(from.data, from.format, at, count, values);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      std::int64_t col = 0;
      const std::int64_t row = i < count ? divide(at + i, from.cols, col) : 0;
      values[i] = i < count ? load(from.data, from.format, row * from.ld + col) : 0.0f;
    }
  }
  if (!args.change) return;
  float change[kGroup];
  load_group(args.change, Format::f32, at - args.change_first, count, change);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) values[i] += change[i];
}

// Lanes that share a block, and elements that a warp takes: blocks of less than kStep side by side, or one block, in
// steps of kStep; the second reading hits a cache.
template <class Codes>
struct Share {
  static constexpr bool kByRow = info(Codes::kFormat).blocks.by_row();
  int lanes;
  std::int64_t elements;

  __host__ __device__ explicit Share(std::int64_t blocksize)
      : lanes(kByRow || blocksize >= kStep ? kWarp : static_cast<int>(blocksize) / kGroup),
        elements(lanes == kWarp ? blocksize : kStep) {}
};

template <class Codes>
__global__ void quantize_kernel(QuantizeArgs args, int shift) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t blocksize = args.out.blocksize;
  const Share<Codes> share(blocksize);
  const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * kQuantizeThreads + threadIdx.x) / kWarp;
  const std::int64_t start = args.first + warp * share.elements;
  const std::int64_t block_start = start + (lane / share.lanes) * blocksize;
  const bool whole = block_start + blocksize <= args.end;
  const std::int64_t end = whole ? block_start + blocksize : args.end;
  if (start >= args.end) return;  // the whole warp

  float largest = 0.0f;
  float values[kGroup];
  for (std::int64_t step = 0; step < share.elements; step += kStep) {
    load_values(args, start + step + lane * kGroup, end, values);
#pragma unroll
    for (const float value : values) largest = fmaxf(largest, fabsf(value));
  }
  for (int distance = share.lanes / 2; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  const typename Codes::Encoder encoder;
  const float divisor = encoder.divisor(largest);
  // bitsandbytes multiplies whole blocks by a factor and divides the short last one; the codes can differ.
  const float factor = encoder.factor(divisor);
  if (lane % share.lanes == 0 && block_start < args.end) {
    const std::int64_t block = Share<Codes>::kByRow ? block_start / blocksize : block_start >> shift;
    args.out.scales[block] = whole ? largest : divisor;
  }

  for (std::int64_t step = 0; step < share.elements; step += kStep) {
    const std::int64_t at = start + step + lane * kGroup;
    if (share.elements > kStep) load_values(args, at, end, values);
    float scaled[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) scaled[i] = whole ? values[i] * factor : values[i] / divisor;
    const typename Codes::Group codes = encoder.codes(scaled);
    constexpr int kBytes = sizeof codes;
    std::uint8_t* to = args.out.codes + at * kBytes / kGroup;
    if (at + kGroup <= end && reinterpret_cast<std::uintptr_t>(to) % kBytes == 0) {
      *reinterpret_cast<typename Codes::Group*>(to) = codes;
    } else {
      std::uint8_t bytes[kBytes];
      memcpy(bytes, &codes, kBytes);
#pragma unroll
      for (int byte = 0; byte < kBytes; ++byte) {
        if (at + byte * kGroup / kBytes < end) to[byte] = bytes[byte];
      }
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

void decode_codes(const Context& context, const Matrix& weight, std::int64_t row, std::int64_t col,
                  const MutableMatrix& out) {
  if (out.rows == 0 || out.cols == 0) return;
  const auto fits = [](std::int64_t n) { return n % kGroup == 0; };
  const int shift = shift_of(weight.scales.blocksize);
  with_codes(weight.format, [&](auto codes) {
    using Codes = decltype(codes);
    const bool aligned = reinterpret_cast<std::uintptr_t>(weight.data) % sizeof(typename Codes::Group) == 0;
    if (aligned && fits(weight.cols) && fits(col) && fits(out.cols)) {
      const std::int64_t blocks = out.rows * ceil_div(out.cols, kSegment);
      launch(context, "decode", decode_kernel<Codes>, dim3(static_cast<unsigned>(blocks)), kDecodeThreads, weight,
             shift, row, col, out);
    } else {
      const std::int64_t blocks = ceil_div(out.rows * out.cols, kDecodeThreads);
      launch(context, "decode", decode_any_kernel<Codes>, dim3(static_cast<unsigned>(blocks)), kDecodeThreads, weight,
             shift, row, col, out);
    }
  });
}

void quantize(const Context& context, const Matrix& values, const Matrix& change, std::int64_t first,
              std::int64_t count, const QuantOutput& out) {
  if (count == 0) return;
  const QuantizeArgs args{
      values, static_cast<const float*>(change.data), change ? first - first % values.cols : 0, first, first + count,
      out};
  with_codes(out.format, [&](auto codes) {
    using Codes = decltype(codes);
    const std::int64_t warps = ceil_div(count, Share<Codes>(out.blocksize).elements);
    launch(context, "quantize", quantize_kernel<Codes>,
           dim3(static_cast<unsigned>(ceil_div(warps, kQuantizeThreads / kWarp))), kQuantizeThreads, args,
           shift_of(out.blocksize));
  });
}

void quantize_absmax(const Context& context, const float* absmax, std::int64_t count, const float* offset,
                     std::uint8_t* codes8, float* nested_absmax) {
  if (count == 0) return;
  launch(context, "quantize_absmax", quantize_absmax_kernel,
         dim3(static_cast<unsigned>(ceil_div(count, kNestedBlocksize))), kNestedBlocksize, absmax, count, offset,
         codes8, nested_absmax);
}

}  // namespace pissa::cuda
