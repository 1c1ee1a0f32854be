# PISSA_CUDA_FOUND, the language CUDA and the interface target `pissa_cuda_libraries`: nvcc 13, cuBLAS, cuBLASLt, cuSOLVER
# and the static CUDA runtime. Each is looked for in PISSA_CUDA_ROOT, then in the PyPI wheels of Python_EXECUTABLE
# (site-packages/nvidia/cu13) and of the environment that an isolated build is started from, then in a toolkit, which
# CUDACXX, CUDA_HOME or CUDA_PATH may name: a toolkit's compiler with the wheels' cuBLAS is fine, and is what a CUDA build of
# torch leads to. The runtime and its headers come from the compiler's own folder: they must match it.
set(PISSA_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO (if CUDA 13 is found), ON, OFF")
set_property(CACHE PISSA_CUDA PROPERTY STRINGS AUTO ON OFF)
set(PISSA_CUDA_ROOT "" CACHE PATH "CUDA 13 to build with: a folder with bin/nvcc; empty: PyPI wheels, then a toolkit")
# Those of this machine's GPUs; without one, or for a wheel ("all"), every architecture that CUDA 13 compiles for, but the
# oldest and smaller relatives of one: T4, A100, RTX 30, RTX 40, H100, B200, Jetson Thor, RTX 50. Later ones compile 120's PTX.
set(PISSA_CUDA_ARCHITECTURES "" CACHE STRING "GPU architectures, as in CMAKE_CUDA_ARCHITECTURES; empty: this machine's; or all")
set(PISSA_CUDA_FOUND OFF)
if(NOT PISSA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PISSA_CUDA: got ${PISSA_CUDA}; allowed: AUTO, ON, OFF")
endif()
if(PISSA_CUDA STREQUAL "OFF")
  return()
endif()

# The compiler and its version, or in `problems` what keeps it from being used.
set(problems "")
set(packages "")
set(wheels "")
function(pissa_add_wheels)
  execute_process(
    COMMAND ${ARGN} -c "import sys; print(';'.join(p + '/nvidia/cu13' for p in sys.path if p))"
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(wheels ${wheels} ${found} PARENT_SCOPE)
endfunction()
pissa_add_wheels("${Python_EXECUTABLE}")
# pip isolates a build by PYTHONPATH, which -I ignores: the interpreter is that of the user's environment. `build` and uv
# give it an interpreter of its own, and leave VIRTUAL_ENV as it was.
pissa_add_wheels("${Python_EXECUTABLE}" -I)
if(DEFINED ENV{VIRTUAL_ENV})
  pissa_add_wheels("$ENV{VIRTUAL_ENV}/bin/python" -I)
endif()
list(REMOVE_DUPLICATES wheels)
list(TRANSFORM wheels APPEND /bin OUTPUT_VARIABLE wheel_bins)
unset(nvcc)
unset(where)
if(PISSA_CUDA_ROOT)
  find_program(nvcc nvcc PATHS "${PISSA_CUDA_ROOT}/bin" NO_CACHE NO_DEFAULT_PATH)
  set(where " in ${PISSA_CUDA_ROOT}/bin")
else()
  find_program(nvcc nvcc PATHS ${wheel_bins} NO_CACHE NO_DEFAULT_PATH)
  if(NOT nvcc AND DEFINED ENV{CUDACXX})
    find_program(nvcc "$ENV{CUDACXX}" NO_CACHE)
  endif()
  find_program(nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
endif()
if(CMAKE_VERSION VERSION_LESS 3.26)
  list(APPEND problems "CMake ${CMAKE_VERSION}, which does not know CUDA's C++20: 3.26 does")
  list(APPEND packages "'cmake>=3.26'")
endif()
set(compiler_packages nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl)
if(NOT nvcc)
  list(APPEND problems "no nvcc${where}")
  list(APPEND packages ${compiler_packages})
else()
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE output ERROR_VARIABLE output)
  string(REGEX MATCH "release ([0-9]+)\\.([0-9]+)" output "${output}")
  set(nvcc_version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  if(NOT CMAKE_MATCH_1 EQUAL 13)
    list(APPEND problems "${nvcc} is of CUDA ${nvcc_version}, not 13")
    list(APPEND packages ${compiler_packages})
  endif()
  # Where it lives: nvcc may be a link or a script. It says so itself when asked what it would do.
  execute_process(COMMAND "${nvcc}" -v no_such_file ERROR_VARIABLE output OUTPUT_QUIET)
  string(REGEX MATCH "#\\$ TOP=([^\r\n]*)" output "${output}")
  get_filename_component(nvcc_root "${CMAKE_MATCH_1}" REALPATH)
endif()

# The libraries: the files of CUDA 13 by their full names, for a wheel has no others.
set(roots ${PISSA_CUDA_ROOT} ${wheels} ${nvcc_root} $ENV{CUDA_HOME} $ENV{CUDA_PATH} /usr/local/cuda)
set(lib_folders lib64 lib targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib targets/sbsa-linux/lib)
function(pissa_find_cuda name library header pip_packages)
  # A cross-compiler's root, which has the target's system, has no CUDA.
  find_library(library_file ${library} HINTS ${ARGN} PATH_SUFFIXES ${lib_folders} NO_CACHE NO_CMAKE_FIND_ROOT_PATH)
  find_path(header_folder ${header} HINTS ${ARGN} PATH_SUFFIXES include NO_CACHE NO_CMAKE_FIND_ROOT_PATH)
  if(NOT library_file OR NOT header_folder)
    set(problems ${problems} "no ${name} (${library}, ${header})" PARENT_SCOPE)
    set(packages ${packages} ${pip_packages} PARENT_SCOPE)
  endif()
  set(${name}_library "${library_file}" PARENT_SCOPE)
  set(${name}_include "${header_folder}" PARENT_SCOPE)
endfunction()
pissa_find_cuda(cudart libcudart_static.a cuda_runtime.h "nvidia-cuda-runtime" ${nvcc_root} ${roots})
pissa_find_cuda(cuBLAS libcublas.so.13 cublas_v2.h "nvidia-cublas" ${roots})
pissa_find_cuda(cuBLASLt libcublasLt.so.13 cublasLt.h "nvidia-cublas" ${roots})
pissa_find_cuda(cuSOLVER libcusolver.so.12 cusolverDn.h "nvidia-cusolver" ${roots})

# A compiler that is there need not work: parts of it come in other packages, and it refuses host compilers too new for it.
if(NOT problems)
  file(WRITE "${CMAKE_BINARY_DIR}/pissa_cuda_check.cu" "#include <cuda_bf16.h>\n__global__ void kernel() {}\n")
  execute_process(
    COMMAND "${nvcc}" -ccbin "${CMAKE_CXX_COMPILER}" -std=c++20 -c "${CMAKE_BINARY_DIR}/pissa_cuda_check.cu" -o
            "${CMAKE_BINARY_DIR}/pissa_cuda_check.o"
    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    string(REGEX REPLACE "[;\r\n]+" " " output "${output}")
    string(SUBSTRING "${output}" 0 300 output)
    list(APPEND problems "${nvcc} cannot compile with ${CMAKE_CXX_COMPILER}: ${output}")
    list(APPEND packages ${compiler_packages})
  endif()
endif()

list(JOIN problems ", " problems)
if(problems)
  if(PISSA_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA backend: not built (${problems})")
    return()
  endif()
  # With their versions, where pyproject.toml first has them: of the libraries those that will do to run, too.
  file(READ "${PROJECT_SOURCE_DIR}/pyproject.toml" pyproject)
  list(REMOVE_DUPLICATES packages)
  unset(requirements)
  foreach(package IN LISTS packages)
    if(pyproject MATCHES "\"(${package}[~<>=][^\"]*)\"")
      set(package "'${CMAKE_MATCH_1}'")
    endif()
    string(APPEND requirements " ${package}")
  endforeach()
  message(FATAL_ERROR "PISSA_CUDA=ON, but: ${problems}. Install CUDA 13 and give -DPISSA_CUDA_ROOT, or run "
                      "`${Python_EXECUTABLE} -m pip install${requirements}`; or build with PISSA_CUDA=OFF. If these packages are "
                      "installed, build isolation hides them: activate their environment, or build with "
                      "--no-build-isolation, or with --config-settings=cmake.define.PISSA_CUDA_ROOT=/path/to/site-packages/nvidia/cu13")
endif()

# CMake tries the compiler by linking programs. The wheels have `lib` where nvcc expects `lib64`, so for these trials, and
# only for them, nvcc is told where; what we build names the runtime's file instead.
get_filename_component(cudart_folder "${cudart_library}" DIRECTORY)
set(saved_flags "$ENV{NVCC_APPEND_FLAGS}")
set(ENV{NVCC_APPEND_FLAGS} "${saved_flags} -L${cudart_folder}")
set(CMAKE_CUDA_COMPILER "${nvcc}" CACHE FILEPATH "nvcc")
set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}" CACHE FILEPATH "The compiler that nvcc calls")
set(all_architectures 75-real 80-real 86-real 89-real 90-real 100-real 110-real 120-real 120-virtual)
set(architectures ${PISSA_CUDA_ARCHITECTURES})
if(NOT architectures)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE capabilities RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(NOT failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" architectures "${capabilities}")
    list(TRANSFORM architectures REPLACE "\\." "")
    list(REMOVE_DUPLICATES architectures)
    list(SORT architectures COMPARE NATURAL)
    foreach(architecture ${architectures})  # one that is not in the list runs what all of it gives, or nothing of ours
      if(NOT "${architecture}-real" IN_LIST all_architectures)
        set(architectures "")
        break()
      endif()
    endforeach()
    if(architectures)
      list(GET architectures -1 newest)
      list(TRANSFORM architectures APPEND -real)
      list(APPEND architectures ${newest}-virtual)  # for a later card
    endif()
  endif()
endif()
if(NOT architectures OR architectures STREQUAL "all")
  set(architectures ${all_architectures})
endif()
set(PISSA_CUDA_ARCHITECTURES ${architectures})
set(CMAKE_CUDA_ARCHITECTURES ${PISSA_CUDA_ARCHITECTURES})
enable_language(CUDA)
set(ENV{NVCC_APPEND_FLAGS} "${saved_flags}")
set(CMAKE_CUDA_RUNTIME_LIBRARY None)

file(STRINGS "${cudart_include}/cuda_runtime_api.h" version REGEX "#define CUDART_VERSION +[0-9]+")
string(REGEX MATCH "[0-9]+$" version "${version}")
math(EXPR major "${version} / 1000")
math(EXPR minor "${version} % 1000 / 10")
set(PISSA_CUDA_RUNTIME "${major}.${minor}")

find_package(Threads REQUIRED)
add_library(pissa_cuda_libraries INTERFACE)
target_include_directories(pissa_cuda_libraries SYSTEM INTERFACE "${cudart_include}" "${cuBLAS_include}" "${cuSOLVER_include}")
target_link_libraries(pissa_cuda_libraries INTERFACE "${cuBLAS_library}" "${cuBLASLt_library}" "${cuSOLVER_library}"
                                                     "${cudart_library}" Threads::Threads ${CMAKE_DL_LIBS} rt)
set(PISSA_CUDA_FOUND ON)
list(LENGTH PISSA_CUDA_ARCHITECTURES minutes)
math(EXPR minutes "2 * ${minutes}")
list(JOIN PISSA_CUDA_ARCHITECTURES " " architectures)
message(STATUS "CUDA backend: ${nvcc} ${nvcc_version}, ${cuBLAS_library}, ${cuSOLVER_library}, for ${architectures}: compiles "
               "about ${minutes} minutes, divided by the cores; PISSA_CUDA_ARCHITECTURES names fewer, PISSA_CUDA=OFF none")
