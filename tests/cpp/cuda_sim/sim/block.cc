// Under ThreadSanitizer this file is not instrumented (CMakeLists.txt), so it keeps to plain arrays: templates of the
// library would be shared with files that are.
#include "sim/block.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "sim/control.h"
#include "sim/device.h"
#include "sim/fiber.h"
#include "sim/memory.h"
#include "sim/modes.h"
#include "sim/order.h"
#include "sim/sanitizers.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace cuda_sim::detail {
namespace {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

/// Threads that wait for one another at one place of the source.
struct Meeting {
  int arrived = 0;
  unsigned generation = 0;
  const char* operation = nullptr;
  unsigned line = 0;
  const char* file = nullptr;
};

/// What a lane gives to the others, and for a matrix product what it gets.
union Slot {
  std::uint64_t bits;
  unsigned fragments[6];
  double sums[4];
};

struct Warp {
  Meeting meeting;
  int lanes;
  int exited;
  // A lane may give to the next collective while others still read from the last one; it cannot be two ahead.
  Slot slots[2][kWarpSize];
};

struct Thread {
  Fiber fiber;
  uint3 index;
  bool exited;
};

struct Shared {
  const void* key;
  void* memory;
  std::size_t bytes;
};

constexpr int kMaxShared = 16;
constexpr int kOrders = 16 * (1 + kMaxWarps);

struct Block {
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  Meeting barrier;
  int count = 0;    // threads
  int live = 0;     // of them, not yet exited
  int created = 0;  // fibers
  int running = 0;
  int ready[kMaxThreads];  // the last one is next
  int ready_count = 0;
  int turn = 0;
  Shared shared[kMaxShared];
  int shared_count = 0;
  // Addresses that stand for meetings, two for each, so that a thread that is late does not acquire what others did
  // after the meeting. Fresh for each block: meetings of one do not order another.
  char* orders = new char[kOrders];
  char starts, ends;  // of the kernel
  const std::function<void()>* body = nullptr;
  bool ends_at_wait = false;  // for earlier kernels
  std::int64_t loaded = 0;    // bytes
  Fiber host;
};

/// Ends a thread from within.
struct ThreadEnd {};

Block& block = *new Block;  // never destroyed: its fibers never end

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "cuda_sim: block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z, what);
  std::abort();
}

void describe(const char* who, int index, const Meeting& meeting, int expected) {
  if (meeting.arrived == 0) return;
  std::fprintf(stderr, "cuda_sim:   %s %d: %d of %d threads wait in %s, %s:%u\n", who, index, meeting.arrived, expected,
               meeting.operation, meeting.file, meeting.line);
}

[[noreturn]] void die_waiting() {
  std::fprintf(stderr, "cuda_sim: deadlock: %d threads of the block live, and wait for different things:\n",
               block.live);
  describe("block", 0, block.barrier, block.live);
  for (int i = 0; i * kWarpSize < block.count; ++i) {
    describe("warp", i, block.warps[i].meeting, block.warps[i].lanes);
  }
  die("deadlock");
}

Warp& warp_of_running() { return block.warps[block.running / kWarpSize]; }

void* order_of_barrier() { return block.orders + 8 * (block.barrier.generation & 1); }
void* order_of_warp(const Warp& warp) {
  return block.orders + 16 * (1 + (&warp - block.warps)) + 8 * (warp.meeting.generation & 1);
}

/// Puts threads that live, `count` from `first`, before those that are ready, in the order whose turn it is.
void make_ready(int first, int count) {
  const auto push = [first](std::uint64_t i) {
    const int thread = first + static_cast<int>(i);
    if (!block.threads[thread].exited) block.ready[block.ready_count++] = thread;
  };
  switch (block.turn++ % 3) {
    case 0:  // forward: pushed last is run first
      for (int i = count - 1; i >= 0; --i) push(static_cast<std::uint64_t>(i));
      break;
    case 1:
      for (int i = 0; i < count; ++i) push(static_cast<std::uint64_t>(i));
      break;
    default:
      visit_shuffled(static_cast<std::uint64_t>(count), push);
  }
}

/// Lets another thread run; returns when this one is to go on.
void yield() {
  if (block.ready_count == 0) die_waiting();
  const int from = block.running;
  const int to = block.ready[--block.ready_count];
  if (to == from) return;
  block.running = to;
  threadIdx = block.threads[to].index;
  switch_fiber(block.threads[from].fiber, block.threads[to].fiber);
}

void arrive(Meeting& meeting, const char* operation, Where where) {
  if (meeting.arrived++ == 0) {
    meeting.operation = operation;
    meeting.line = where.line();
    meeting.file = where.file_name();
    return;
  }
  if (meeting.operation != operation || meeting.line != where.line()) {
    std::fprintf(stderr, "cuda_sim: others wait in %s, %s:%u, this thread in %s, %s:%u\n", meeting.operation,
                 meeting.file, meeting.line, operation, where.file_name(), where.line());
    die("a collective in divergent code");
  }
}

