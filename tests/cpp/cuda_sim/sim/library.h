// What the simulated libraries share.
#pragma once

#include <cstddef>
#include <cstring>
#include <mutex>

#include "sim/failures.h"
#include "sim/ledger.h"
#include "sim/memory.h"
#include "sim/runtime.h"
#include "sim/stream.h"

namespace cuda_sim::detail {

/// One call of a library: alone, and failing where a test wants it to.
template <class Status>
class LibraryCall {
 public:
  explicit LibraryCall(Failure& failure) : lock_(runtime_mutex()), status_(static_cast<Status>(failure.take())) {}
  bool failed() const { return status_ != Status{}; }
  Status status() const { return status_; }

 private:
  std::lock_guard<std::recursive_mutex> lock_;
  Status status_;
};

/// Bytes from the first element to behind the last of a column-major matrix.
inline std::size_t extent(std::size_t rows, std::size_t cols, std::size_t ld, std::size_t element) {
  return rows == 0 || cols == 0 ? 0 : ((cols - 1) * ld + rows) * element;
}

// Floating-point operations, as textbooks count them (LAPACK working note 41).

constexpr double gemm_flops(double m, double n, double k) { return 2 * m * n * k; }

/// Of a Cholesky factor.
constexpr double potrf_flops(double n) { return n * n * n / 3; }

/// A triangular matrix of `size`, solved for `vectors` right-hand sides.
constexpr double trsm_flops(double size, double vectors) { return size * size * vectors; }

/// Householder's QR of an m x n matrix, m >= n; or its n reflectors multiplied out.
constexpr double geqrf_flops(double m, double n) { return 2 * n * n * (m - n / 3); }

/// What a library leaves in its workspace: nothing that anyone may rely on.
inline void spoil(void* workspace, std::size_t bytes, const char* what) {
  if (bytes == 0) return;
  require_allocated(workspace, bytes, what);
  std::memset(workspace, 0xff, bytes);
}

}  // namespace cuda_sim::detail
