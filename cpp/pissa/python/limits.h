// The core's tables and limits, so that Python checks arguments by the same ones.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "pissa/core/format.h"
#include "pissa/core/fused_linear.h"
#include "pissa/core/nested_scales.h"
#include "pissa/core/rsvd.h"

namespace pissa::python {

inline const char* name(ScaleKind kind) {
  constexpr const char* kNames[] = {"float32", "nested", "e8m0", "e4m3", "bfloat16", "tiles", "within"};
  return kNames[static_cast<int>(kind)];
}

// Of the quantised formats. blocksizes is empty where a block is a row.
inline pybind11::dict formats() {
  pybind11::dict table;
  for (const Format format : kFormats) {
    const FormatInfo row = info(format);
    if (!row.quantized) continue;
    std::vector<std::int64_t> blocksizes;
    for (std::int64_t size = row.blocks.least; size <= row.blocks.most && !row.blocks.by_row(); size *= 2) {
      blocksizes.push_back(size);
    }
    pybind11::dict entry;
    entry["bits"] = row.bits;
    entry["blocksizes"] = blocksizes;
    entry["usual_blocksize"] = row.blocks.usual;
    entry["scales"] = name(row.scales);
    entry["block_bytes"] = row.block_bytes;
    table[row.name] = entry;
  }
  return table;
}

inline pybind11::dict limits() {
  pybind11::dict table;
  table["few_tokens"] = kFewTokens;
  table["nested_blocksize"] = kNestedBlocksize;
  table["passes_per_step"] = kPassesPerStep;
  table["scores"] = kScores;
  return table;
}

inline void define_limits(pybind11::module_& m) {
  m.def(
      "formats", formats,
      "The quantised formats by name: bits of a code, blocksizes (none: a block is a row), usual_blocksize, what its\n"
      "scales may be (nested: also float32), and the bytes of a block with its scales within (others: 0).");
  m.def(
      "limits", limits,
      "Rows of x up to which factors are not summed (few_tokens), scales that are quantised together\n"
      "(nested_blocksize), reads of a weight in a step of the SVD (passes_per_step), and scores of a token (scores).");
}

}  // namespace pissa::python
