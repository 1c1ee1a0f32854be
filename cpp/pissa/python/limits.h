// The core's tables and limits, so that Python checks arguments by the same ones.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <iterator>
#include <vector>

#include "pissa/core/format.h"
#include "pissa/core/fused_linear.h"
#include "pissa/core/merge_codes.h"
#include "pissa/core/nested_scales.h"
#include "pissa/core/rsvd.h"

namespace pissa::python {

inline const char* name(ScaleKind kind) {
  constexpr const char* kNames[] = {"float32", "nested", "e8m0", "e4m3", "bfloat16", "tiles", "within"};
  return kNames[static_cast<int>(kind)];
}

template <Format format = Format::nf4>
std::vector<float> levels(Format of) {
  if constexpr (format != Format::mxfp4_gguf) {
    if (of != format) return levels<static_cast<Format>(static_cast<int>(format) + 1)>(of);
  }
  std::vector<float> values;
  for (int code = 0; code < 1 << info(format).bits; ++code) values.push_back(level_of_code<format>(code));
  return values;
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
    entry["levels"] = levels(format);
    table[row.name] = entry;
  }
  return table;
}

inline pybind11::dict limits() {
  pybind11::dict table;
  table["dynamic_map"] = std::vector<float>(std::begin(kDynamicMap), std::end(kDynamicMap));
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
      "scales may be (nested: also float32), the bytes of a block with its scales within (others: 0), and the level\n"
      "of each code, which its scale multiplies.");
  m.def(
      "limits", limits,
      "The levels of nested scales (dynamic_map), rows of x up to which factors are not summed (few_tokens), scales\n"
      "that are quantised together (nested_blocksize), reads of a weight in a step of the SVD (passes_per_step), and\n"
      "scores of a token (scores).");
}

}  // namespace pissa::python
