// The ops that quantise and dequantise.
#pragma once

#include <array>
#include <string>
#include <tuple>

#include "pissa/core/error_feedback.h"
#include "pissa/core/merge_codes.h"
#include "pissa/core/nested_scales.h"
#include "pissa/core/quantized.h"
#include "pissa/torch/svd.h"

namespace pissa::ops {

inline Format quantized_format(const std::string& name) {
  for (const Format format : kFormats) {
    if (is_quantized(format) && name == info(format).name) return format;
  }
  PISSA_CHECK(false, "format: got '", name, "'; allowed: the quantised formats");
  return Format::nf4;
}

inline Format written_format(const std::string& name) {
  const Format format = quantized_format(name);
  PISSA_CHECK(!is_read_only(format), "format: got '", name, "', which is read but not written");
  return format;
}

// A quantised weight as it crosses the op boundary.
struct QuantizedTensors {
  Tensor codes;
  Tensor absmax;                 // float32, uint8 or bfloat16, as the format stores its scales; empty if within
  OptionalTensor nested_absmax;  // for nested scales; or the values of 256 bytes
  OptionalTensor offset;
  Format format;
  std::int64_t blocksize;

  QuantizedTensors(const Tensor& codes_, const Tensor& absmax_, const OptionalTensor& nested,
                   const OptionalTensor& offset_, const std::string& format_, std::int64_t blocksize_)
      : codes(torch::stable::contiguous(codes_)),
        absmax(torch::stable::contiguous(absmax_)),
        nested_absmax(contiguous(nested)),
        offset(contiguous(offset_)),
        format(quantized_format(format_)),
        blocksize(blocksize_) {}

  Matrix view(std::int64_t rows, std::int64_t cols) const {
    const std::int64_t bytes = code_bytes(format, rows * cols);
    PISSA_CHECK(codes.scalar_type() == ScalarType::Byte && codes.numel() == bytes, "codes: got ", codes.numel(),
                " elements; needed: ", bytes, " bytes of uint8 for [", rows, ", ", cols, "] in ", info(format).name);
    Matrix result{codes.const_data_ptr(), rows, cols, cols, format};
    result.scales = scales(rows, cols);
    return result;
  }

 private:
  Scales scales(std::int64_t rows, std::int64_t cols) const {
    Scales result = info(format).scales == ScaleKind::tiles ? tiles(rows, cols) : in_blocks(rows, cols);
    const ScalarType dtype = absmax.scalar_type();
    const ScaleKind kind = info(format).scales;
    PISSA_CHECK(!nested_absmax || kind == ScaleKind::nested || kind == ScaleKind::e4m3, info(format).name,
                ": has no nested scales; got nested_absmax");
    PISSA_CHECK(has_dtype(dtype), "absmax: got another dtype than scales of ", info(format).name, " have");
    if (kind == ScaleKind::within) return result;
    if (dtype == ScalarType::Float) result.absmax = absmax.const_data_ptr<float>();
    else if (dtype == ScalarType::Byte) result.absmax8 = absmax.const_data_ptr<std::uint8_t>();
    else result.absmax16 = static_cast<const std::uint16_t*>(absmax.const_data_ptr());
    if (nested_absmax) set_table(ceil_div(rows * cols, blocksize), result);
    return result;
  }

  // Whether scales of the format have that dtype, with or without a table.
  bool has_dtype(ScalarType dtype) const {
    const bool table = nested_absmax.has_value();
    switch (info(format).scales) {
      case ScaleKind::f32:
        return dtype == ScalarType::Float;
      case ScaleKind::nested:
        return dtype == (table ? ScalarType::Byte : ScalarType::Float);
      case ScaleKind::e8m0:
        return dtype == ScalarType::Byte;
      case ScaleKind::e4m3:
        return dtype == ScalarType::Byte && table;
      case ScaleKind::bf16:
        return dtype == ScalarType::BFloat16 || dtype == ScalarType::Float;
      case ScaleKind::tiles:
        return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Byte;
      case ScaleKind::within:
        return dtype == ScalarType::Byte;  // of none
    }
    return false;
  }

  void set_table(std::int64_t blocks, Scales& result) const {
    const bool nested = info(format).scales == ScaleKind::nested;
    const std::int64_t entries = nested ? ceil_div(blocks, kNestedBlocksize) : 256;
    PISSA_CHECK(nested_absmax->scalar_type() == ScalarType::Float && nested_absmax->numel() == entries &&
                    nested == offset.has_value() &&
                    (!nested || (offset->scalar_type() == ScalarType::Float && offset->numel() == 1)),
                "scales in bytes: needed absmax uint8 [", blocks, "], nested_absmax float32 [", entries,
                "] and, of nested ones, offset float32 []");
    (nested ? result.nested_absmax : result.levels) = nested_absmax->const_data_ptr<float>();
    if (nested) result.offset = offset->const_data_ptr<float>();
  }

