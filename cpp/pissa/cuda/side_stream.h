// Work beside the context's stream: a second stream, which starts behind the first and joins it again.
#pragma once

#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// The thread's second stream of the device. Only events order it, so that a CUDA graph can capture both. Memory that
/// work on it uses is taken and freed on the context's stream, and outlives this object: declare it first.
class SideStream {
 public:
  /// The context must outlive it. Several objects of a thread share one stream: their work runs in its order.
  explicit SideStream(const Context& main);
  SideStream(const SideStream&) = delete;
  ~SideStream();  // joins

  /// What is queued on the side from now on begins when all that is queued on the context's stream now is done.
  void fork();
  /// What is queued on the context's stream from now on begins when all that is queued on the side now is done.
  void join();

  /// For launches; it has no memory to give.
  const Context& context() const { return side_; }

 private:
  cudaError_t order(cudaStream_t first, cudaStream_t then) const;

  const Context& main_;
  Context side_;
  cudaEvent_t event_;
  bool forked_ = false;
};

}  // namespace pissa::cuda
