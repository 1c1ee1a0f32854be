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
target_link_libraries(torch_stable INTERFACE "${PISSA_TORCH_DIR}/lib/libtorch_cpu.so")
# 2.10: the oldest torch that loads the library. A newer torch to build with is harmless.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000ULL)
set(PISSA_TORCH_TARGET "2.10")