  Scales in_blocks(std::int64_t rows, std::int64_t cols) const {
    check_blocksize(format, blocksize, cols);
    PISSA_CHECK(!is_read_only(format) || cols % blocksize == 0, info(format).name, ": got a weight of ", cols,
                " columns; needed: a multiple of ", blocksize);
    const std::int64_t blocks = is_read_only(format) ? 0 : ceil_div(rows * cols, blocksize);
    PISSA_CHECK(absmax.numel() == blocks, "absmax: got ", absmax.numel(), " elements; needed: ", blocks);
    return {blocksize};
  }

  // Tiles of one row, or as high as they are wide.
  Scales tiles(std::int64_t rows, std::int64_t cols) const {
    PISSA_CHECK(blocksize >= 1, "blocksize: got ", blocksize, "; allowed: from 1 on");
    const std::int64_t across = ceil_div(cols, blocksize);
    const std::int64_t height = absmax.numel() == rows * across ? 1 : blocksize;
    PISSA_CHECK(absmax.numel() == ceil_div(rows, height) * across, "absmax: got ", absmax.numel(),
                " elements; needed: ", rows, " or ", ceil_div(rows, blocksize), " times ", across);
    Scales result{blocksize};
    result.rows = height;
    result.across = across;
    return result;
  }
};

// Memory for a quantised matrix [rows, cols], and the core's output in it.
struct NewQuantized {
  Tensor codes, absmax;
  QuantOutput output;

  // The global scale is that of NVFP4, float32 [].
  NewQuantized(const Tensor& like, const Matrix& shape, const std::string& format, std::int64_t blocksize,
               const OptionalTensor& global)
      : NewQuantized(like, shape, written_format(format), blocksize) {
    PISSA_CHECK(global.has_value() == (output.format == Format::nvfp4) &&
                    (!global || (global->scalar_type() == ScalarType::Float && global->numel() == 1)),
                "global_scale: needed by nvfp4, float32 [], and by no other format");
    if (global) output.global = global->const_data_ptr<float>();
  }

 private:
  NewQuantized(const Tensor& like, const Matrix& shape, Format format, std::int64_t blocksize)
      : codes(new_tensor(like, {code_bytes(format, shape.rows * shape.cols)}, ScalarType::Byte)),
        absmax(new_tensor(like, {blocks(format, shape, blocksize)}, ScalarType::Float)),
        output{format, blocksize, codes.mutable_data_ptr<std::uint8_t>(), absmax.mutable_data_ptr<float>()} {}

  static std::int64_t blocks(Format format, const Matrix& shape, std::int64_t blocksize) {
    check_blocksize(format, blocksize, shape.cols);
    return ceil_div(shape.rows * shape.cols, blocksize);
  }
};

template <class Device>
std::tuple<Tensor, Tensor> quantize(const Tensor& weight, const std::string& format, std::int64_t blocksize,
                                    const OptionalTensor& global_scale) {
  Device device(weight, global_scale);
  const Tensor w_tensor = torch::stable::contiguous(weight);
  const Matrix w = matrix(w_tensor);
  const NewQuantized q(weight, w, format, blocksize, global_scale);
  device.backend().gemm_quantized({}, w, q.output);
  return {q.codes, q.absmax};
}

// Codes by error feedback, with the given scales.
template <class Device>
Tensor feedback_codes(const Tensor& weight, const Tensor& lower, const Tensor& absmax,
                      const OptionalTensor& nested_absmax, const OptionalTensor& offset, const std::string& format,
                      std::int64_t blocksize) {
  Device device(weight, lower, absmax, nested_absmax, offset);
  const Tensor w_tensor = torch::stable::contiguous(weight);
  const Tensor l_tensor = torch::stable::contiguous(lower);
  const Matrix w = matrix(w_tensor);
  const Tensor codes = new_tensor(weight, {code_bytes(written_format(format), w.rows * w.cols)}, ScalarType::Byte);
  const QuantizedTensors quantized(codes, absmax, nested_absmax, offset, format, blocksize);
  const Matrix stored = quantized.view(w.rows, w.cols);
  quantize_with_feedback(device.backend(), w, matrix(l_tensor), stored.format, stored.scales,
                         codes.mutable_data_ptr<std::uint8_t>());
  return codes;
}

// The codes after the change scaling * b a, and MergeSums in the order of its members, float64 [4].
template <class Device>
std::tuple<Tensor, Tensor> merge_codes(const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
                                       const OptionalTensor& offset, const std::string& format, std::int64_t blocksize,
                                       const Tensor& a, const Tensor& b, double scaling, const OptionalTensor& lower,
                                       bool dither, std::int64_t seed) {
  Device device(codes, absmax, nested_absmax, offset, a, b, lower);
  const Tensor a_tensor = torch::stable::contiguous(a), b_tensor = torch::stable::contiguous(b);
  const Matrix right = matrix(a_tensor), left = matrix(b_tensor);
  check_shape("b", left, left.rows, right.rows);
  const QuantizedTensors weight(codes, absmax, nested_absmax, offset, format, blocksize);
  const Tensor merged = new_tensor(codes, {weight.codes.numel()}, ScalarType::Byte);
  const std::array change{Term{left, Op::n, right, Op::n, static_cast<float>(scaling)}};
  const OptionalTensor l_tensor = contiguous(lower);
  const Matrix factor = l_tensor ? matrix(*l_tensor) : Matrix{};
  if (factor) {
    check_shape("lower", factor, right.cols, right.cols);
    PISSA_CHECK(factor.format == Format::f32, "lower: needed float32");
  }
  const MergeSums sums = device.backend().merge_codes(
      weight.view(left.rows, right.cols), change, factor, dither ? Rounding::dither : Rounding::nearest,
      static_cast<std::uint64_t>(seed), merged.mutable_data_ptr<std::uint8_t>());
  const Tensor numbers = new_tensor(codes, {4}, ScalarType::Double);
  double* to = numbers.mutable_data_ptr<double>();
  to[0] = sums.along, to[1] = sums.square;
  to[2] = static_cast<double>(sums.moved), to[3] = static_cast<double>(sums.beyond);
  return {merged, numbers};
}

// Without an offset, the mean is subtracted.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax, const OptionalTensor& offset) {
  Device device(absmax, offset);
  const std::int64_t count = absmax.numel();
  PISSA_CHECK(absmax.scalar_type() == ScalarType::Float && count > 0, "absmax: needed float32 [blocks], not empty");
  PISSA_CHECK(!offset || (offset->scalar_type() == ScalarType::Float && offset->numel() == 1),
              "offset: needed float32 []");
  const Tensor from = torch::stable::contiguous(absmax);
  const Tensor codes8 = new_tensor(absmax, {count}, ScalarType::Byte);
  const Tensor nested = new_tensor(absmax, {ceil_div(count, kNestedBlocksize)}, ScalarType::Float);
  const Tensor center = new_tensor(absmax, {}, ScalarType::Float);
  device.backend().quantize_absmax(
      from.const_data_ptr<float>(), count, offset ? offset->const_data_ptr<float>() : nullptr,
      codes8.mutable_data_ptr<std::uint8_t>(), nested.mutable_data_ptr<float>(), center.mutable_data_ptr<float>());
  return {codes8, nested, center};
}

