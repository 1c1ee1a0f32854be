#include "sim/capture.h"

#include <algorithm>
#include <utility>

#include "cuda_runtime_api.h"
#include "sim/memory.h"
#include "sim/order.h"
#include "sim/runtime.h"
#include "sim/stream.h"

struct CUgraph_st {
  std::shared_ptr<const cuda_sim::detail::Graph> graph;
};
struct CUgraphExec_st {
  std::shared_ptr<const cuda_sim::detail::Graph> graph;
};

namespace cuda_sim::detail {
namespace {

std::vector<std::shared_ptr<Capture>>& captures() {  // that go on
  static auto& result = *new std::vector<std::shared_ptr<Capture>>;
  return result;
}

thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

template <class Predicate>
cudaError_t invalidate_if(Predicate forbids, cudaError_t error) {
  cudaError_t result = cudaSuccess;
  for (const auto& capture : captures()) {
    if (!forbids(*capture)) continue;
    capture->valid = false;
    result = error;
  }
  return result;
}

}  // namespace

Graph::~Graph() {
  for (void* memory : memory_) {
    retire(memory);
    release(memory);
  }
}

bool Graph::owns(const void* memory) const { return std::ranges::find(memory_, memory) != memory_.end(); }

bool Graph::is_joined() const {
  std::vector<std::size_t> reached(lanes_.size(), 0), looked(lanes_.size(), 0);
  reached[0] = lanes_[0].size();
  for (std::size_t lane = 0; lane < lanes_.size();) {
    if (looked[lane] == reached[lane]) {
      ++lane;
      continue;
    }
    const Step& step = lanes_[lane][looked[lane]++];
    if (step.work) continue;
    reached[step.lane] = std::max(reached[step.lane], step.position);
    lane = std::min(lane, step.lane);
  }
  for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
    if (reached[lane] != lanes_[lane].size()) return false;
  }
  return true;
}

struct Graph::Run {
  const std::vector<std::vector<Step>>& lanes;
  std::vector<std::size_t> done = std::vector<std::size_t>(lanes.size(), 0);

  void until(std::size_t lane, std::size_t position) {
    while (done[lane] < position) {
      const Step& step = lanes[lane][done[lane]++];
      if (step.work) {
        step.work();
      } else {
        until(step.lane, step.position);
      }
    }
  }
};

void Graph::run() const {
  Run run{lanes_};
  visit_shuffled(lanes_.size(), [&](std::uint64_t lane) { run.until(lane, lanes_[lane].size()); });
}

cudaError_t check_unsafe_call() {
  const auto forbids = [](const Capture& capture) {
    if (capture.thread == std::this_thread::get_id()) {
      return capture.mode != cudaStreamCaptureModeRelaxed && mode_of_thread != cudaStreamCaptureModeRelaxed;
    }
    return capture.mode == cudaStreamCaptureModeGlobal && mode_of_thread == cudaStreamCaptureModeGlobal;
  };
  return invalidate_if(forbids, cudaErrorStreamCaptureUnsupported);
}

cudaError_t check_wait_for_device() {
  return invalidate_if([](const Capture&) { return true; }, cudaErrorStreamCaptureUnsupported);
}

}  // namespace cuda_sim::detail

using namespace cuda_sim::detail;

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const Call call;
  if (call.failed()) return call.error();
  if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
  if (!stream) return cudaErrorStreamCaptureUnsupported;
  if (captured(stream).capture) return cudaErrorIllegalState;
  const auto capture = std::make_shared<Capture>(Capture{mode});
  join(stream, capture);
  captures().push_back(capture);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Call call;
  if (call.failed()) return call.error();
  if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
  *graph = nullptr;
  const auto [capture, lane] = captured(stream);
  if (!capture || lane != 0) return cudaErrorIllegalState;
  capture->ended = true;
  leave(*capture);
  std::erase(captures(), capture);
  if (!capture->valid) return cudaErrorStreamCaptureInvalidated;
  if (!capture->graph->is_joined()) return cudaErrorStreamCaptureUnjoined;
  *graph = new CUgraph_st{capture->graph};
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Call call;
  if (call.failed()) return call.error();
  if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
  const auto& capture = captured(stream).capture;
  *status = !capture         ? cudaStreamCaptureStatusNone
            : capture->valid ? cudaStreamCaptureStatusActive
                             : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const Call call;
  if (call.failed()) return call.error();
  std::swap(*mode, mode_of_thread);
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  const Call call;
  if (call.failed()) return call.error();
  *exec = new CUgraphExec_st{graph->graph};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const Call call;
  if (call.failed()) return call.error();
  if (const cudaError_t error = check_stream(stream)) return error;
  enqueue(stream, [graph = exec->graph] { graph->run(); });
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Call call(Call::kNeverFails);
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  const Call call(Call::kNeverFails);
  delete exec;
  return cudaSuccess;
}
