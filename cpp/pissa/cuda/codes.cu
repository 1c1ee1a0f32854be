#include "pissa/cuda/codes.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "pissa/core/gguf.h"
#include "pissa/cuda/formats_device.h"
#include "pissa/cuda/reduce_device.h"

namespace pissa::cuda {
namespace {

// ---- Decoding ----------------------------------------------------------------------------------------------------

constexpr unsigned kDecodeThreads = 128;
constexpr int kDecodeOctets = 4;  // of a thread: that many loads are under way before the first is used
constexpr std::int64_t kSegment = kDecodeThreads * kDecodeOctets * kOctet;  // of a row, one block's share

// Rows, columns, blocks and the start are multiples of 8, so that eight elements share a load of codes, a scale and a
// row.
template <class Codes>
__global__ void decode_kernel(Matrix weight, int shift, std::int64_t first_row, std::int64_t first_col,
                              MutableMatrix out) {
  const std::int64_t segments = (out.cols + kSegment - 1) / kSegment;
  std::int64_t segment;
  const std::int64_t row = divide(blockIdx.x, segments, segment);
  const std::int64_t first = (first_row + row) * weight.cols + first_col;
  const typename Codes::Decoder decoder;
  const BlockScales<Codes> scales(weight.scales, shift);
  typename Codes::Octet codes[kDecodeOctets] = {};
  typename BlockScales<Codes>::Part parts[kDecodeOctets];
  std::int64_t cols[kDecodeOctets];
#pragma unroll
  for (int i = 0; i < kDecodeOctets; ++i) {
    cols[i] = segment * kSegment + (i * static_cast<int>(kDecodeThreads) + static_cast<int>(threadIdx.x)) * kOctet;
    if (cols[i] >= out.cols) continue;
    const std::int64_t at = first + cols[i];
    codes[i] = static_cast<const typename Codes::Octet*>(weight.data)[at / kOctet];
    parts[i] = scales.load(first_row + row, first_col + cols[i], at);
  }
  float scale[kDecodeOctets];
#pragma unroll
  for (int i = 0; i < kDecodeOctets; ++i) scale[i] = scales.value(parts[i]);
#pragma unroll
  for (int i = 0; i < kDecodeOctets; ++i) {
    float values[kOctet];
    decoder.levels(codes[i], values);  // by all lanes
    if (cols[i] >= out.cols) continue;
#pragma unroll
    for (float& value : values) value = Codes::element(value, scale[i]);
    store_octet(out.data, out.format, row * out.ld + cols[i], kOctet, values);
  }
}

// Any shape and, if `rows` is given, any rows, an element at a time; Codes may be a GgufFormat, whose elements of
// neighbouring threads are in one block, in L1.
template <class Codes>
__global__ void decode_any_kernel(Matrix weight, int shift, const std::int64_t* rows, std::int64_t first_row,
                                  std::int64_t first_col, MutableMatrix out) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kDecodeThreads + threadIdx.x;
  if (index >= out.rows * out.cols) return;
  std::int64_t col;
  const std::int64_t row = divide(index, out.cols, col);
  const std::int64_t given = rows ? rows[row] : first_row + row;
  const std::int64_t from = given >= 0 && given < weight.rows ? given : 0;
  float element;
  if constexpr (is_read_only(Codes::kFormat)) {
    const std::int64_t start = code_bytes(Codes::kFormat, from * weight.cols);
    element = gguf_element<Codes::kFormat>(static_cast<const std::uint8_t*>(weight.data) + start, first_col + col);
  } else {
    const std::int64_t at = from * weight.cols + first_col + col;
    const BlockScales<Codes> scales(weight.scales, shift);
    element = Codes::element(Codes::level_at(weight.data, at), scales.value(scales.load(from, first_col + col, at)));
  }
  store(out.data, out.format, row * out.ld + col, element);
}

// ---- Quantisation ------------------------------------------------------------------------------------------------

constexpr unsigned kQuantizeThreads = 256;
constexpr int kStep = kWarp * kOctet;  // elements that a warp reads at a time, of each of its units
constexpr int kUnits = 2;

struct QuantizeArgs {
  Matrix values;
  const float* change;  // f32, contiguous, from `change_first` on; or null
  std::int64_t change_first, first, end;
  QuantOutput out;
};

// An octet of each unit, from `at` on; zeros beyond `end`.
__device__ __forceinline__ void load_values(const QuantizeArgs& args, const std::int64_t (&at)[kUnits],
                                            const std::int64_t (&end)[kUnits], float (&values)[kUnits][kOctet]) {
  int counts[kUnits];
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const std::int64_t left = end[unit] - at[unit];
    counts[unit] = left <= 0 ? 0 : left < kOctet ? static_cast<int>(left) : kOctet;
  }
  const Matrix& from = args.values;
  if (from.ld == from.cols) {
    load_octets(from.data, from.format, at, counts, values);
  } else {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        std::int64_t col = 0;
        const std::int64_t row = i < counts[unit] ? divide(at[unit] + i, from.cols, col) : 0;
        values[unit][i] = i < counts[unit] ? load(from.data, from.format, row * from.ld + col) : 0.0f;
      }
    }
  }
  if (!args.change) return;
  std::int64_t change_at[kUnits];
  float change[kUnits][kOctet];
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) change_at[unit] = at[unit] - args.change_first;
  load_octets(args.change, Format::f32, change_at, counts, change);
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) values[unit][i] += change[unit][i];
  }
}