void leave(Meeting& meeting) {
  meeting.arrived = 0;
  ++meeting.generation;
}

/// Brings the lanes of the warp together: `give` puts something into the lane's slot, `combine` runs once, when all
/// have given, and the slots are returned when the lane goes on.
template <class Give, class Combine>
Slot* meet(unsigned mask, const char* operation, Where where, Give give, Combine combine) {
  Warp& warp = warp_of_running();
  if (mask != kFullMask) die("a collective of a warp with a mask that is not full");
  if (warp.lanes != kWarpSize) die("a collective in a warp of fewer than 32 threads");
  if (warp.exited > 0) die("a collective in a warp with lanes that have exited");
  arrive(warp.meeting, operation, where);
  Slot* slots = warp.slots[warp.meeting.generation & 1];
  void* order = order_of_warp(warp);
  give(slots[block.running % kWarpSize]);
  tsan_release(order);
  if (warp.meeting.arrived == kWarpSize) {
    combine(slots);
    leave(warp.meeting);
    make_ready(block.running / kWarpSize * kWarpSize, kWarpSize);
  }
  yield();
  tsan_acquire(order);
  return slots;
}

constexpr auto kNothing = [](auto&&) {};

void release_barrier_if_complete() {
  if (block.barrier.arrived != block.live) return;
  leave(block.barrier);
  make_ready(0, block.count);
}

void exit_thread() {
  Warp& warp = warp_of_running();
  if (warp.meeting.arrived > 0) {
    describe("warp", block.running / kWarpSize, warp.meeting, warp.lanes);
    die("it ends while other lanes of its warp wait for it");
  }
  ++warp.exited;
  block.threads[block.running].exited = true;
  tsan_release(&block.ends);
  if (--block.live == 0) {
    switch_fiber(block.threads[block.running].fiber, block.host);
    return;  // in the next block
  }
  if (block.barrier.arrived > 0) release_barrier_if_complete();
  yield();
}

void thread_main() {
  enter_fiber();
  for (;;) {
    tsan_acquire(&block.starts);
    try {
      (*block.body)();
      if (block.ends_at_wait) die("it may start before an earlier kernel has ended, and does not wait for that");
    } catch (const ThreadEnd&) {
    }
    exit_thread();
  }
}

void start_threads(dim3 size) {
  const int count = static_cast<int>(size.x * size.y * size.z);
  while (block.created < count) create_fiber(block.threads[block.created++].fiber, thread_main);
  block.count = block.live = count;
  block.ready_count = 0;
  for (int i = 0; i < count; ++i) {
    const auto index = static_cast<unsigned>(i);
    block.threads[i].index = {index % size.x, index / size.x % size.y, index / size.x / size.y};
    block.threads[i].exited = false;
  }
  for (int i = 0; i * kWarpSize < count; ++i) {
    Warp& warp = block.warps[i];
    warp.lanes = count - i * kWarpSize < kWarpSize ? count - i * kWarpSize : kWarpSize;
    warp.exited = 0;
  }
  // Not from where the last block ended: with as many barriers in each, all would have the same order.
  block.turn = static_cast<int>(next_random() % 3);
  make_ready(0, count);
}

void forget_shared() {
  const TsanForget forget;
  for (int i = 0; i < block.shared_count; ++i) std::free(block.shared[i].memory);
  block.shared_count = 0;
}

void run_block(dim3 size) {
#ifdef CUDA_SIM_TSAN
  delete[] block.orders;
  block.orders = new char[kOrders];
#endif
  start_threads(size);
  block.running = block.ready[--block.ready_count];
  threadIdx = block.threads[block.running].index;
  switch_fiber(block.host, block.threads[block.running].fiber);
  forget_shared();
}

