// Stacks and the passing from one to another on the same thread of the host.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#define CUDA_SIM_UCONTEXT  // may also be defined to test it
#endif
#ifdef CUDA_SIM_UCONTEXT
#include <ucontext.h>
#endif

namespace cuda_sim::detail {

struct Fiber {
#ifdef CUDA_SIM_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;  // what else it was doing is on its stack
#endif
  void* stack;
  std::size_t stack_bytes;
  void* fake_stack;  // AddressSanitizer's
  void* tsan;
};

/// Makes a fiber that starts in `entry`, which must not return. It is never given back: the threads of a block are used
/// again by the next.
void create_fiber(Fiber& fiber, void (*entry)());

/// To be called first in `entry`.
void enter_fiber();

/// Makes `host` stand for the thread that calls.
void adopt_host(Fiber& host);

/// Goes on in `to`; returns when something switches to `from`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace cuda_sim::detail
