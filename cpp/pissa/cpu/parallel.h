// Work distributed to threads, if there is enough of it.
#pragma once

#include <cstdint>

#include "pissa/cpu/executor.h"

namespace pissa::cpu {

/// Work below this many multiply-adds or elements, about 50 us, is not worth waking other threads for.
inline constexpr std::int64_t kSerialWork = 1 << 20;

template <class F>
void parallel_for(const Executor& executor, std::int64_t count, std::int64_t work, F task) {
  if (work >= kSerialWork) return executor.parallel_for(count, task);
  for (std::int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace pissa::cpu
