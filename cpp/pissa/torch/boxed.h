// PISSA_BOX: a function as the kernel of an op. TORCH_BOX, unless torch's frames cannot catch what the function throws.
#pragma once

#include <torch/csrc/stable/library.h>

// A compiler of MinGW's ABI has a C++ library of its own on Windows, where torch has Microsoft's. An exception of ours
// that reached torch's frames would end the process. So none leaves an op: torch throws one of its own with the same
// text.
#if defined(__MINGW32__)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <exception>
#include <string_view>

namespace pissa::ops {

using Boxed = void (*)(StableIValue*, std::uint64_t, std::uint64_t);

struct Failure {
  bool failed = false;
  char text[2048] = {};  // our messages have at most a few hundred characters

  void set(std::string_view message) {
    failed = true;
    message.copy(text, sizeof text - 1);
  }
};

// Apart from `guarded`: torch's exception passes through that frame, which must have nothing to clean up.
template <Boxed function>
[[gnu::noinline]] void run(StableIValue* stack, std::uint64_t args, std::uint64_t outputs, Failure& failure) noexcept {
  try {
    function(stack, args, outputs);
  } catch (const std::exception& error) {
    failure.set(error.what());
  } catch (...) {
    failure.set("an exception that is no std::exception");
  }
}

template <Boxed function>
void guarded(StableIValue* stack, std::uint64_t args, std::uint64_t outputs) {
  Failure failure;
  run<function>(stack, args, outputs, failure);
  if (failure.failed) aoti_torch_check(false, "pissa", "cpp/pissa/torch/boxed.h", __LINE__, failure.text);
}

}  // namespace pissa::ops

#define PISSA_BOX(function) (pissa::ops::guarded<(TORCH_BOX(function))>)
#else
#define PISSA_BOX(function) TORCH_BOX(function)
#endif
