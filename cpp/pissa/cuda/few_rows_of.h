// The kernels for few rows times a quantised weight, alone or of a group of layers. Included by few_rows_of.cu.in only.
#pragma once

#include <type_traits>

#include "pissa/cuda/few_rows_device.h"
#include "pissa/cuda/formats_device.h"

namespace pissa::cuda {
namespace {

// ---- A quantised weight ------------------------------------------------------------------------------------------
// A block computes 16 or 32 columns of y, in tiles of 8; its warps divide K in chunks of 128. The order of the inner
// dimension is free, so a lane takes a line of a chunk, 32 neighbours with one scale, or two: k is dealt to the tensor
// cores' steps four at a time, x in the same order. Where x has several tiles of 16 rows, elements of a part of a chunk
// wait in registers for all of them. The tail is more columns of the inner dimension, for the tensor cores too: chunks
// of 32, dealt to the warps in turn.
//
// Codes and the tail's second factors are prefetched before the kernel waits for x A^T, which is computed meanwhile.

constexpr int kTileCols = 8;
constexpr int kSharedCols = 2 * kTileCols;  // of y, that the warps add up at a time: 32 KiB for 64 rows
constexpr int kChunk = 4 * kLine;
constexpr int kSteps = kChunk / 16;  // products of 16 k in a chunk
constexpr int kTailChunk = 4 * kOctet;
constexpr int kTailSteps = kTailChunk / 16;

template <int n>
__device__ __forceinline__ unsigned word_of(const uint4 (&words)[n], int i) {
  const uint4& four = words[i / 4];
  return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
}

// 8 n neighbours of a row of x, or zeros.
template <int n>
__device__ __forceinline__ void load_x(const Matrix& x, int row, std::int64_t k, bool inside, uint4 (&words)[n]) {
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const char*>(x.data) + 2 * (row * x.ld + k));
#pragma unroll
  for (int i = 0; i < n; ++i) words[i] = inside && row < x.rows ? counted_load(from + i) : make_uint4(0, 0, 0, 0);
}

// The rows of the tail's second factors that a block needs.
template <int kTiles, class Sum>
__device__ __forceinline__ void prefetch_tail(const Sum& sum, std::int64_t first_col) {
  constexpr std::int64_t kBytes = 128;  // that one prefetch brings
  constexpr int kThreadsOfRow = kThreads / (kTiles * kTileCols);
  const std::int64_t col = first_col + threadIdx.x / kThreadsOfRow;
  for (int i = 0; i < sum.count; ++i) {
    const Matrix& b = sum.term(i).b;
    const std::int64_t size = dense_size(b.format);
    const char* row = static_cast<const char*>(b.data) + col * b.ld * size;
    for (std::int64_t at = threadIdx.x % kThreadsOfRow * kBytes; at < b.cols * size && col < b.rows;
         at += kThreadsOfRow * kBytes) {
      prefetch(row + at);
    }
  }
}

// The codes that a warp needs, of all its chunks: without that its loop would wait for memory in each of them.
template <int kTiles, class Codes>
__device__ __forceinline__ void prefetch_codes(const Matrix& weight, std::int64_t first_col) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t col = first_col + lane;
  const auto* lines = static_cast<const typename Codes::Line*>(weight.data);
  for (std::int64_t k = threadIdx.x / kWarp * kChunk; k < weight.cols; k += kWarps * kChunk) {
    if (lane < kTiles * kTileCols && col < weight.rows) prefetch(lines + (col * weight.cols + k) / kLine);
  }
}

