// A backend whose memory only it can read: the CPU's arithmetic on pages that are inaccessible between its calls, as
// the memory of a device is to the host. An algorithm that reads through a pointer of the backend's dies; what passes
// here needs no GPU to be known not to. Fresh memory is NaN, so that a result shows whether something was used before
// it was computed.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <span>
#include <vector>

#include "pissa/core/backend.h"
#include "pissa/cpu/backend.h"

namespace pissa::test {

/// Memory that is inaccessible unless an `Open` lives. Handed out piece by piece, given back as a whole.
class Device {
 public:
  Device() : base_(mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (base_ == MAP_FAILED) throw std::bad_alloc();
  }
  Device(const Device&) = delete;
  ~Device() { munmap(base_, kBytes); }

  class Open {
   public:
    explicit Open(const Device& device) : device_(device) { device_.protect(PROT_READ | PROT_WRITE); }
    Open(const Open&) = delete;
    ~Open() { device_.protect(PROT_NONE); }

   private:
    const Device& device_;
  };

  void* allocate(std::int64_t bytes) {
    const Open open(*this);
    void* piece = static_cast<char*>(base_) + used_;
    used_ += (bytes + 63) / 64 * 64;
    if (used_ > kBytes) throw std::bad_alloc();
    std::memset(piece, 0xff, static_cast<std::size_t>(bytes));
    return bytes > 0 ? piece : nullptr;
  }
  template <class T>
  T* upload(std::span<T> host) {
    void* piece = allocate(static_cast<std::int64_t>(host.size_bytes()));
    const Open open(*this);
    if (piece) std::memcpy(piece, host.data(), host.size_bytes());
    return static_cast<T*>(piece);
  }
  std::vector<std::uint8_t> download(const void* from, std::int64_t bytes) const {
    const Open open(*this);
    const auto* first = static_cast<const std::uint8_t*>(from);
    return {first, first + bytes};
  }

 private:
  static constexpr std::int64_t kBytes = std::int64_t{64} << 20;
  void protect(int access) const {
    if (mprotect(base_, kBytes, access) != 0) throw std::bad_alloc();
  }

  void* base_;
  std::int64_t used_ = 0;
};

class GuardedBackend {
  template <class F>
  auto inside(F call) {
    const Device::Open open(device_);
    return call();
  }

 public:
  GuardedBackend(Device& device, const cpu::CpuBackend& cpu) : device_(device), cpu_(cpu) {}

  struct Buffer {
    MutableMatrix matrix;
    MutableMatrix view() const { return matrix; }
  };
  Buffer alloc(std::int64_t rows, std::int64_t cols, Format format) {
    return {{device_.allocate(rows * cols * element_size(format)), rows, cols, cols, format}};
  }

  void copy(const Matrix& a, const MutableMatrix& out) {
    inside([&] { cpu_.copy(a, out); });
  }
  void add(const Matrix& a, const Matrix& b, const MutableMatrix& out) {
    inside([&] { cpu_.add(a, b, out); });
  }
  void subtract(const Matrix& a, const Matrix& b, const MutableMatrix& out, double* squares) {
    inside([&] { cpu_.subtract(a, b, out, squares); });
  }
  void fill_signs(const MutableMatrix& out, std::uint64_t seed, float scale) {
    inside([&] { cpu_.fill_signs(out, seed, scale); });
  }
  void scale_rows(const Matrix& a, const Matrix& s, float divisor, const MutableMatrix& out, Op op) {
    inside([&] { cpu_.scale_rows(a, s, divisor, out, op); });
  }
  void normalize_rows(const Matrix& a, const MutableMatrix& out) {
    inside([&] { cpu_.normalize_rows(a, out); });
  }
  bool multiplies_in(Format format) const { return cpu_.multiplies_in(format); }
  void max_abs(std::span<const Matrix> matrices, float* largest) {
    inside([&] { cpu_.max_abs(matrices, largest); });
  }
  std::vector<float> read(const float* from, std::int64_t count) {
    return inside([&] { return cpu_.read(from, count); });
  }
  void gemm(std::span<const Term> terms, const Matrix& addend, const MutableMatrix& out) {
    inside([&] { cpu_.gemm(terms, addend, out); });
  }
  void gemm_quantized(std::span<const Term> terms, const Matrix& addend, const QuantOutput& out) {
    inside([&] { cpu_.gemm_quantized(terms, addend, out); });
  }
  void quantize_absmax(const float* absmax, std::int64_t count, const float* given, std::uint8_t* codes8,
                       float* nested_absmax, float* offset) {
    inside([&] { cpu_.quantize_absmax(absmax, count, given, codes8, nested_absmax, offset); });
  }
  void weight_gemm_nt(const Matrix& x, const Matrix& weight, float scale, Precision precision,
                      std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y) {
    inside([&] { cpu_.weight_gemm_nt(x, weight, scale, precision, tail, bias, y); });
  }
  void weight_gemm_nn(const Matrix& dy, const Matrix& weight, float scale, Precision precision,
                      std::span<const Term> tail, const MutableMatrix& dx) {
    inside([&] { cpu_.weight_gemm_nn(dy, weight, scale, precision, tail, dx); });
  }
  Matrix decode_ahead(const Matrix& weight, Precision, std::int64_t) { return weight; }
  void orthonormalize(const MutableMatrix& basis, std::int64_t done, std::int64_t count, Rank rank) {
    inside([&] { cpu_.orthonormalize(basis, done, count, rank); });
  }
  void reorthonormalize(const MutableMatrix& basis, const MutableMatrix& companion, std::int64_t done,
                        std::int64_t count) {
    inside([&] { cpu_.reorthonormalize(basis, companion, done, count); });
  }
  bool had_full_rank() { return true; }
  void gram_svd(const Matrix& rows, float scale, const MutableMatrix& s, const MutableMatrix& vectors) {
    inside([&] { cpu_.gram_svd(rows, scale, s, vectors); });
  }

 private:
  Device& device_;
  const cpu::CpuBackend& cpu_;
};

static_assert(Backend<GuardedBackend>);

}  // namespace pissa::test
