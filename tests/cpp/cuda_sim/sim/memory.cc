#include "sim/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>

#include "sim/control.h"
#include "sim/runtime.h"
#include "sim/sanitizers.h"
#include "sim/stream.h"

namespace cuda_sim::detail {
namespace {

constexpr std::size_t kArenaBytes = std::size_t{1} << 30;
constexpr std::size_t kDryArenaBytes = std::size_t{512} << 30;
constexpr std::size_t kDryMemory = std::size_t{80} << 30;
// The arena grows by huge pages: opening and closing one of small pages takes a millisecond for each 10 MiB in use.
constexpr std::size_t kPage = std::size_t{2} << 20;
constexpr std::size_t kAlignment = 256;  // CUDA's
constexpr std::size_t kRedzone = 256;
constexpr std::size_t kQuarantineBytes = std::size_t{16} << 20;
constexpr unsigned char kFresh = 0xff;   // NaN in every format
constexpr unsigned char kCanary = 0x7f;  // huge or NaN, and not what fresh memory would have been copied from

struct Allocation {
  std::size_t bytes;
  std::size_t span;  // with what follows up to the next one: at least kRedzone
  bool retired;
};

struct Arena {
  const std::size_t capacity;
  const bool dry;  // addresses alone: it is never accessible
  unsigned char* base;
  std::size_t reached = 0;  // beyond it nothing was ever allocated; it is never accessible
  int open = 0;
  std::map<std::size_t, Allocation> allocations;  // by offset
  std::map<std::size_t, std::size_t> gaps;        // spans below `reached` that may be used again, by offset
  // Freed memory is not used again at once, or a late access would find another allocation there.
  std::deque<std::pair<std::size_t, std::size_t>> quarantine;
  std::size_t quarantine_bytes = 0;
  const std::size_t limit;
  std::size_t held = 0;    // not yet freed by a stream
  std::size_t in_use = 0;  // not yet asked to be freed
  std::size_t peak = 0;

  Arena(std::size_t capacity_, std::size_t limit_, bool dry_) : capacity(capacity_), dry(dry_), limit(limit_) {
    void* pages = mmap(nullptr, capacity + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) {
      std::perror("cuda_sim: no memory for the device");
      std::abort();
    }
    const std::size_t past = reinterpret_cast<std::uintptr_t>(pages) % kPage;
    base = static_cast<unsigned char*>(pages) + (past == 0 ? 0 : kPage - past);
    if (!dry) madvise(base, capacity, MADV_HUGEPAGE);
    grow(kPage);
    allocations[take(kRedzone)] = {0, kRedzone, false};  // what lies before the first one
    if (kAsan || dry) return;
    protect(reached, PROT_READ | PROT_WRITE);
    fill_redzone(0, kRedzone);
    protect(reached, PROT_NONE);
  }

  void protect(std::size_t bytes, int access) const {
    if (mprotect(base, bytes, access) != 0) {
      std::perror("cuda_sim: mprotect");
      std::abort();
    }
  }

  /// Adds a gap of at least `span` at the end; false where there is no room.
  bool grow(std::size_t span) {
    const std::size_t bytes = (span + kPage - 1) / kPage * kPage;
    if (bytes > capacity - reached) return false;
    const std::size_t offset = reached;
    reached += bytes;
    if (open > 0) protect(reached, PROT_READ | PROT_WRITE);
    if (!dry) poison(base + offset, bytes);
    give_back(offset, bytes);
    return true;
  }

  void fill_redzone(std::size_t offset, std::size_t bytes) {
    if (kAsan) {
      poison(base + offset, bytes);
    } else {
      std::memset(base + offset, kCanary, bytes);
    }
  }

  static constexpr std::size_t kNone = ~std::size_t{0};

  /// Offset of a span in the first gap that has it.
  std::size_t take(std::size_t span) {
    for (auto gap = gaps.begin(); gap != gaps.end(); ++gap) {
      if (gap->second < span) continue;
      const auto [offset, size] = *gap;
      gaps.erase(gap);
      if (size > span) gaps[offset + span] = size - span;
      return offset;
    }
    return kNone;
  }

