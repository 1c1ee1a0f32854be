// What libstdc++ and glibc export in newer releases only, as symbols of our own: with them a module that a recent GCC
// builds loads beside the libraries of manylinux_2_28 (glibc 2.28, GCC 8's libstdc++). Red Hat's compilers for
// manylinux link the same in the same way, as libstdc++_nonshared.a. These are taken only where something of ours needs
// them, and hidden (Manylinux.cmake). What is still too new, `auditwheel repair` refuses by name.
// A libstdc++ inside the module will not do: exceptions cross from it into torch, so that both must have one libstdc++
// and one unwinder.
#include <exception>
#include <ios>
#include <new>
#include <sstream>

// glibc 2.32. False sends libstdc++ through atomic operations, which are right with one thread, too.
extern "C" {
char __libc_single_threaded = false;

// exception_ptr's copy and destruction as libstdc++ has exported them since GCC 4.4.
void pissa_copy_exception_ptr(void* to, const void* from) noexcept
    __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void pissa_destroy_exception_ptr(void* pointer) noexcept __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
}

#if __GNUC__ >= 14
// An exception leaves a function that is noexcept.
extern "C" void* __cxa_begin_catch(void* exception) noexcept;
extern "C" [[noreturn]] void __cxa_call_terminate(void* exception) noexcept {
  __cxa_begin_catch(exception);
  std::terminate();
}
#endif

namespace std {

// GCC 11
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

namespace __exception_ptr {

void exception_ptr::_M_addref() noexcept {
  alignas(exception_ptr) unsigned char never_destroyed[sizeof(exception_ptr)];
  pissa_copy_exception_ptr(never_destroyed, this);
}

void exception_ptr::_M_release() noexcept { pissa_destroy_exception_ptr(this); }

}  // namespace __exception_ptr

// GCC 9
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();

// GCC 11: C++20's overloads
template string basic_stringbuf<char>::str() const&;
template string basic_stringbuf<char>::str() &&;

#if __GNUC__ >= 13
// <iostream> names this, for its library to make the streams; until GCC 12 each object made sure that they are made.
void ios_base_library_init() {}
const ios_base::Init streams;

template void basic_string<char>::_M_replace_cold(char*, size_type, const char*, size_type, size_type);
#endif

}  // namespace std