template <class Device>
Tensor dequantize(const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
                  const OptionalTensor& offset, const std::string& format, std::int64_t blocksize, std::int64_t rows,
                  std::int64_t cols, ScalarType dtype) {
  Device device(codes, absmax, nested_absmax, offset);
  const QuantizedTensors weight(codes, absmax, nested_absmax, offset, format, blocksize);
  const Tensor out = new_tensor(codes, {rows, cols}, dtype);
  device.backend().copy(weight.view(rows, cols), mutable_matrix(out));
  return out;
}

// Rows of the weight, for indices of any shape: [..., cols].
template <class Device>
Tensor dequantize_rows(const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
                       const OptionalTensor& offset, const std::string& format, std::int64_t blocksize,
                       std::int64_t rows, std::int64_t cols, const Tensor& indices, ScalarType dtype) {
  Device device(codes, absmax, nested_absmax, offset, indices);
  PISSA_CHECK(indices.scalar_type() == ScalarType::Long, "indices: needed int64");
  const QuantizedTensors weight(codes, absmax, nested_absmax, offset, format, blocksize);
  const Tensor wanted = torch::stable::contiguous(indices);
  std::vector<std::int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(cols);
  const Tensor out = new_tensor(codes, sizes, dtype);
  device.backend().decode_rows(weight.view(rows, cols), static_cast<const std::int64_t*>(wanted.const_data_ptr()),
                               mutable_matrix(out));
  return out;
}

// error = weight - quantised weight, in any dtype. The memory is reused, because touching 32 MB for the first time
// takes longer than computing them. Returns the sum of the squares, float64 [].
template <class Device>
Tensor quantization_error(const Tensor& weight, const Tensor& codes, const Tensor& absmax,
                          const OptionalTensor& nested_absmax, const OptionalTensor& offset, const std::string& format,
                          std::int64_t blocksize, Tensor error) {
  Device device(weight, codes, absmax, nested_absmax, offset, error);
  const Tensor w_tensor = torch::stable::contiguous(weight);
  const Matrix w = matrix(w_tensor);
  const QuantizedTensors quantized(codes, absmax, nested_absmax, offset, format, blocksize);
  PISSA_CHECK(error.is_contiguous(), "error: needed a contiguous tensor");
  const MutableMatrix out = mutable_matrix(error);
  check_shape("error", out, w.rows, w.cols);
  const Tensor squares = new_tensor(weight, {}, ScalarType::Double);
  device.backend().subtract(w, quantized.view(w.rows, w.cols), out, squares.mutable_data_ptr<double>());
  return squares;
}

template <class Device>
std::tuple<Tensor, Tensor> residual_quantized(const Tensor& weight, const Tensor& a0, const Tensor& b0, double scaling,
                                              const std::string& format, std::int64_t blocksize) {
  Device device(weight, a0, b0);
  const FactoredTensors tensors(weight, a0, b0);
  const Matrix w = matrix(tensors.weight);
  const NewQuantized q(weight, w, format, blocksize, {});
  const std::array terms{tensors.minus_factors(scaling)};
  device.backend().gemm_quantized(terms, w, q.output);
  return {q.codes, q.absmax};
}

}  // namespace pissa::ops
