#include "pissa/torch/boxed.h"

#if defined(__MINGW32__)
#include <windows.h>

namespace pissa::ops {

void throw_to_torch(const Failure& failure) {
  // torch's libraries have loaded it. std::_Xbad_alloc ignores the argument.
  const auto function = GetProcAddress(GetModuleHandleW(L"msvcp140.dll"), failure.thrower);
  reinterpret_cast<void (*)(const char*)>(reinterpret_cast<void*>(function))(failure.text);
  __builtin_unreachable();
}

}  // namespace pissa::ops
#endif
