// The memory of buffers: what a thread frees, it uses again.
#include <gtest/gtest.h>

#include <cstdint>
#include <new>

#include "pissa/cpu/backend.h"

namespace pissa::test {
namespace {

// Whether the memory of a freed buffer was kept. If it was not, the next one to ask for as much gets it.
bool is_kept(std::int64_t count) {
  void* freed;
  {
    const cpu::Buffer buffer(1, count);
    freed = buffer.view().data;
  }
  const auto bytes = static_cast<std::size_t>(count) * sizeof(float);
  void* other = ::operator new(bytes, std::align_val_t{64});
  const cpu::Buffer again(1, count);
  ::operator delete(other, std::align_val_t{64});
  return again.view().data == freed;
}

TEST(BufferTest, MemoryIsUsedAgainWhateverWasFreedBefore) {
  EXPECT_TRUE(is_kept(4096));
  for (std::int64_t size = 1; size <= 50; ++size) cpu::Buffer(1, 16 * size);  // more blocks than are kept
  EXPECT_TRUE(is_kept(5008));
  for (std::int64_t size = 1; size <= 9; ++size) cpu::Buffer(size, 1 << 19);  // more bytes
  EXPECT_TRUE(is_kept(6016));
}

}  // namespace
}  // namespace pissa::test
