# Cross-compiles for macOS 14 on arm64 with zig, which is on PATH and has the headers of Apple's libc. tests/wheels/macos.py
# builds a wheel so; its PISSA_MACOS_LIBCXX names what Apple's C++ library has.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_CXX_COMPILER zig c++)
set(CMAKE_CXX_COMPILER_TARGET aarch64-macos.14.0)
set(CMAKE_CXX_ARCHIVE_CREATE "zig ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "zig ranlib <TARGET>")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(PISSA_ARM_FLAG -mcpu=generic+v8_2a)  # zig's own words

# Apple's C++ library, not zig's: exceptions cross from the module into torch, so both must have one. zig's headers are
# newer than macOS 14's library. Told that the library is the system's, they call only what it has.
set(CMAKE_CXX_FLAGS_INIT "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS -D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1")
string(APPEND CMAKE_CXX_FLAGS_INIT " -fno-sized-deallocation")  # as Apple's compiler for torch
string(APPEND CMAKE_CXX_FLAGS_INIT " -g0")  # zig adds debug information: without it, an object of 6.6 MB has 0.8
# zig 0.17 crashes at CMake's -bundle; the last of two counts, and Python loads either.
set(CMAKE_MODULE_LINKER_FLAGS_INIT "-dynamiclib -nostdlib++ $ENV{PISSA_MACOS_LIBCXX}")
