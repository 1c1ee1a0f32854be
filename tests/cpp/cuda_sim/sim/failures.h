// Failures that a test has asked for.
#pragma once

namespace cuda_sim::detail {

/// Of the runtime or of one library.
class Failure {
 public:
  void arm(int status, int after) {
    status_ = status;
    after_ = after;
  }
  /// What the call that asks is to return, or 0.
  int take() {
    if (status_ == 0 || after_-- > 0) return 0;
    const int status = status_;
    status_ = 0;
    return status;
  }
  bool pending() const { return status_ != 0; }

 private:
  int status_ = 0;  // of every enumeration, 0 is success
  int after_ = 0;
};

extern Failure runtime_failure, blas_failure, solver_failure;

}  // namespace cuda_sim::detail
