#include "pissa/cpu/executor.h"

#include <fstream>
#include <set>
#include <string>

namespace pissa::cpu {

// Linux lists the slower cores of Intel's hybrid processors; of ARM's, it tells each core's capacity, 1024 for the
// fastest.
bool cores_differ() {
  static const bool differ = [] {
    if (std::ifstream("/sys/devices/cpu_atom/cpus") && std::ifstream("/sys/devices/cpu_core/cpus")) return true;
    std::set<std::string> capacities;
    std::string capacity;
    for (int core = 0;; ++core) {
      std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(core) + "/cpu_capacity");
      if (!(file >> capacity)) break;
      capacities.insert(capacity);
    }
    return capacities.size() > 1;
  }();
  return differ;
}

}  // namespace pissa::cpu
