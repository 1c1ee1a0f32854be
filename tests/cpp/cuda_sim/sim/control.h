// What a test asks of the simulated device, beyond CUDA's own functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "driver_types.h"

namespace cuda_sim {

/// What cudaDeviceGetAttribute says from now on; 9.0 at first.
void set_compute_capability(int major, int minor);

/// Kernels that were launched, whether or not they have run.
std::int64_t launches();
void reset_launches();

/// Times that the host waited: for a stream, an event, the device, or a copy that is not asynchronous.
std::int64_t synchronizations();
void reset_synchronizations();

/// Bytes that are allocated. An asynchronous free counts when it is called, as in a pool that is ordered by the stream.
std::size_t bytes_in_use();
std::size_t peak_bytes();
void reset_peak_bytes();

/// How much memory the device has from now on: 1 GiB at first, which is also the most; dry, 80 GiB of at most 512.
void set_memory(std::size_t bytes);

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

}  // namespace cuda_sim
