// PiSSA in C++: the header that a program includes, and its guarantees. The wheel contains headers, library and CMake
// package:
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
/// - Shapes and layouts: as in torch, a weight is [out, in], and rows of x and y are tokens. Matrices are row-major,
///   with rows `ld` elements apart. Singular vectors are rows. A matrix must be aligned to its elements, nothing more.
/// - Memory: a Matrix is a view. The library keeps none after a call, and writes only to arguments of type
///   MutableMatrix and to outputs that are pointers. What a call writes must not overlap any other argument, except
///   where its comment allows it.
/// - Errors: a bad rank, pass count, block size or scaling, and a weight with NaN or Inf, throw std::invalid_argument.
///   The message says what was given and what is allowed. An SVD that does not converge throws std::runtime_error.
///   Shapes that do not fit together, and pointers to too little memory, are not detected.
/// - Results: bit for bit the same for any number of threads. The same seed gives the same factors on all CPUs with the
///   same instruction set, and close ones on others. kernels() uses the fastest available set, or the one that the
///   environment variable PISSA_ISA names.
/// - Threads: only those of an executor. Several threads may use one CpuBackend at the same time.
/// - Versions: until 1.0 the interface may change with each minor version; find_package(pissa 0.1) accepts no other.
#pragma once

#include "pissa/core/fused_linear.h"
#include "pissa/core/rsvd.h"
#include "pissa/core/split.h"
#include "pissa/cpu/backend.h"
#include "pissa/cpu/executor.h"
#include "pissa/cpu/isa.h"
#include "pissa/cpu/split_many.h"