  void give_back(std::size_t offset, std::size_t span) {
    auto next = gaps.lower_bound(offset);
    if (next != gaps.end() && offset + span == next->first) {
      span += next->second;
      next = gaps.erase(next);
    }
    if (next != gaps.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        before->second += span;
        return;
      }
    }
    gaps[offset] = span;
  }

  void leave_quarantine(std::size_t until_bytes) {
    while (quarantine_bytes > until_bytes) {
      const auto [offset, span] = quarantine.front();
      quarantine.pop_front();
      quarantine_bytes -= span;
      give_back(offset, span);
    }
  }

  bool has(const void* pointer) const { return offset_of(pointer) < capacity; }

  std::uintptr_t offset_of(const void* pointer) const {
    return reinterpret_cast<std::uintptr_t>(pointer) - reinterpret_cast<std::uintptr_t>(base);
  }

  /// The allocation that has all of the bytes.
  const Allocation* around(const void* pointer, std::size_t bytes) const {
    const std::size_t offset = offset_of(pointer);
    auto after = allocations.upper_bound(offset);
    if (offset >= capacity || after == allocations.begin()) return nullptr;
    const auto& [start, allocation] = *std::prev(after);
    const std::size_t within = offset - start;
    return within <= allocation.bytes && bytes <= allocation.bytes - within ? &allocation : nullptr;
  }

  /// The canaries behind an allocation, up to the next span.
  void check(std::size_t offset, const Allocation& allocation) const {
    if (kAsan || dry) return;
    const unsigned char* first = base + offset;
    const auto* found = std::find_if(first + allocation.bytes, first + allocation.span,
                                     [](unsigned char byte) { return byte != kCanary; });
    if (found == first + allocation.span) return;
    std::fprintf(stderr,
                 "cuda_sim: something wrote outside of what is allocated, %td bytes after the start of %zu bytes\n",
                 found - first, allocation.bytes);
    std::abort();
  }
};

Arena* arenas[kDevices][2] = {};  // of each device: in earnest, dry; made when they are needed

Arena& arena(int device, bool dry = is_dry()) {
  Arena*& result = arenas[device][dry];
  if (!result) result = dry ? new Arena(kDryArenaBytes, kDryMemory, true) : new Arena(kArenaBytes, kArenaBytes, false);
  return *result;
}

/// Of the current device and the mode that is set.
Arena& arena() { return arena(current_device()); }

/// That a pointer points into, or null.
Arena* arena_of(const void* pointer) {
  for (const auto& both : arenas) {
    for (Arena* arena : both) {
      if (arena && arena->has(pointer)) return arena;
    }
  }
  return nullptr;
}

const Allocation* allocation_around(const void* pointer, std::size_t bytes) {
  const Arena* device = arena_of(pointer);
  return device ? device->around(pointer, bytes) : nullptr;
}

}  // namespace

DeviceOpen::DeviceOpen(int device) : device_(device) {
  if (device < 0) return;
  Arena& opened = arena(device, false);
  if (opened.open++ == 0) opened.protect(opened.reached, PROT_READ | PROT_WRITE);
}
DeviceOpen::~DeviceOpen() {
  if (device_ < 0) return;
  Arena& closed = arena(device_, false);
  if (--closed.open == 0) closed.protect(closed.reached, PROT_NONE);
}

DeviceShut::DeviceShut(int device) : device_(device) {
  Arena& shut = arena(device, false);
  shut.protect(shut.reached, PROT_NONE);
}
DeviceShut::~DeviceShut() {
  Arena& opened = arena(device_, false);
  opened.protect(opened.reached, PROT_READ | PROT_WRITE);
}

std::size_t memory_of_device() { return arena().limit; }

void* allocate(std::size_t bytes, int on) {
  Arena& device = arena(on);
  if (bytes > device.limit || device.held > device.limit - bytes) return nullptr;
  const std::size_t span = (bytes + kAlignment - 1) / kAlignment * kAlignment + kRedzone;
  std::size_t offset = device.take(span);
  if (offset == Arena::kNone) {
    if (!device.grow(span)) device.leave_quarantine(0);
    offset = device.take(span);
  }
  if (offset == Arena::kNone) return nullptr;
  device.allocations[offset] = {bytes, span, false};
  device.held += bytes;
  device.in_use += bytes;
  device.peak = std::max(device.peak, device.in_use);
  if (device.dry) return device.base + offset;
  const DeviceOpen open(on);
  device.fill_redzone(offset + bytes, span - bytes);
  unpoison(device.base + offset, bytes);
  std::memset(device.base + offset, kFresh, bytes);
  return device.base + offset;
}

