// Streams that are captured: their work is recorded, and runs whenever the graph that it becomes is launched.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "driver_types.h"

namespace cuda_sim::detail {

/// Work of some streams, a lane for each. Work of one lane runs in order; of several, as far as events demanded.
class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  ~Graph();

  void add(std::size_t lane, std::function<void()> work) { lanes_[lane].push_back({std::move(work), 0, 0}); }
  /// What follows in `lane` runs after what `other` has so far up to `position`.
  void add_wait(std::size_t lane, std::size_t other, std::size_t position) {
    lanes_[lane].push_back({{}, other, position});
  }
  std::size_t add_lane() {
    lanes_.emplace_back();
    return lanes_.size() - 1;
  }
  std::size_t position(std::size_t lane) const { return lanes_[lane].size(); }

  /// Memory that is allocated in the graph is its own until it ends: at one address in every run.
  void own(void* memory) { memory_.push_back(memory); }
  bool owns(const void* memory) const;

  /// Whether the first lane waits, in the end, for the work of all.
  bool is_joined() const;

  void run() const;

 private:
  struct Step {
    std::function<void()> work;  // or, where there is none, what is waited for
    std::size_t lane, position;
  };
  struct Run;
  std::vector<std::vector<Step>> lanes_;
  std::vector<void*> memory_;
};

/// A graph while it is recorded.
struct Capture {
  cudaStreamCaptureMode mode;
  std::thread::id thread = std::this_thread::get_id();  // that began it
  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
  bool valid = true;
  bool ended = false;
};

/// What a call of a kind that captures forbid has to return; one that is forbidden ends the captures that forbid it.
/// Potentially unsafe ones, to which the making of streams and events is counted, are forbidden by a capture that is
/// not relaxed, unless the thread is; those that wait for the device by any.
cudaError_t check_unsafe_call();
cudaError_t check_wait_for_device();

}  // namespace cuda_sim::detail
