// How the libraries behave: what control.h's functions set.
#pragma once

#include <cstdint>

#include "sim/control.h"

namespace cuda_sim::detail {

/// As a call finds them; work that it has queued keeps them.
struct LibraryModes {
  bool flush_denormals = false;
  std::uint32_t no_algorithm_below = 0;
  std::uint64_t no_algorithm_for = 0;
  NoAlgorithm no_algorithm = NoAlgorithm::none_returned;
  OnNaN solver_on_nan = OnNaN::info;
  Defect defect = Defect::none;
};

extern LibraryModes library_modes;

}  // namespace cuda_sim::detail
