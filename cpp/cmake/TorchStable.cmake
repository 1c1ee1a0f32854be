# The interface target `torch_stable`: torch's stable ABI, without find_package(Torch), which would bring flags, CUDA
# detection and a dependency on the C++ ABI of one torch version. Needs only that torch is installed for Python_EXECUTABLE.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; print(list(u.find_spec('torch').submodule_search_locations)[0])"
  OUTPUT_VARIABLE PISSA_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
if(failed)
  message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: run `${Python_EXECUTABLE} -m pip install 'torch>=2.10'`")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${PISSA_TORCH_DIR}/include")
if(WIN32)  # Python_EXECUTABLE finds torch's wheel for Windows (tests/wheels/windows.py)
  target_link_libraries(torch_stable INTERFACE "${PISSA_TORCH_DIR}/lib/torch_cpu.lib")
elseif(CMAKE_CROSSCOMPILING AND NOT APPLE)
  # This machine's libtorch_cpu.so is of another architecture: an empty library of that name (its SONAME). Modules may leave
  # symbols undefined, and the name must stay among those that ours needs.
  # For macOS, Python_EXECUTABLE finds torch's wheel for macOS (tests/wheels/macos.py).
  file(CONFIGURE OUTPUT torch_cpu_stub.cc CONTENT "// libtorch_cpu.so, to link with: cpp/cmake/TorchStable.cmake says why.\n" @ONLY)
  add_library(torch_cpu_stub SHARED "${CMAKE_CURRENT_BINARY_DIR}/torch_cpu_stub.cc")
  set_target_properties(torch_cpu_stub PROPERTIES OUTPUT_NAME torch_cpu LIBRARY_OUTPUT_DIRECTORY torch_cpu_stub)
  target_link_libraries(torch_stable INTERFACE torch_cpu_stub)
  target_link_options(torch_stable INTERFACE LINKER:--no-as-needed)
else()
  target_link_libraries(torch_stable INTERFACE "${PISSA_TORCH_DIR}/lib/libtorch_cpu${CMAKE_SHARED_LIBRARY_SUFFIX}")
endif()
# 2.10: the oldest torch that loads the library. A newer torch to build with is harmless.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000ULL)
set(PISSA_TORCH_TARGET "2.10")

# The interface target `torch_stable_cuda`: the functions of the stable ABI that torch keeps in libtorch_cuda.so. A CPU build
# of torch has no such file, and it is a CPU build that the wheel is built with; so we link, as one does with CUDA's own
# libcuda.so, a stub: a library of that name (its SONAME) which defines these functions and nothing else. It is not
# installed: where the CUDA library is loaded, `import torch` has already loaded the real one.
if(PISSA_CUDA_FOUND)
  set(stub "// libtorch_cuda.so, to link with: cpp/cmake/TorchStable.cmake says why.\n")
  foreach(function IN ITEMS aoti_torch_get_current_cuda_stream torch_get_current_cuda_blas_handle
                            aoti_torch_cuda_caching_allocator_raw_alloc aoti_torch_cuda_caching_allocator_raw_delete)
    string(APPEND stub "extern \"C\" __attribute__((visibility(\"default\"))) void ${function}() {}\n")
  endforeach()
  file(CONFIGURE OUTPUT torch_cuda_stub.cc CONTENT "${stub}" @ONLY)
  add_library(torch_cuda_stub SHARED "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.cc")
  set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY torch_cuda_stub)
  add_library(torch_stable_cuda INTERFACE)
  target_link_libraries(torch_stable_cuda INTERFACE torch_cuda_stub)
  target_compile_definitions(torch_stable_cuda INTERFACE USE_CUDA)  # torch's headers declare them only then
endif()