// totals += the warp's share of the tail; the terms are rounded to `format`.
template <Format format, int kTiles, int kRowTiles, class Sum>
__device__ __forceinline__ void add_tail(const Sum& sum, std::int64_t first_col,
                                         float (&totals)[kRowTiles][kTiles][4]) {
  const int group = threadIdx.x % kWarp / 4;
  const int quad = threadIdx.x % 4;
  int turn = static_cast<int>(threadIdx.x) / kWarp;
  for (int i = 0; i < sum.count; ++i) {
    const Term& term = sum.term(i);
    const int chunks = static_cast<int>((term.a.cols + kTailChunk - 1) / kTailChunk);
    const float a_scale = term.scale * (term.precision == Precision::f16_scaled ? kScaledDown : 1.0f);
    const float b_scale = term.precision == Precision::f16_scaled ? kScaledUp : 1.0f;
    for (; turn < chunks; turn += kWarps) {
      const std::int64_t k = turn * kTailChunk + quad * kOctet;
      float b[kTiles][kOctet];
      load_rows(term.b, first_col + group, kTileCols, k, b);
#pragma unroll
      for (int rows = 0; rows < kRowTiles; ++rows) {
        if (rows * kRows >= term.a.rows) break;
        float a[2][kOctet];
        load_rows(term.a, rows * kRows + group, 8, k, a);
        const auto scaled = [&](int row, int j) {
          return pack_halves<format>(a_scale * a[row][j], a_scale * a[row][j + 1]);
        };
#pragma unroll
        for (int step = 0; step < kTailSteps; ++step) {
          const int j = 4 * step;
          const unsigned a_words[4] = {scaled(0, j), scaled(1, j), scaled(0, j + 2), scaled(1, j + 2)};
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const unsigned b_words[2] = {pack_halves<format>(b_scale * b[tile][j], b_scale * b[tile][j + 1]),
                                         pack_halves<format>(b_scale * b[tile][j + 2], b_scale * b[tile][j + 3])};
            mma_m16n8k16<format>(totals[rows][tile], a_words, b_words);
          }
        }
      }
    }
    turn -= chunks;
  }
}

// Elements of the weight that a lane has in a chunk.
template <Format format, int kTiles, class Codes>
struct Elements {
  static constexpr int kScales = scales_of_line(Codes::kFormat);

  typename Codes::Line codes[kTiles];
  float scale[kTiles][kScales];

  // The tensor cores' second operand in a step.
  __device__ __forceinline__ void words(const typename Codes::Decoder& decoder, int step,
                                        unsigned (&b)[kTiles][2]) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float values[4];
      decoder.four_levels(codes[tile], step, values);
#pragma unroll
      for (float& value : values) value = Codes::element(value, scale[tile][step * kScales / kSteps]);
      b[tile][0] = pack_halves<format>(values[0], values[1]);
      b[tile][1] = pack_halves<format>(values[2], values[3]);
    }
  }
};

// totals += a step's product with 16 rows of x, of two of which the lane has neighbours: upper and lower.
template <Format format, int kTiles, int n>
__device__ __forceinline__ void multiply_step(const uint4 (&upper)[n], const uint4 (&lower)[n], int step,
                                              const unsigned (&b)[kTiles][2], float (&totals)[kTiles][4]) {
  const unsigned a[4] = {word_of(upper, 2 * step), word_of(lower, 2 * step), word_of(upper, 2 * step + 1),
                         word_of(lower, 2 * step + 1)};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) mma_m16n8k16<format>(totals[tile], a, b[tile]);
}

