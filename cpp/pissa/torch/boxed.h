// PISSA_BOX: a function as the kernel of an op. TORCH_BOX, unless torch's frames cannot catch what the function throws.
#pragma once

#include <torch/csrc/stable/library.h>

// A compiler of MinGW's ABI has a C++ library of its own on Windows, where torch has Microsoft's. An exception of ours
// that reached torch's frames would end the process. So none leaves an op: its like of Microsoft's library does
// (boxed.cc).
#if defined(__MINGW32__)
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string_view>

namespace pissa::ops {

/// An exception of ours: which function of Microsoft's library throws its like, if any was thrown, and the text.
struct Failure {
  const char* thrower = nullptr;
  char text[2048] = {};  // our messages have at most a few hundred characters

  void set(const char* by, std::string_view message) {
    thrower = by;
    message.copy(text, sizeof text - 1);
  }
};

/// Throws it.
[[noreturn]] void throw_to_torch(const Failure& failure);

using Boxed = void (*)(StableIValue*, std::uint64_t, std::uint64_t);

// Apart from `guarded`: Microsoft's exception passes through that frame, which must have nothing to clean up.
template <Boxed function>
[[gnu::noinline]] void run(StableIValue* stack, std::uint64_t args, std::uint64_t outputs, Failure& failure) noexcept {
  try {
    function(stack, args, outputs);
  } catch (const std::invalid_argument& error) {  // Python's ValueError
    failure.set("?_Xinvalid_argument@std@@YAXPEBD@Z", error.what());
  } catch (const std::bad_alloc&) {  // MemoryError
    failure.set("?_Xbad_alloc@std@@YAXXZ", "");
  } catch (const std::exception& error) {
    failure.set("?_Xruntime_error@std@@YAXPEBD@Z", error.what());
  }
}

template <Boxed function>
void guarded(StableIValue* stack, std::uint64_t args, std::uint64_t outputs) {
  Failure failure;
  run<function>(stack, args, outputs, failure);
  if (failure.thrower) throw_to_torch(failure);
}

}  // namespace pissa::ops

#define PISSA_BOX(function) (pissa::ops::guarded<(TORCH_BOX(function))>)
#else
#define PISSA_BOX(function) TORCH_BOX(function)
#endif
