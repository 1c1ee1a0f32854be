// What the functions of the runtime share.
#pragma once

#include <mutex>

#include "driver_types.h"
#include "sim/failures.h"
#include "sim/stream.h"

namespace cuda_sim::detail {

inline constexpr int kDevices = 2;

/// Of the calling thread.
int current_device();

/// Whether a kernel may start before the one before it has ended.
bool has_dependent_launches();

/// For what is a mistake in the program and would be undefined on a device.
[[noreturn]] void die(const char* what);

/// One call of the runtime: alone, and failing where a test wants it to.
class Call {
 public:
  enum Kind { kCanFail, kNeverFails };
  explicit Call(Kind kind = kCanFail) : lock_(runtime_mutex()) {
    if (kind == kCanFail) error_ = static_cast<cudaError_t>(runtime_failure.take());
  }
  bool failed() const { return error_ != cudaSuccess; }
  cudaError_t error() const { return error_; }

 private:
  std::lock_guard<std::recursive_mutex> lock_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace cuda_sim::detail
