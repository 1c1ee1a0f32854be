# PISSA_EIGEN_DIR: Eigen's headers, from the Python package cmeel-eigen or the system (Debian: libeigen3-dev).
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import sys; print(';'.join(p + '/cmeel.prefix/include/eigen3' for p in sys.path if p))"
  OUTPUT_VARIABLE candidates OUTPUT_STRIP_TRAILING_WHITESPACE)
find_path(PISSA_EIGEN_DIR Eigen/Cholesky HINTS ${candidates} PATHS /usr/include/eigen3 /usr/local/include/eigen3)
if(NOT PISSA_EIGEN_DIR)
  message(FATAL_ERROR "Eigen not found: run `${Python_EXECUTABLE} -m pip install cmeel-eigen`, or install libeigen3-dev")
endif()
