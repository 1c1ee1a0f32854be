#include "sim/fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "sim/sanitizers.h"

#ifndef CUDA_SIM_UCONTEXT
// swapcontext enters the kernel to keep the mask of signals, ten times the cost of what is needed: the registers that
// a function must preserve. The rounding mode is the same for all.
extern "C" void cuda_sim_switch(void** from, void* to);
asm(R"(
  .text
  .p2align 4
  .globl cuda_sim_switch
  .hidden cuda_sim_switch
  .type cuda_sim_switch, @function
cuda_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_sim_switch, .-cuda_sim_switch
)");
#endif

#ifdef CUDA_SIM_TSAN
// At its end a program waits a second for races of threads that still run, which fibers seem to do.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() { return "atexit_sleep_ms=0"; }
#endif

namespace cuda_sim::detail {
namespace {

// A sanitizer's report runs on the stack of the thread that it reports.
#if defined(__SANITIZE_ADDRESS__) || defined(CUDA_SIM_TSAN)
constexpr std::size_t kStackBytes = 256 << 10;
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif

#ifdef __SANITIZE_ADDRESS__
struct Stack {
  void* from;
  std::size_t bytes;
};

Stack stack_of_thread() {
  Stack stack;
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack.from, &stack.bytes);
  pthread_attr_destroy(&attributes);
  return stack;
}
#endif

}  // namespace

void create_fiber(Fiber& fiber, void (*entry)()) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* pages = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages, page, PROT_NONE) != 0) {  // the guard, where the stack grows to
    std::perror("cuda_sim: no memory for the stack of a thread");
    std::abort();
  }
  fiber.stack = static_cast<char*>(pages) + page;
  fiber.stack_bytes = kStackBytes;
  fiber.fake_stack = nullptr;
  fiber.tsan = nullptr;
#ifdef CUDA_SIM_TSAN
  fiber.tsan = __tsan_create_fiber(0);
#endif
#ifdef CUDA_SIM_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // As if `entry` had been left by cuda_sim_switch before its first instruction: six registers, where to return to, and
  // the end of the chain of frames, which also aligns the stack as after a call.
  auto* top = reinterpret_cast<std::uintptr_t*>(static_cast<char*>(fiber.stack) + kStackBytes);
  *--top = 0;
  *--top = reinterpret_cast<std::uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.stack_pointer = top;
#endif
}

void enter_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void adopt_host(Fiber& host) {
#ifdef __SANITIZE_ADDRESS__
  // Once a thread: of the first one glibc reads /proc/self/maps, where each fiber has two lines; for every launch that
  // was a third of a test's time.
  thread_local const Stack stack = stack_of_thread();
  host.stack = stack.from;
  host.stack_bytes = stack.bytes;
#endif
#ifdef CUDA_SIM_TSAN
  host.tsan = __tsan_get_current_fiber();
#endif
  host.fake_stack = nullptr;
}

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef CUDA_SIM_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef CUDA_SIM_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  cuda_sim_switch(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace cuda_sim::detail
