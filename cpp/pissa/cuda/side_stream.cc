#include "pissa/cuda/side_stream.h"

namespace pissa::cuda {

SideStream::SideStream(const Context& main) : main_(main) {
  const Context::Side side = main.side();
  side_ = {.device = main.device, .stream = side.stream};
  event_ = side.event;
}

// After an error it may be that nothing can be queued any more: then the host waits, before memory is freed.
SideStream::~SideStream() {
  if (forked_ && !succeeded(order(side_.stream, main_.stream))) cudaStreamSynchronize(side_.stream);
}

void SideStream::fork() {
  check(order(main_.stream, side_.stream), main_, "forking a stream");
  forked_ = true;
}

void SideStream::join() {
  if (!forked_) return;
  check(order(side_.stream, main_.stream), main_, "joining a stream");
  forked_ = false;
}

// The event stands for what is queued now; it may be recorded again at once.
cudaError_t SideStream::order(cudaStream_t first, cudaStream_t then) const {
  const cudaError_t recorded = cudaEventRecord(event_, first);
  return succeeded(recorded) ? cudaStreamWaitEvent(then, event_, 0) : recorded;
}

}  // namespace pissa::cuda
