// A device's memory: an arena that the host cannot touch. Fresh memory is NaN. Reading or writing outside of what is
// allocated is an error under AddressSanitizer; without it, writes near an allocation are found when it is freed or
// something waits for the device.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_sim::detail {

/// While it lives, a device's memory can be touched, as by work of the device; -1: none.
class DeviceOpen {
 public:
  explicit DeviceOpen(int device);
  DeviceOpen(const DeviceOpen&) = delete;
  ~DeviceOpen();

 private:
  int device_;
};

/// While it lives, a device's memory cannot be touched, although a DeviceOpen lives.
class DeviceShut {
 public:
  explicit DeviceShut(int device);
  DeviceShut(const DeviceShut&) = delete;
  ~DeviceShut();

 private:
  int device_;
};

/// Of the current one.
std::size_t memory_of_device();

/// Null where there is no room.
void* allocate(std::size_t bytes, int device);

/// The end of an allocation in two steps: that it was asked for, from when it counts as freed and no call takes the
/// pointer any more, and that the stream has come there. Both say whether `pointer` was such an allocation.
bool retire(void* pointer);
bool release(void* pointer);

/// For memory of a graph, whose allocation stays: what an allocation and its end do to the bytes.
void make_fresh(void* pointer);
void make_inaccessible(void* pointer);

/// The device to which the address belongs; -1: to the host.
int device_of(const void* pointer);
inline bool is_device(const void* pointer) { return device_of(pointer) >= 0; }

/// Whether all bytes lie in one allocation that no call has freed.
bool is_allocated(const void* pointer, std::size_t bytes);

/// Aborts unless all bytes lie in one allocation, when the work of `what` runs, on the device whose work it is.
void require_allocated(const void* pointer, std::size_t bytes, const char* what);
void require_allocated(const void* pointer, std::size_t bytes, const char* what, int device);

/// Aborts unless the address is a multiple of `bytes`, by which `what` is loaded.
void require_aligned(const void* pointer, std::uint32_t bytes, const char* what);

/// Aborts if something was written near an allocation.
void check_redzones();

}  // namespace cuda_sim::detail