// Products of bfloat16 or half are exact in double, and so are sums of 16 of them that do not span 53 bits.
double decode(unsigned bits, bool bf16) {
  if (bf16) return std::bit_cast<float>(bits << 16);
  const int exponent = bits >> 10 & 31;
  const unsigned fraction = bits & 0x3ff;
  double magnitude;
  if (exponent == 31) {
    magnitude = fraction ? __builtin_nan("") : __builtin_inf();
  } else if (exponent == 0) {
    magnitude = fraction * 0x1p-24;
  } else {
    // (1 + fraction / 1024) * 2^(exponent - 15), built from its bits
    magnitude =
        std::bit_cast<double>(std::uint64_t{fraction} << 42 | static_cast<std::uint64_t>(exponent + 1008) << 52);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

constexpr int kM = 16, kN = 8, kK = 16;

/// The product of the fragments in all slots, each lane's part of it in its slot. A lane has rows g and g + 8 of a and
/// of the product, column g of b, with g its number in fours; of the other dimension pairs, by its number q among four.
void multiply(Slot* slots, bool bf16) {
  double a[kM][kK], b[kK][kN], product[kM][kN] = {};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane >> 2, q = lane & 3;
    const unsigned* fragments = slots[lane].fragments;
    for (int half = 0; half < 2; ++half) {  // of a register, the lower first
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i & 1)][2 * q + 8 * (i >> 1) + half] = decode(fragments[i] >> 16 * half & 0xffff, bf16);
      }
      for (int i = 0; i < 2; ++i) {
        b[2 * q + 8 * i + half][g] = decode(fragments[4 + i] >> 16 * half & 0xffff, bf16);
      }
    }
  }
  for (int row = 0; row < kM; ++row) {
    for (int k = 0; k < kK; ++k) {
      for (int col = 0; col < kN; ++col) product[row][col] += a[row][k] * b[k][col];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane >> 2, q = lane & 3;
    for (int i = 0; i < 4; ++i) slots[lane].sums[i] = product[g + 8 * (i >> 1)][2 * q + (i & 1)];
  }
}

}  // namespace

int lane() { return block.running % kWarpSize; }

void sync_threads(Where where) {
  arrive(block.barrier, "__syncthreads", where);
  void* order = order_of_barrier();
  tsan_release(order);
  release_barrier_if_complete();
  yield();
  tsan_acquire(order);
}

std::uint64_t shuffle(unsigned mask, std::uint64_t bits, int source, Where where) {
  const Slot* slots = meet(mask, "a shuffle", where, [bits](Slot& slot) { slot.bits = bits; }, kNothing);
  source += library_modes.defect == Defect::next_lane;
  return slots[source & (kWarpSize - 1)].bits;
}

void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool bf16, Where where) {
  const Defect defect = library_modes.defect;
  const auto give = [&](Slot& slot) {
    for (int i = 0; i < 4; ++i) slot.fragments[i] = a[defect == Defect::parts_of_a && i < 2 ? 1 - i : i];
    for (int i = 0; i < 2; ++i) slot.fragments[4 + i] = b[defect == Defect::parts_of_b ? 1 - i : i];
  };
  bf16 = bf16 != (defect == Defect::other_half);
  const Slot* slots =
      meet(kFullMask, bf16 ? "mma (bf16)" : "mma (f16)", where, give, [bf16](Slot* all) { multiply(all, bf16); });
  const double* sums = slots[lane()].sums;
  for (int i = 0; i < 4; ++i) {
    if (defect == Defect::sums_lost && i >= 2) continue;
    d[i] = static_cast<float>(d[i] + sums[defect == Defect::sums_swapped && i < 2 ? 1 - i : i]);
  }
}

void* shared_memory(const void* key, std::size_t bytes, std::size_t alignment) {
  std::size_t total = bytes;
  for (int i = 0; i < block.shared_count; ++i) {
    if (block.shared[i].key == key) return block.shared[i].memory;
    total += block.shared[i].bytes;
  }
  if (total > kMaxSharedBytes) die("more than 48 KiB of shared memory");
  if (block.shared_count == kMaxShared) die("too many variables in shared memory");
  const TsanForget forget;
  void* memory = nullptr;  // from the heap, so that AddressSanitizer sees an overrun
  if (posix_memalign(&memory, alignment < 16 ? 16 : alignment, bytes) != 0) die("no memory");
  std::memset(memory, 0xff, bytes);
  block.shared[block.shared_count++] = {key, memory, bytes};
  return memory;
}

void run_grid(dim3 grid, dim3 size, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = size;
  block.body = &thread;
  adopt_host(block.host);
  tsan_release(&block.starts);
  const std::uint64_t count = std::uint64_t{grid.x} * grid.y * grid.z;
  visit_shuffled(count, [&](std::uint64_t index) {
    blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    run_block(size);
  });
  tsan_acquire(&block.ends);
}

void run_until_wait(dim3 grid, dim3 size, const std::function<void()>& thread) {
  block.ends_at_wait = true;
  run_grid(grid, size, thread);
  block.ends_at_wait = false;
}

}  // namespace cuda_sim::detail

namespace cuda_sim {

void wait_for_earlier_kernels() {
  if (detail::block.ends_at_wait) throw detail::ThreadEnd{};
}

void prefetch(const void* address) { detail::require_allocated(address, 1, "prefetch"); }

void count_loaded(std::size_t bytes) { detail::block.loaded += static_cast<std::int64_t>(bytes); }
std::int64_t loaded_bytes() { return detail::block.loaded; }
void reset_loaded_bytes() { detail::block.loaded = 0; }

}  // namespace cuda_sim
