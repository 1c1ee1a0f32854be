// What was asked of the device, call by call: products and factorisations of the libraries with their sizes, launches,
// memory, copies, waits. A call that fails, or has nothing to do, is not there.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

namespace cuda_sim {

enum class Kind { launch, library, allocation, copy_to_device, copy_to_host, wait };

/// In which a library multiplies: that of the operands, which bf16 and f16 sum up in f32.
enum class Type { none, f64, f32, bf16, f16 };

struct Entry {
  Kind kind;
  std::string_view name;  // the function; of a launch "cudaLaunchKernelEx", of a wait what waited
  Type type = Type::none;
  std::int64_t m = 0, n = 0, k = 0;  // as the function takes them, column-major
  std::int64_t batch = 1;
  double flops = 0;              // of all of the batch, by the usual formulas (sim/library.h)
  double bytes = 0;              // allocated or copied
  const void* kernel = nullptr;  // of a launch: the function that the grid runs
  std::array<unsigned, 3> grid = {}, block = {};
  bool dependent = false;  // of a launch: whether it may start before the kernel before it has ended

  bool operator==(const Entry&) const = default;
};

struct Sum {
  std::int64_t calls = 0;
  double flops = 0, bytes = 0;
};

/// All entries since the start or the last reset, in the order of the calls.
std::vector<Entry> ledger();
void reset_ledger();

/// Of the entries for which `counts` is true.
Sum sum_if(const std::function<bool(const Entry&)>& counts);

namespace detail {
using cuda_sim::Kind, cuda_sim::Type;

void record(const Entry& entry);
}  // namespace detail

}  // namespace cuda_sim
