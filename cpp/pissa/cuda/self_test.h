// The self-test of a GPU: whether each way to compute (routes.h) gives what another one gives, bit for bit.
//
//   decoding        codes of all formats, against the core's formulas on the host
//   the handle      a product of small integers, whose sums are exact in any order, against the host
//   lt              the same with a bias
//   few_rows        rows of the identity times codes, with an adapter of rank 1 in integers: columns of the
//                   decoded weight plus an integer, which the handle's products give too. All formats, both halves,
//                   both widths, both row tiles; not the kernels for more than 1,024 columns, nor other kinds of scales
//   group           the same for layers together
//   early_launch    few_rows and group again without it, if one of them was wrong
#pragma once

#include <string>
#include <vector>

#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// Tests the routes of the context's device, once in a process, and closes those that are wrong. Inside a capture it
/// only waits for a test that another thread has begun. The host waits for the device 15 times, mostly for 4 KB of
/// decoded numbers.
///
/// @return a sentence for each route that was closed
/// @throws std::runtime_error if decoding or the handle is wrong: then nothing computes rightly there
std::vector<std::string> test_routes(const Context& context);

}  // namespace pissa::cuda
