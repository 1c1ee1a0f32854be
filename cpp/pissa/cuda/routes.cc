#include "pissa/cuda/routes.h"

#include <array>
#include <atomic>
#include <cstddef>
#include <iterator>

namespace pissa::cuda {
namespace {

constexpr std::size_t kDevices = 64;  // those beyond share a state

struct State {
  std::atomic<bool> tested = false;
  std::array<std::atomic<bool>, std::size(kRoutes)> closed = {};
};

State& state_of(int device) {
  static std::array<State, kDevices + 1> states;
  const auto index = static_cast<std::size_t>(device);
  return states[index < kDevices ? index : kDevices];
}

}  // namespace

const char* name(Route route) {
  constexpr const char* kNames[] = {"early_launch", "lt", "few_rows", "group"};
  return kNames[static_cast<int>(route)];
}

const char* instead(Route route) {
  constexpr const char* kInstead[] = {"kernels wait for each other", "cuBLAS's handle multiplies",
                                      "cuBLAS multiplies, and weights are decoded into memory first",
                                      "experts are computed one by one"};
  return kInstead[static_cast<int>(route)];
}

bool is_open(int device, Route route) {
  return !state_of(device).closed[static_cast<std::size_t>(route)].load(std::memory_order_relaxed);
}

void set_open(int device, Route route, bool open) {
  state_of(device).closed[static_cast<std::size_t>(route)].store(!open, std::memory_order_relaxed);
}

bool is_tested(int device) { return state_of(device).tested.load(std::memory_order_acquire); }

void set_tested(int device, bool tested) { state_of(device).tested.store(tested, std::memory_order_release); }

}  // namespace pissa::cuda