// Lanes that share a block, and elements of a unit, which a warp takes together: blocks of less than kStep side by
// side, or one block, in steps of kStep; the second reading hits a cache.
template <class Codes>
struct Share {
  static constexpr bool kByRow = info(Codes::kFormat).blocks.by_row();
  int lanes;
  std::int64_t elements;

  __host__ __device__ explicit Share(std::int64_t blocksize)
      : lanes(kByRow || blocksize >= kStep ? kWarp : static_cast<int>(blocksize) / kOctet),
        elements(lanes == kWarp ? blocksize : kStep) {}
};

// The block that a lane has of a unit.
struct LaneBlock {
  std::int64_t start, end;
  bool whole;

  __device__ __forceinline__ LaneBlock(std::int64_t first, std::int64_t blocksize, std::int64_t limit)
      : start(first), end(min(first + blocksize, limit)), whole(first + blocksize <= limit) {}
};

// Those of an octet's codes that are before `end`.
template <class Octet>
__device__ __forceinline__ void store_codes(std::uint8_t* codes, std::int64_t at, std::int64_t end,
                                            const Octet& octet) {
  constexpr int kBytes = sizeof octet;
  std::uint8_t* to = codes + at * kBytes / kOctet;
  if (at + kOctet <= end && reinterpret_cast<std::uintptr_t>(to) % alignof(Octet) == 0) {
    *reinterpret_cast<Octet*>(to) = octet;
    return;
  }
  std::uint8_t bytes[kBytes];
  memcpy(bytes, &octet, kBytes);
#pragma unroll
  for (int byte = 0; byte < kBytes; ++byte) {
    if (at + byte * kOctet / kBytes < end) to[byte] = bytes[byte];
  }
}

template <class Codes>
__global__ void __launch_bounds__(kQuantizeThreads, 4) quantize_kernel(QuantizeArgs args, int shift) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t blocksize = args.out.blocksize;
  const Share<Codes> share(blocksize);
  const std::int64_t warp = (static_cast<std::int64_t>(blockIdx.x) * kQuantizeThreads + threadIdx.x) / kWarp;
  const std::int64_t first = args.first + warp * kUnits * share.elements;
  if (first >= args.end) return;  // the whole warp; of a unit behind the end nothing is read or written
  const std::int64_t in_unit = lane / share.lanes * blocksize;
  const LaneBlock blocks[kUnits] = {{first + in_unit, blocksize, args.end},
                                    {first + share.elements + in_unit, blocksize, args.end}};
  const std::int64_t ends[kUnits] = {blocks[0].end, blocks[1].end};

  // As the bits of what is not negative: above all numbers is Inf, and NaN above that. fmaxf would lose NaN.
  unsigned largest[kUnits] = {};
  float values[kUnits][kOctet];
  const std::int64_t starts[kUnits] = {first + lane * kOctet, first + share.elements + lane * kOctet};
  for (std::int64_t step = 0; step < share.elements; step += kStep) {
    load_values(args, {starts[0] + step, starts[1] + step}, ends, values);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
      for (const float value : values[unit]) largest[unit] = max(largest[unit], __float_as_uint(fabsf(value)));
    }
  }
  for (int distance = share.lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (unsigned& bits : largest) bits = max(bits, __shfl_xor_sync(kAllLanes, bits, distance));
  }
  const typename Codes::Encoder encoder;
  const auto scaling_of = [&](int unit) {
    return typename Codes::Scaling(__uint_as_float(largest[unit]), blocks[unit].whole, args.out.global);
  };
  const typename Codes::Scaling scalings[kUnits] = {scaling_of(0), scaling_of(1)};
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    if (lane % share.lanes == 0 && blocks[unit].start < args.end) {
      const std::int64_t block = Share<Codes>::kByRow ? blocks[unit].start / blocksize : blocks[unit].start >> shift;
      args.out.scales[block] = scalings[unit].stored();
    }
  }

  for (std::int64_t step = 0; step < share.elements; step += kStep) {
    if (share.elements > kStep) load_values(args, {starts[0] + step, starts[1] + step}, ends, values);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      float scaled[kOctet];
      unsigned codes[kOctet];
      scalings[unit].apply(values[unit], scaled);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) codes[i] = encoder.code(scaled[i]);  // by all lanes
      store_codes(args.out.codes, starts[unit] + step, ends[unit], Codes::packed(codes));
    }
  }
}

