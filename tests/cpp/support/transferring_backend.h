// The CUDA backend on matrices of the host: each call takes them to the device, and what it writes back. Matrices that
// are on the device already, those that the backend allocated, are used where they are; so the core's algorithms run as
// they do in earnest, and the tests read and write ordinary memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <span>
#include <type_traits>
#include <vector>

#include "pissa/core/backend.h"
#include "pissa/core/nested_scales.h"
#include "pissa/core/quantized.h"
#include "pissa/cuda/backend.h"
#include "pissa/cuda/context.h"

namespace pissa::test {

/// Copies of host memory on the device, for the length of one call.
class Staging {
 public:
  explicit Staging(const cuda::Context& context) : context_(context) {}

  template <class T>
  T* upload(T* host, std::int64_t count, bool write_back = false) {
    const std::int64_t bytes = count * static_cast<std::int64_t>(sizeof(T));
    return reinterpret_cast<T*>(
        place(reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(host)), bytes, write_back));
  }
  Matrix operator()(Matrix matrix) {
    if (!matrix.data || on_device(matrix.data)) return matrix;
    if (!is_quantized(matrix.format)) {
      matrix.data = upload(static_cast<const char*>(matrix.data), bytes_of(matrix));
      return matrix;
    }
    const std::int64_t count = matrix.rows * matrix.cols;
    Scales& scales = matrix.scales;
    const std::int64_t blocks = info(matrix.format).scales == ScaleKind::tiles
                                    ? ceil_div(matrix.rows, scales.rows) * scales.across
                                    : ceil_div(count, scales.blocksize);
    matrix.data = upload(static_cast<const std::uint8_t*>(matrix.data), code_bytes(matrix.format, count));
    if (scales.absmax) scales.absmax = upload(scales.absmax, blocks);
    if (scales.absmax16) scales.absmax16 = upload(scales.absmax16, blocks);
    if (scales.absmax8) scales.absmax8 = upload(scales.absmax8, blocks);
    if (scales.levels) scales.levels = upload(scales.levels, 256);
    if (scales.nested_absmax) {
      scales.nested_absmax = upload(scales.nested_absmax, ceil_div(blocks, kNestedBlocksize));
      scales.offset = upload(scales.offset, 1);
    }
    return matrix;
  }
  MutableMatrix operator()(MutableMatrix matrix) {
    if (!matrix.data || on_device(matrix.data)) return matrix;
    matrix.data = upload(static_cast<char*>(matrix.data), bytes_of(matrix), true);
    return matrix;
  }
  std::vector<Term> operator()(std::span<const Term> terms) {
    std::vector<Term> result(terms.begin(), terms.end());
    for (Term& term : result) {
      term.a = (*this)(term.a);
      term.b = (*this)(term.b);
    }
    return result;
  }
  Sum operator()(const Sum& sum) { return {(*this)(sum.a), (*this)(sum.b), (*this)(sum.out)}; }
  /// What lies nowhere.
  template <class T>
    requires std::is_arithmetic_v<T> || std::is_enum_v<T> || std::is_same_v<T, cuda::Weight>
  const T& operator()(const T& value) {
    return value;
  }
  /// Waits for the call and brings back what it wrote.
  void finish() {
    for (const Region& region : regions_) {
      if (region.write_back && region.bytes > 0) {
        cuda::check(cudaMemcpyAsync(region.host, region.device, static_cast<std::size_t>(region.bytes),
                                    cudaMemcpyDeviceToHost, context_.stream),
                    context_, "cudaMemcpyAsync");
      }
    }
    cuda::check(cudaStreamSynchronize(context_.stream), context_, "cudaStreamSynchronize");
  }

 private:
  struct Region {
    char* host;
    char* device;
    std::int64_t bytes;
    bool write_back;
  };

  static bool on_device(const void* data) {
    cudaPointerAttributes attributes{};
    cudaPointerGetAttributes(&attributes, data);
    return attributes.type == cudaMemoryTypeDevice;
  }
  static std::int64_t bytes_of(const Matrix& matrix) {  // from the first element to the last
    if (matrix.rows == 0 || matrix.cols == 0) return 0;
    return ((matrix.rows - 1) * matrix.ld + matrix.cols) * element_size(matrix.format);
  }