template <Format format, class Codes, int kTiles, int kRowTiles, class Sum>
__device__ __forceinline__ void multiply_quantized(const Matrix& x, const Matrix& weight, int shift, const Sum& sum) {
  struct Shared {
    float partial[kWarps][kRowTiles * kRows][kSharedCols];
  };
  constexpr int kScales = Elements<format, kTiles, Codes>::kScales;
  constexpr int kParts = kRowTiles == 1 ? 1 : kTiles;  // of a chunk: the more columns, the fewer steps in registers
  constexpr int kPartSteps = kSteps / kParts;
  Shared& shared = shared_memory<Shared>();
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int group = lane / 4;  // as the PTX ISA calls it: row of x, column of a tile
  const int quad = lane % 4;
  const std::int64_t first_col = static_cast<std::int64_t>(blockIdx.x) * kTiles * kTileCols;
  prefetch_codes<kTiles, Codes>(weight, first_col);
  prefetch_tail<kTiles>(sum, first_col);
  wait_for_earlier_kernels();
  const typename Codes::Decoder decoder;
  const BlockScales<Codes> scales(weight.scales, shift);
  float totals[kRowTiles][kTiles][4] = {};

  for (std::int64_t chunk = static_cast<std::int64_t>(warp) * kChunk; chunk < weight.cols; chunk += kWarps * kChunk) {
    const std::int64_t k = chunk + quad * kLine;
    const bool inside = k < weight.cols;
    Elements<format, kTiles, Codes> elements;
    typename BlockScales<Codes>::Part parts[kTiles][kScales];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const std::int64_t col = first_col + tile * kTileCols + group;
      const bool valid = inside && col < weight.rows;
      const std::int64_t at = col * weight.cols + k;
      elements.codes[tile] = valid ? counted_load(static_cast<const typename Codes::Line*>(weight.data) + at / kLine)
                                   : typename Codes::Line{};
#pragma unroll
      for (int i = 0; i < kScales; ++i) {
        if (valid) parts[tile][i] = scales.load(col, k + i * kLine / kScales, at + i * kLine / kScales);
      }
    }
    uint4 upper[4 / kParts];
    uint4 lower[4 / kParts];
    const auto load = [&](int part, int rows) {
      load_x(x, rows * kRows + group, k + part * (kLine / kParts), inside, upper);
      load_x(x, rows * kRows + group + 8, k + part * (kLine / kParts), inside, lower);
    };
    load(0, 0);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < kScales; ++i) elements.scale[tile][i] = inside ? scales.value(parts[tile][i]) : 0.0f;
    }
    if constexpr (kRowTiles == 1) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        unsigned b[kTiles][2];
        elements.words(decoder, step, b);
        multiply_step<format>(upper, lower, step, b, totals[0]);
      }
    } else {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        unsigned b[kPartSteps][kTiles][2];
#pragma unroll
        for (int step = 0; step < kPartSteps; ++step) elements.words(decoder, part * kPartSteps + step, b[step]);
#pragma unroll
        for (int rows = 0; rows < kRowTiles; ++rows) {
          if (rows * kRows >= x.rows) break;
          if (part + rows > 0) load(part, rows);
#pragma unroll
          for (int step = 0; step < kPartSteps; ++step)
            multiply_step<format>(upper, lower, step, b[step], totals[rows]);
        }
      }
    }
  }

  add_tail<format>(sum, first_col, totals);

  static_assert(kRows * kSharedCols == kThreads);  // one element of y a thread, of each tile of rows
#pragma unroll
  for (int first = 0; first < kTiles; first += kSharedCols / kTileCols) {
    if (first > 0) __syncthreads();
#pragma unroll
    for (int rows = 0; rows < kRowTiles; ++rows) {
#pragma unroll
      for (int tile = 0; tile < kSharedCols / kTileCols; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = rows * kRows + group + i / 2 * 8;
          shared.partial[warp][row][tile * kTileCols + 2 * quad + i % 2] = totals[rows][first + tile][i];
        }
      }
    }
    __syncthreads();

    const std::int64_t col = first_col + first * kTileCols + threadIdx.x % kSharedCols;
#pragma unroll
    for (int rows = 0; rows < kRowTiles; ++rows) {
      const int row = rows * kRows + static_cast<int>(threadIdx.x) / kSharedCols;
      if (row >= sum.out.rows || col >= sum.out.cols) break;
      float value = 0.0f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) value += shared.partial[other][row][threadIdx.x % kSharedCols];
      finish(sum, row, col, value);
    }
  }
}

// At a time: as many as have room for the registers that a thread needs.
constexpr int blocks_of_multiprocessor(int tiles, int row_tiles) {
  return (tiles == 2 ? 2 : 1) + (row_tiles == 1 ? 1 : 0);
}

template <Format format, class Codes, int kTiles, int kRowTiles>
__global__ void __launch_bounds__(kThreads, blocks_of_multiprocessor(kTiles, kRowTiles))
    few_rows_quantized_kernel(Matrix x, Matrix weight, int shift, RowSum sum) {
  multiply_quantized<format, Codes, kTiles, kRowTiles>(x, weight, shift, sum);
}

// ---- A group of layers ------------------------------------------------------------------------------------------

