# pissa::core, the algorithms over any backend, headers only; pissa::cpu, the CPU backend. See pissa/pissa.h.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/pissaTargets.cmake)
