#include "sim/modes.h"

namespace cuda_sim {

namespace detail {
LibraryModes library_modes;
}

void set_flush_denormals(bool flush) { detail::library_modes.flush_denormals = flush; }

void set_no_algorithm_below(std::uint32_t bytes, NoAlgorithm how) {
  detail::library_modes.no_algorithm_below = bytes;
  detail::library_modes.no_algorithm = how;
}

void set_no_algorithm_for(std::uint64_t m, NoAlgorithm how) {
  detail::library_modes.no_algorithm_for = m;
  detail::library_modes.no_algorithm = how;
}

void set_solver_on_nan(OnNaN mode) { detail::library_modes.solver_on_nan = mode; }

void reset_libraries() { detail::library_modes = {}; }

}  // namespace cuda_sim
