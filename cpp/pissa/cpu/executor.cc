#include "pissa/cpu/executor.h"

#if defined(_WIN32)
#include <windows.h>
#endif

#include <fstream>
#include <set>
#include <string>
#include <vector>

namespace pissa::cpu {

#if defined(_WIN32)
// Windows tells each core's class of efficiency: of cores of one kind 0.
bool cores_differ() {
  static const bool differ = [] {
    DWORD bytes = 0;
    GetLogicalProcessorInformationEx(RelationProcessorCore, nullptr, &bytes);
    std::vector<char> cores(bytes);
    using Core = SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX;
    if (!GetLogicalProcessorInformationEx(RelationProcessorCore, reinterpret_cast<Core*>(cores.data()), &bytes))
      return false;
    std::set<int> classes;
    for (DWORD at = 0; at < bytes;) {
      const auto* core = reinterpret_cast<const Core*>(cores.data() + at);
      classes.insert(core->Processor.EfficiencyClass);
      at += core->Size;
    }
    return classes.size() > 1;
  }();
  return differ;
}
#else
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
#endif

}  // namespace pissa::cpu
