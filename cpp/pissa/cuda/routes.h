// Ways to compute on a GPU beside which there is another one. What the self-test (self_test.h) finds wrong on a device
// is closed there for the rest of the process, and the other way is taken.
#pragma once

namespace pissa::cuda {

enum class Route {
  early_launch,  ///< a kernel starts while its predecessor ends; else after it
  lt,            ///< products by cublasLt; else by the handle of cuBLAS
  few_rows,      ///< few rows times anything, in one kernel; else cuBLAS, with a weight that is decoded first
  group,         ///< the layers of a group in two kernels; else one after the other
};
inline constexpr Route kRoutes[] = {Route::early_launch, Route::lt, Route::few_rows, Route::group};

const char* name(Route route);

/// What computes instead of a closed route.
const char* instead(Route route);

bool is_open(int device, Route route);
void set_open(int device, Route route, bool open);

/// Whether the self-test has run on a device.
bool is_tested(int device);
void set_tested(int device, bool tested);

}  // namespace pissa::cuda
