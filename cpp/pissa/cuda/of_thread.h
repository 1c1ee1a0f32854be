// Objects that a thread keeps: library handles, a second stream, plans of products.
#pragma once

#include <cstddef>
#include <deque>
#include <mutex>
#include <vector>

namespace pissa::cuda {

/// An object that a thread keeps for each device, from its first use on; it stays where it is when objects of more
/// devices follow. It is never destroyed, because the driver may be gone before it at the end of the process. When the
/// thread has ended, its objects serve the next new one.
template <class Kept>
class OfThread {
 public:
  static Kept& at(int device) {
    thread_local const OfThread mine;
    std::deque<Kept>& kept = *mine.kept_;
    if (kept.size() <= static_cast<std::size_t>(device)) kept.resize(static_cast<std::size_t>(device) + 1);
    return kept[static_cast<std::size_t>(device)];
  }

 private:
  struct Free {
    std::mutex mutex;
    std::vector<std::deque<Kept>*> kept;
  };
  static Free& free() {
    static Free& free = *new Free;
    return free;
  }

  OfThread() {
    const std::lock_guard lock(free().mutex);
    if (free().kept.empty()) free().kept.push_back(new std::deque<Kept>);
    kept_ = free().kept.back();
    free().kept.pop_back();
  }
  ~OfThread() {
    const std::lock_guard lock(free().mutex);
    free().kept.push_back(kept_);
  }

  std::deque<Kept>* kept_;
};

}  // namespace pissa::cuda
