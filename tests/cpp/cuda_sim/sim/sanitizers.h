// What the simulation tells the sanitizers. Without them everything here is empty.
#pragma once

#include <cstddef>

#if defined(__has_feature)  // Clang; GCC defines the macros itself
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif

// Also defined, by CMakeLists.txt, for the files that ThreadSanitizer does not instrument.
#if defined(__SANITIZE_THREAD__) && !defined(CUDA_SIM_TSAN)
#define CUDA_SIM_TSAN
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CUDA_SIM_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

namespace cuda_sim::detail {

#ifdef __SANITIZE_ADDRESS__
inline constexpr bool kAsan = true;
inline void poison(const void* from, std::size_t bytes) { __asan_poison_memory_region(from, bytes); }
inline void unpoison(const void* from, std::size_t bytes) { __asan_unpoison_memory_region(from, bytes); }
#else
inline constexpr bool kAsan = false;
inline void poison(const void*, std::size_t) {}
inline void unpoison(const void*, std::size_t) {}
#endif

/// Orders memory between threads, as a barrier does: what came before a `tsan_release` of an address comes before what
/// follows a later `tsan_acquire` of it.
#ifdef CUDA_SIM_TSAN
inline void tsan_release(void* address) { __tsan_release(address); }
inline void tsan_acquire(void* address) { __tsan_acquire(address); }
#else
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
#endif

/// While it lives, memory that is handed out or taken back has no history: threads that no barrier orders may share it.
class TsanForget {
 public:
#ifdef CUDA_SIM_TSAN
  TsanForget() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~TsanForget() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  TsanForget() {}
#endif
  TsanForget(const TsanForget&) = delete;
};

}  // namespace cuda_sim::detail
