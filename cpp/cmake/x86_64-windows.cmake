# Cross-compiles for Windows on x86-64 with zig, which is on PATH, and runs what it made under Wine (tests/windows).
# tests/wheels/windows.py builds a wheel so. zig's clang, not GCC, whose frames for Windows are aligned to 16 bytes: it
# stores spilled vectors of 32 and 64 bytes there, aligned, and crashes (GCC's bug 54412).
set(CMAKE_SYSTEM_NAME Windows)
set(CMAKE_SYSTEM_PROCESSOR AMD64)
set(CMAKE_CXX_COMPILER zig c++)
set(CMAKE_CXX_COMPILER_TARGET x86_64-windows-gnu)
set(CMAKE_CXX_ARCHIVE_CREATE "zig ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "zig ranlib <TARGET>")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_CXX_FLAGS_INIT "-g0")  # zig adds debug information
set(CMAKE_CROSSCOMPILING_EMULATOR "${CMAKE_CURRENT_LIST_DIR}/../../tests/windows/wine.sh")