// ---- Error feedback ----------------------------------------------------------------------------------------------

constexpr unsigned kFeedbackThreads = 256;
constexpr int kLaneColumns = kFeedbackColumns / kWarp;

struct FeedbackFactor {
  float value[kFeedbackColumns][kFeedbackColumns];
};

// A warp takes a row, a lane every 32nd of its columns, from the last to the first; all lanes round, and that of the
// column whose turn it is tells the others its error.
template <class Codes>
__global__ void __launch_bounds__(kFeedbackThreads)
    quantize_columns_kernel(Matrix w, Matrix lower, Scales stored, int shift, std::int64_t first, MutableMatrix errors,
                            std::uint8_t* codes) {
  FeedbackFactor& factor = shared_memory<FeedbackFactor>();
  const int count = static_cast<int>(errors.cols);
  for (int i = threadIdx.x; i < count * count; i += kFeedbackThreads) {
    factor.value[i / count][i % count] =
        static_cast<const float*>(lower.data)[(first + i / count) * lower.ld + first + i % count];
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kFeedbackThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= w.rows) return;  // the whole warp
  const std::int64_t start = row * w.cols + first;
  float* row_errors = static_cast<float*>(errors.data) + row * errors.ld;
  const BlockScales<Codes> scales(stored, shift);
  float weights[kLaneColumns] = {}, sums[kLaneColumns] = {}, scale[kLaneColumns] = {}, reciprocal[kLaneColumns] = {};
  unsigned lane_codes[kLaneColumns] = {};
#pragma unroll
  for (int part = 0; part < kLaneColumns; ++part) {
    const int col = part * kWarp + lane;
    if (col >= count) continue;
    weights[part] = load(w.data, w.format, row * w.ld + first + col);
    sums[part] = row_errors[col];
    scale[part] = scales.value(scales.load(row, first + col, start + col));
    reciprocal[part] = 1.0f / factor.value[col][col];
  }
#pragma unroll
  for (int part = kLaneColumns - 1; part >= 0; --part) {
    for (int col = min(count, (part + 1) * kWarp) - 1; col >= part * kWarp; --col) {
      unsigned code;
      const float element = Codes::nearest(weights[part] + sums[part] * reciprocal[part], scale[part], code);
      const float error = __shfl_sync(kAllLanes, weights[part] - element, col % kWarp);
      if (lane == col % kWarp) {
        lane_codes[part] = code;
        sums[part] = error;
      }
#pragma unroll
      for (int before = 0; before <= part; ++before) {
        const int other = before * kWarp + lane;
        if (other < col) sums[before] += error * factor.value[col][other];
      }
    }
  }
#pragma unroll
  for (int part = 0; part < kLaneColumns; ++part) {
    const int col = part * kWarp + lane;
    unsigned octet[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) octet[i] = __shfl_sync(kAllLanes, lane_codes[part], (lane & ~(kOctet - 1)) + i);
    if (col % kOctet == 0) store_codes(codes, start + col, start + count, Codes::packed(octet));
    if (col < count) row_errors[col] = sums[part];
  }
}

// ---- Nested scales -----------------------------------------------------------------------------------------------

constexpr unsigned kNestedThreads = kNestedBlocksize;
constexpr std::int64_t kMostSums = kNestedThreads;  // a thread takes one of them