__device__ __forceinline__ Matrix weight_of(Matrix shared, const LayerWeight& layer) {
  const auto place = []<class T>(const T*& pointer, const void* own) {
    if (pointer) pointer = static_cast<const T*>(own);
  };
  shared.data = layer.codes;
  place(shared.scales.absmax, layer.absmax);
  place(shared.scales.absmax8, layer.absmax);
  place(shared.scales.absmax16, layer.absmax);
  place(shared.scales.nested_absmax, layer.table);
  place(shared.scales.levels, layer.table);
  shared.scales.offset = layer.offset;
  return shared;
}

// An expert has few rows, so x is little of what its blocks load.
constexpr int kGroupTiles = 2;

template <Format format, class Codes, int kRowTiles>
__global__ void __launch_bounds__(kThreads, blocks_of_multiprocessor(kGroupTiles, kRowTiles))
    few_rows_quantized_group_kernel(const __grid_constant__ QuantizedGroup all) {
  const LayerSum sum(all.group, kRowTiles * kRows);
  if (sum.rows <= 0) return wait_for_earlier_kernels();
  multiply_quantized<format, Codes, kGroupTiles, kRowTiles>(
      rows_from(all.x, sum.first, sum.rows), weight_of(all.weight, all.weights[blockIdx.y]), all.shift, sum);
}

// Whether blocks of 32 columns, and not of 16, leave the busiest multiprocessor fewer bits of x and codes to load, K
// times what is compared. Each element of x comes from L2 once for every block, so half as often, but there are half as
// many blocks.
template <class Codes>
bool takes_wide_blocks(const Context& context, const Matrix& x, const Matrix& weight) {
  constexpr std::int64_t kCodeBits = 8 * sizeof(typename Codes::Line) / kLine;
  const std::int64_t count = multiprocessors(context.device);
  const auto bits = [&](std::int64_t cols) {
    return ceil_div(ceil_div(weight.rows, cols), count) * (16 * x.rows + kCodeBits * cols);
  };
  return bits(4 * kTileCols) < bits(2 * kTileCols);
}

// start(format of x, tiles of rows) as compile-time constants.
template <class F>
void with_kernel(Format half, std::int64_t rows, F start) {
  const auto with_rows = [&](auto row_tiles) {
    if (half == Format::bf16) start(std::integral_constant<Format, Format::bf16>{}, row_tiles);
    else start(std::integral_constant<Format, Format::f16>{}, row_tiles);
  };
  if (rows <= kRows) with_rows(std::integral_constant<int, 1>{});
  else with_rows(std::integral_constant<int, 4>{});
}

}  // namespace

template <Format format>
void FewRowsOf<format>::multiply(const Context& context, const Matrix& x, const Matrix& weight, const RowSum& sum) {
  using Codes = CodesOf<format>;
  with_kernel(x.format, x.rows, [&](auto half, auto row_tiles) {
    const auto start = [&](auto tiles) {
      launch_dependent(context, "few_rows_quantized", few_rows_quantized_kernel<half(), Codes, tiles(), row_tiles()>,
                       dim3(static_cast<unsigned>(ceil_div(weight.rows, tiles() * kTileCols))), kThreads, x, weight,
                       shift_of(weight.scales.blocksize), sum);
    };
    if (takes_wide_blocks<Codes>(context, x, weight)) start(std::integral_constant<int, 4>{});
    else start(std::integral_constant<int, 2>{});
  });
}

template <Format format>
void FewRowsOf<format>::multiply_group(const Context& context, std::int64_t most_rows, const QuantizedGroup& all) {
  with_kernel(all.x.format, most_rows, [&](auto half, auto row_tiles) {
    const dim3 grid(static_cast<unsigned>(ceil_div(all.weight.rows, std::int64_t{kGroupTiles * kTileCols})),
                    static_cast<unsigned>(all.count),
                    static_cast<unsigned>(ceil_div(most_rows, std::int64_t{row_tiles() * kRows})));
    launch_dependent(context, "few_rows_quantized_group",
                     few_rows_quantized_group_kernel<half(), CodesOf<format>, row_tiles()>, grid, kThreads, all);
  });
}

}  // namespace pissa::cuda
