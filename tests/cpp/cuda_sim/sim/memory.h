// The device's memory: an arena that the host cannot touch. Fresh memory is NaN. Reading or writing outside of what is
// allocated is an error under AddressSanitizer; without it, writes near an allocation are found when it is freed or
// something waits for the device.
#pragma once

#include <cstddef>

namespace cuda_sim::detail {

/// While it lives, the memory can be touched, as by work of the device.
class DeviceOpen {
 public:
  DeviceOpen();
  DeviceOpen(const DeviceOpen&) = delete;
  ~DeviceOpen();
};

std::size_t memory_of_device();

/// Null where there is no room.
void* allocate(std::size_t bytes);

/// The end of an allocation in two steps: that it was asked for, from when it counts as freed and no call takes the
/// pointer any more, and that the stream has come there. Both say whether `pointer` was such an allocation.
bool retire(void* pointer);
bool release(void* pointer);

/// For memory of a graph, whose allocation stays: what an allocation and its end do to the bytes.
void make_fresh(void* pointer);
void make_inaccessible(void* pointer);

/// Whether the address is one of the device's at all.
bool is_device(const void* pointer);

/// Whether all bytes lie in one allocation that no call has freed.
bool is_allocated(const void* pointer, std::size_t bytes);

/// Aborts unless all bytes lie in one allocation, when the work of `what` runs.
void require_allocated(const void* pointer, std::size_t bytes, const char* what);

/// Aborts if something was written near an allocation.
void check_redzones();

}  // namespace cuda_sim::detail