// sums[i] = the sum of values [i * share, (i + 1) * share)
__global__ void sums_kernel(const float* values, std::int64_t count, std::int64_t share, double* sums) {
  const std::int64_t first = blockIdx.x * share;
  double sum = 0.0;
  for (std::int64_t i = first + threadIdx.x; i < min(first + share, count); i += kNestedThreads) sum += values[i];
  sum = block_reduce(sum, Add{});
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

struct NestedArgs {
  const float* absmax;
  std::int64_t count;
  const float* given;  // the offset; or null: the mean, from `sums`
  const double* sums;
  unsigned sum_count;
  std::uint8_t* codes8;
  float* nested_absmax;
  float* offset;
};

// A block takes one of the nested blocks, a thread one scale.
__global__ void quantize_absmax_kernel(NestedArgs args) {
  const std::int64_t at = blockIdx.x * kNestedBlocksize + threadIdx.x;
  const bool inside = at < args.count;
  const float absmax = inside ? args.absmax[at] : 0.0f;
  float offset;
  if (args.given) {
    offset = *args.given;
  } else {
    const double sum = block_reduce(threadIdx.x < args.sum_count ? args.sums[threadIdx.x] : 0.0, Add{});
    offset = static_cast<float>(sum / static_cast<double>(args.count));
  }
  const float value = inside ? absmax - offset : 0.0f;
  // As bits, for quantize_kernel's reason.
  const float largest = __uint_as_float(block_reduce(__float_as_uint(fabsf(value)), Larger{}));
  if (threadIdx.x == 0) args.nested_absmax[blockIdx.x] = largest;
  if (threadIdx.x == 0 && blockIdx.x == 0) *args.offset = offset;
  if (!inside) return;
  if (!(largest > 0)) {
    args.codes8[at] = 0;
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
  args.codes8[at] = static_cast<std::uint8_t>(low);
}

void decode_any(const Context& context, const Matrix& weight, const std::int64_t* rows, std::int64_t row,
                std::int64_t col, const MutableMatrix& out) {
  const std::int64_t blocks = ceil_div(out.rows * out.cols, kDecodeThreads);
  const auto start = [&](auto codes) {
    launch(context, "decode", decode_any_kernel<decltype(codes)>, dim3(static_cast<unsigned>(blocks)), kDecodeThreads,
           weight, shift_of(weight.scales.blocksize), rows, row, col, out);
  };
  if (is_read_only(weight.format)) with_gguf(weight.format, start);
  else with_codes(weight.format, start);
}

}  // namespace

void decode_codes(const Context& context, const Matrix& weight, std::int64_t row, std::int64_t col,
                  const MutableMatrix& out) {
  if (out.rows == 0 || out.cols == 0) return;
  if (is_read_only(weight.format)) return decode_any(context, weight, nullptr, row, col, out);
  const auto fits = [](std::int64_t n) { return n % kOctet == 0; };
  const int shift = shift_of(weight.scales.blocksize);
  with_codes(weight.format, [&](auto codes) {
    using Codes = decltype(codes);
    const bool aligned = reinterpret_cast<std::uintptr_t>(weight.data) % alignof(typename Codes::Octet) == 0;
    if (aligned && fits(weight.cols) && fits(weight.scales.blocksize) && fits(col) && fits(out.cols)) {
      const std::int64_t blocks = out.rows * ceil_div(out.cols, kSegment);
      launch(context, "decode", decode_kernel<Codes>, dim3(static_cast<unsigned>(blocks)), kDecodeThreads, weight,
             shift, row, col, out);
    } else {
      decode_any(context, weight, nullptr, row, col, out);
    }
  });
}

void decode_rows(const Context& context, const Matrix& weight, const std::int64_t* rows, const MutableMatrix& out) {
  decode_any(context, weight, rows, 0, 0, out);
}

void quantize(const Context& context, const Matrix& values, const Matrix& change, std::int64_t first,
              std::int64_t count, const QuantOutput& out) {
  if (count == 0) return;
  const QuantizeArgs args{
      values, static_cast<const float*>(change.data), change ? first - first % values.cols : 0, first, first + count,
      out};
  with_codes(out.format, [&](auto codes) {
    using Codes = decltype(codes);
    const std::int64_t warps = ceil_div(count, kUnits * Share<Codes>(out.blocksize).elements);
    launch(context, "quantize", quantize_kernel<Codes>,
           dim3(static_cast<unsigned>(ceil_div(warps, kQuantizeThreads / kWarp))), kQuantizeThreads, args,
           shift_of(out.blocksize));
  });
}

void quantize_columns(const Context& context, const Matrix& w, const Matrix& lower, Format format, const Scales& scales,
                      std::int64_t first, const MutableMatrix& errors, std::uint8_t* codes) {
  if (w.rows == 0) return;
  with_codes(format, [&](auto kind) {
    launch(context, "quantize_columns", quantize_columns_kernel<decltype(kind)>,
           dim3(static_cast<unsigned>(ceil_div(w.rows, kFeedbackThreads / kWarp))), kFeedbackThreads, w, lower, scales,
           shift_of(scales.blocksize), first, errors, codes);
  });
}

void quantize_absmax(const Context& context, const float* absmax, std::int64_t count, const float* given,
                     std::uint8_t* codes8, float* nested_absmax, float* offset) {
  if (count == 0) return;
  const std::int64_t share = ceil_div(ceil_div(count, kMostSums), kNestedThreads) * kNestedThreads;
  const dim3 sum_count(static_cast<unsigned>(ceil_div(count, share)));
  std::optional<Array<double>> sums;
  if (!given) {
    sums.emplace(context, kMostSums);
    launch(context, "sum_absmax", sums_kernel, sum_count, kNestedThreads, absmax, count, share, sums->data());
  }
  const NestedArgs args{absmax,      count,  given,         sums ? sums->data() : nullptr,
                        sum_count.x, codes8, nested_absmax, offset};
  launch(context, "quantize_absmax", quantize_absmax_kernel,
         dim3(static_cast<unsigned>(ceil_div(count, kNestedBlocksize))), kNestedThreads, args);
}

}  // namespace pissa::cuda
