// CUDA on the host, for tests of a backend on machines without a GPU: its sources are compiled as C++ with these
// headers in the place of NVIDIA's. What is simulated is chosen to make mistakes show, not to be fast: memory that the
// host cannot touch, work that does not begin before something waits for it, threads that run in an unkind order.
#pragma once

#define PISSA_CUDA_SIM 1

#include <functional>
#include <tuple>
#include <utility>

#include "cuda_runtime_api.h"
#include "library_types.h"
#include "sim/control.h"
#include "sim/device.h"
#include "sim/ledger.h"

namespace cuda_sim::detail {
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> thread);
}  // namespace cuda_sim::detail

template <class... ExpTypes, class... ActTypes>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(ExpTypes...), ActTypes&&... args) {
  if (!config || !kernel) return cudaErrorInvalidValue;
  // The arguments are converted at the launch and copied for each thread, as on the device.
  return cuda_sim::detail::launch(
      *config, reinterpret_cast<const void*>(kernel),
      [kernel, kept = std::tuple<ExpTypes...>(std::forward<ActTypes>(args)...)] { std::apply(kernel, kept); });
}
