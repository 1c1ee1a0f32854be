// PiSSA in C++: what a program includes, and what it may rely on. The wheel brings headers, library and CMake package:
//
//   find_package(pissa 0.1 REQUIRED)             # CMAKE_PREFIX_PATH=<site-packages>/pissa
//   target_link_libraries(program pissa::cpu)    # pissa::core, headers only, for a backend of one's own
//
//   const pissa::cpu::ThreadExecutor executor(4);
//   pissa::cpu::CpuBackend backend(executor, pissa::cpu::kernels());
//   const pissa::Matrix weight{data, out, in, in};
//   const auto svd = pissa::svd_lowrank(backend, weight, 16, {});
//   const pissa::MutableMatrix u = svd.u.view();  // [16, out], f32, in memory that svd owns
//
// Algorithms: rsvd.h, a truncated SVD; split.h, start factors and residual of one weight, split_many.h of many;
// fused_linear.h, the adapted layer forward and backward. Each takes a backend: backend.h lists what one must do, and
// cpu/backend.h is the one for CPUs.

/// \file
/// - Shapes and layouts: as in torch, a weight is [out, in], rows of x and y are tokens. Matrices are row-major, rows
///   `ld` elements apart. Singular vectors are rows. A matrix has to be aligned as its elements are, no more.
/// - Memory: a Matrix is a view. The library keeps none after a call, and writes only to arguments of type
///   MutableMatrix and to outputs that are pointers. What a call writes overlaps nothing else that it is given, except
///   where its comment says that it may.
/// - Errors: a bad rank, pass count, block size or scaling, and a weight with NaN or Inf, throw std::invalid_argument,
///   whose message says what was given and what is allowed. An SVD that does not converge throws std::runtime_error.
///   Nothing notices shapes that do not fit together, or pointers to too little memory.
/// - Results: bit for bit the same for any number of threads. The same seed gives the same factors on all CPUs of one
///   instruction set, and close ones on others. kernels() takes the fastest set there is, or the one that the
///   environment variable PISSA_ISA names.
/// - Threads: an executor's alone. Several threads may use one CpuBackend at the same time.
/// - Versions: until 1.0 the interface may change with each minor version; find_package(pissa 0.1) takes no other.
#pragma once

#include "pissa/core/fused_linear.h"
#include "pissa/core/rsvd.h"
#include "pissa/core/split.h"
#include "pissa/cpu/backend.h"
#include "pissa/cpu/executor.h"
#include "pissa/cpu/isa.h"
#include "pissa/cpu/split_many.h"