  // What is uploaded already, as an output or in place, stays where it is. The address keeps its remainder by 16, so
  // that what is not aligned on the host is not on the device.
  char* place(char* host, std::int64_t bytes, bool write_back) {
    for (Region& region : regions_) {
      if (host >= region.host && host + bytes <= region.host + region.bytes) {
        region.write_back |= write_back;
        return region.device + (host - region.host);
      }
    }
    const std::int64_t skip = reinterpret_cast<std::uintptr_t>(host) % 16;
    memory_.emplace_back(context_, skip + bytes);
    char* device = memory_.back().data() + skip;
    if (bytes > 0) {
      cuda::check(
          cudaMemcpyAsync(device, host, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice, context_.stream),
          context_, "cudaMemcpyAsync");
    }
    regions_.push_back({host, device, bytes, write_back});
    return device;
  }

  const cuda::Context& context_;
  std::deque<cuda::Array<char>> memory_;
  std::vector<Region> regions_;
};

class TransferringBackend {
 public:
  TransferringBackend() : context_(cuda::standalone_context()), cuda_(context_) {}

  cuda::Buffer alloc(std::int64_t rows, std::int64_t cols, Format format) const {
    return cuda_.alloc(rows, cols, format);
  }
  void copy(const Matrix& a, const MutableMatrix& out) const { call(&Cuda::copy, a, out); }
  void decode_rows(const Matrix& a, const std::int64_t* rows, const MutableMatrix& out) const {
    staged([&](Staging& at) { cuda_.decode_rows(at(a), at.upload(rows, out.rows), at(out)); });
  }
  void add(const Matrix& a, const Matrix& b, const MutableMatrix& out) const { call(&Cuda::add, a, b, out); }
  void subtract(const Matrix& a, const Matrix& b, const MutableMatrix& out, double* squares) const {
    staged([&](Staging& at) {
      const MutableMatrix target = at(out);
      cuda_.subtract(at(a), at(b), target, at.upload(squares, 1, true));
    });
  }
  void add_both(const Sum& first, const Sum& second) const { call(&Cuda::add_both, first, second); }
  void fill_signs(const MutableMatrix& out, std::uint64_t seed, float scale) const {
    call(&Cuda::fill_signs, out, seed, scale);
  }
  void scale_rows(const Matrix& a, const Matrix& s, float divisor, const MutableMatrix& out, Op op) const {
    call(&Cuda::scale_rows, a, s, divisor, out, op);
  }
  void normalize_rows(const Matrix& a, const MutableMatrix& out) const { call(&Cuda::normalize_rows, a, out); }
  bool multiplies_in(Format format) const { return cuda_.multiplies_in(format); }
  void max_abs(std::span<const Matrix> matrices, float* largest) const {
    staged([&](Staging& at) {
      std::vector<Matrix> on_device;
      for (const Matrix& matrix : matrices) on_device.push_back(at(matrix));
      cuda_.max_abs(on_device, largest);
    });
  }
  std::vector<float> read(const float* from, std::int64_t count) const { return cuda_.read(from, count); }
  void gemm(std::span<const Term> terms, const Matrix& addend, const MutableMatrix& out) const {
    call(&Cuda::gemm, terms, addend, out);
  }
  void gemm_quantized(std::span<const Term> terms, const Matrix& addend, const QuantOutput& out) const {
    const std::int64_t count = addend.rows * addend.cols;
    staged([&](Staging& at) {
      cuda_.gemm_quantized(at(terms), at(addend),
                           {out.format, out.blocksize, at.upload(out.codes, code_bytes(out.format, count), true),
                            at.upload(out.scales, ceil_div(count, out.blocksize), true),
                            out.global ? at.upload(out.global, 1) : nullptr});
    });
  }
  void weight_gemm_nt(const Matrix& x, const Matrix& weight, float scale, Precision precision,
                      std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) const {
    call(&Cuda::weight_gemm_nt, x, weight, scale, precision, tail, bias, y);
  }
  void weight_gemm_nn(const Matrix& dy, const Matrix& weight, float scale, Precision precision,
                      std::span<const Term> tail, const MutableMatrix& dx) const {
    call(&Cuda::weight_gemm_nn, dy, weight, scale, precision, tail, dx);
  }

