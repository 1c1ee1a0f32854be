// What a test asks of the simulated devices, of which there are two, beyond CUDA's own functions. Of memory: of the
// current one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "driver_types.h"

namespace cuda_sim {

/// What cudaDeviceGetAttribute says from now on; 9.0 at first.
void set_compute_capability(int major, int minor);

/// Likewise; at first so few that small matrices are enough for all.
inline constexpr int kMultiprocessors = 2;
void set_multiprocessors(int count);

/// Bytes that kernels have loaded by cuda::counted_load.
std::int64_t loaded_bytes();
void reset_loaded_bytes();

/// Kernels that were launched, whether or not they have run.
std::int64_t launches();
void reset_launches();

/// Times that the host waited, for a stream or for the device.
std::int64_t synchronizations();
void reset_synchronizations();

/// Bytes that are allocated, of 1 GiB or, dry, 80. A free counts when it is called, as in a pool that is ordered by the
/// stream.
std::size_t bytes_in_use();
std::size_t peak_bytes();
void reset_peak_bytes();

/// Dry, calls are checked and written into the ledger (sim/ledger.h), and nothing is computed: no kernel runs, no
/// library works, nothing is copied, and the host reads zeros. Memory is addresses alone, of which there may be more
/// than this machine has. So the sizes of a real model cost no time. Waits for everything first; memory from before
/// stays valid, and the functions above count the memory of the mode that is set.
void set_dry(bool dry);

/// Makes one call of the runtime fail with `error`, and do nothing: the next one that can fail, or a later one, when
/// `after` others are to succeed first. What frees or destroys is not counted: it never fails. cublas_v2.h and
/// cusolverDn.h have the same for their libraries; each has its own, and they do not disturb one another.
void fail_next(cudaError_t error, int after = 0);

/// Whether a failure that was asked for, of any library, is still to come. `clear_failures` takes all of them back.
bool failure_pending();
void clear_failures();

// What cuBLAS, cuBLASLt and cuSOLVER leave open, or do otherwise on another device or in another release: a program has
// to be right with all of it. Calls from now on behave as set here; `reset_libraries` sets all as it was at first.

/// Whether products that sum in f32 take a denormal f32 for zero: elements that they read, sums, elements that they
/// write. Not at first.
void set_flush_denormals(bool flush);

/// How cublasLt says that it knows no algorithm: the heuristic returns success and a count of 0, or
/// CUBLAS_STATUS_NOT_SUPPORTED; or it returns an algorithm, with which cublasLtMatmul is not supported.
enum class NoAlgorithm { none_returned, not_supported, refused_later };

/// cublasLt knows no algorithm where a preference claims less than `bytes` for the alignment of any matrix, or for
/// products with `m` rows in their column-major output. At first it knows one for all.
void set_no_algorithm_below(std::uint32_t bytes, NoAlgorithm how = NoAlgorithm::none_returned);
void set_no_algorithm_for(std::uint64_t m, NoAlgorithm how = NoAlgorithm::none_returned);

/// What a solver does that is given NaN.
enum class OnNaN {
  info,       // at first: as LAPACK. Cholesky stops at the pivot; NaN from QR
  info_zero,  // success, info 0, and NaN in what it computes
  status,     // CUSOLVER_STATUS_EXECUTION_FAILED, and nothing is computed for any matrix of the batch
};
void set_solver_on_nan(OnNaN mode);

void reset_libraries();

/// What is wrong with a device or a library, for tests of what notices it. `reset_libraries` mends it.
enum class Defect {
  none,
  // of the tensor cores' instruction
  parts_of_a,    // registers 0 and 1 change places
  parts_of_b,    // likewise
  sums_swapped,  // sums 0 and 1 change places
  sums_lost,     // the lower half of the rows is not added to
  other_half,    // bf16 is taken for f16, and f16 for bf16
  // of shuffles
  next_lane,  // a value comes from the lane after the one that was asked for
  // of launches
  early_refused,  // with the attribute: cudaErrorInvalidResourceHandle
  // of copies to the device
  byte_flipped,  // of more than 100 bytes one
  // of cublasLt
  lt_sums,     // half of them
  lt_bias,     // not added
  lt_state,    // the heuristic's result is not valid
  lt_arch,     // CUBLAS_STATUS_ARCH_MISMATCH
  lt_layouts,  // CUBLAS_STATUS_INVALID_VALUE of the heuristic
  lt_refuses,  // the product is not supported after all
  lt_fails,    // CUBLAS_STATUS_EXECUTION_FAILED
  // of the handle's product
  handle_sums,  // half of them
};
void set_defect(Defect defect);

}  // namespace cuda_sim