bool retire(void* pointer) {
  Arena* device = arena_of(pointer);
  if (!device) return false;
  const auto found = device->allocations.find(device->offset_of(pointer));
  if (found == device->allocations.end() || found->second.retired) return false;
  found->second.retired = true;
  device->in_use -= found->second.bytes;
  return true;
}

bool release(void* pointer) {
  Arena* device = arena_of(pointer);
  if (!device) return false;
  const auto found = device->allocations.find(device->offset_of(pointer));
  if (found == device->allocations.end()) return false;
  const auto [offset, allocation] = *found;
  device->held -= allocation.bytes;
  if (device->dry) {
    device->allocations.erase(found);
    device->give_back(offset, allocation.span);
    return true;
  }
  const DeviceOpen open(device_of(pointer));
  device->check(offset, allocation);
  device->allocations.erase(found);
  unpoison(device->base + offset, allocation.bytes);  // of a graph it may be inaccessible
  std::memset(device->base + offset, kFresh, allocation.bytes);
  poison(device->base + offset, allocation.span);
  device->quarantine.emplace_back(offset, allocation.span);
  device->quarantine_bytes += allocation.span;
  device->leave_quarantine(kQuarantineBytes);
  return true;
}

void make_fresh(void* pointer) {
  const std::size_t bytes = allocation_around(pointer, 0)->bytes;
  const DeviceOpen open(device_of(pointer));
  unpoison(pointer, bytes);
  std::memset(pointer, kFresh, bytes);
}

void make_inaccessible(void* pointer) {
  const std::size_t bytes = allocation_around(pointer, 0)->bytes;
  const DeviceOpen open(device_of(pointer));
  std::memset(pointer, kFresh, bytes);
  poison(pointer, bytes);
}

int device_of(const void* pointer) {
  for (int device = 0; device < kDevices; ++device) {
    for (const Arena* arena : arenas[device]) {
      if (arena && arena->has(pointer)) return device;
    }
  }
  return -1;
}

bool is_allocated(const void* pointer, std::size_t bytes) {
  const Allocation* allocation = allocation_around(pointer, bytes);
  return allocation && !allocation->retired;
}

void require_allocated(const void* pointer, std::size_t bytes, const char* what) {
  require_allocated(pointer, bytes, what, running_device());
}

void require_allocated(const void* pointer, std::size_t bytes, const char* what, int device) {
  if (bytes == 0) return;
  if (!allocation_around(pointer, bytes)) {
    std::fprintf(stderr, "cuda_sim: %s touches %zu bytes at %p, not all of which are allocated on the device\n", what,
                 bytes, pointer);
    std::abort();
  }
  if (device_of(pointer) != device) {
    std::fprintf(stderr, "cuda_sim: %s runs on device %d and touches memory of device %d\n", what, device,
                 device_of(pointer));
    std::abort();
  }
}

void require_aligned(const void* pointer, std::uint32_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0) return;
  std::fprintf(stderr, "cuda_sim: %s at %p, a misaligned address: it is loaded by %u bytes\n", what, pointer, bytes);
  std::abort();
}

void check_redzones() {
  if (is_dry()) return;
  for (int device = 0; device < kDevices; ++device) {
    const Arena* arena = arenas[device][false];
    if (!arena) continue;
    const DeviceOpen open(device);
    for (const auto& [offset, allocation] : arena->allocations) arena->check(offset, allocation);
  }
}

}  // namespace cuda_sim::detail

namespace cuda_sim {

std::size_t bytes_in_use() { return detail::arena().in_use; }
std::size_t peak_bytes() { return detail::arena().peak; }
void reset_peak_bytes() { detail::arena().peak = detail::arena().in_use; }

}  // namespace cuda_sim