  /// A weight being decoded, and the device's copy of what it is decoded from.
  struct Ahead {
    Staging staging;
    cuda::Weight weight;
    Ahead(const cuda::Context& context, const cuda::CudaBackend& cuda, const Matrix& from, Op op, Precision precision,
          std::int64_t rows)
        : staging(context), weight(cuda.decode_ahead(staging(from), op, precision, rows)) {}
  };
  Ahead decode_ahead(const Matrix& weight, Op op, Precision precision, std::int64_t rows) const {
    return {context_, cuda_, weight, op, precision, rows};
  }
  void weight_gemm_nt(const Matrix& x, const Ahead& ahead, float scale, Precision precision, std::span<const Term> tail,
                      const Matrix& bias, const MutableMatrix& y) const {
    call(&Cuda::weight_gemm_nt, x, ahead.weight, scale, precision, tail, bias, y);
  }
  void weight_gemm_nn(const Matrix& dy, const Ahead& ahead, float scale, Precision precision,
                      std::span<const Term> tail, const MutableMatrix& dx) const {
    call(&Cuda::weight_gemm_nn, dy, ahead.weight, scale, precision, tail, dx);
  }
  bool multiply_group(const Matrix& x, std::span<const GroupedLayer> layers, const MutableMatrix& y,
                      const MutableMatrix& xa) const {
    bool done = false;
    staged([&](Staging& at) {
      const MutableMatrix y_there = at(y), xa_there = at(xa);
      std::vector<GroupedLayer> there(layers.begin(), layers.end());
      for (GroupedLayer& layer : there) {
        layer.weight = at(layer.weight);
        for (Matrix* factor : {&layer.adapter.a, &layer.adapter.b, &layer.adapter.a0, &layer.adapter.b0})
          *factor = at(*factor);
      }
      done = cuda_.multiply_group(at(x), there, y_there, xa_there);
    });
    return done;
  }

  void orthonormalize(const MutableMatrix& basis, std::int64_t done, std::int64_t rows, Rank rank) {
    call(&Cuda::orthonormalize, basis, done, rows, rank);
  }
  void reorthonormalize(const MutableMatrix& basis, const MutableMatrix& companion, std::int64_t done,
                        std::int64_t rows) {
    call(&Cuda::reorthonormalize, basis, companion, done, rows);
  }
  bool had_full_rank() { return cuda_.had_full_rank(); }
  void gram_svd(const Matrix& rows, const Matrix& others, float scale, const MutableMatrix& s,
                const MutableMatrix& vectors) {
    call(&Cuda::gram_svd, rows, others, scale, s, vectors);
  }
  void quantize_columns(const Matrix& w, const Matrix& lower, Format format, const Scales& scales, std::int64_t first,
                        const MutableMatrix& errors, std::uint8_t* codes) const {
    staged([&](Staging& at) {
      const Scales given = at(Matrix{codes, w.rows, w.cols, w.cols, format, scales}).scales;
      cuda_.quantize_columns(at(w), at(lower), format, given, first, at(errors),
                             at.upload(codes, code_bytes(format, w.rows * w.cols), true));
    });
  }
  static constexpr std::int64_t kScoredTokens = cuda::CudaBackend::kScoredTokens;
  static constexpr std::int64_t kLogitBytes = cuda::CudaBackend::kLogitBytes;
  void add_scores(const MutableMatrix& logits, const std::int64_t* labels, std::int64_t first, float scale, float cap,
                  const MutableMatrix& state, const MutableMatrix& earlier, bool gradient) const {
    staged([&](Staging& at) {
      cuda_.add_scores(at(logits), at.upload(labels, logits.rows), first, scale, cap, at(state), at(earlier), gradient);
    });
  }
  void finish_scores(const Matrix& state, const std::int64_t* labels, const Matrix& weight, float scale, float cap,
                     const MutableMatrix& scores, const Matrix& sum, const MutableMatrix& dx) const {
    staged([&](Staging& at) {
      const MutableMatrix dx_there = at(dx);  // sum may be the same
      cuda_.finish_scores(at(state), at.upload(labels, scores.rows), at(weight), scale, cap, at(scores), at(sum),
                          dx_there);
    });
  }
  void quantize_absmax(const float* absmax, std::int64_t count, const float* given, std::uint8_t* codes8,
                       float* nested_absmax, float* offset) const {
    staged([&](Staging& at) {
      cuda_.quantize_absmax(
          at.upload(absmax, count), count, given ? at.upload(given, 1) : nullptr, at.upload(codes8, count, true),
          at.upload(nested_absmax, ceil_div(count, kNestedBlocksize), true), at.upload(offset, 1, true));
    });
  }

 private:
  using Cuda = cuda::CudaBackend;

  template <class F>
  void staged(F f) const {
    Staging staging(context_);
    f(staging);
    staging.finish();
  }
  // Outputs are placed first: an operand may be a part of one.
  template <class Function, class... Args>
  void call(Function function, const Args&... args) const {
    staged([&](Staging& at) {
      const auto place_output = [&]<class T>(const T& arg) {
        if constexpr (std::is_same_v<T, MutableMatrix>) at(arg);
      };
      (place_output(args), ...);
      (cuda_.*function)(at(args)...);
    });
  }

  const cuda::Context& context_;
  mutable Cuda cuda_;
};

static_assert(MultipliesGroups<TransferringBackend>);

}  // namespace pissa::test
