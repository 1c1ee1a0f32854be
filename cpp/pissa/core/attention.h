// Operands of softmax attention: views that point to a device's memory. The CPU kernels are in cpu/attention.h.
#pragma once

#include <cstdint>

#include "pissa/core/types.h"

namespace pissa {

/// Heads [batch, heads, length, dim] of numbers. Those of a row are adjacent.
struct Heads {
  void* data = nullptr;
  std::int64_t batch = 0, heads = 0, length = 0, dim = 0;
  std::int64_t batch_stride = 0, head_stride = 0, ld = 0;  ///< in elements
  Format format = Format::f32;

  MutableMatrix head(std::int64_t b, std::int64_t h) const {
    const std::int64_t at = (b * batch_stride + h * head_stride) * element_size(format);
    return {static_cast<char*>(data) + at, length, dim, ld, format};
  }
};

struct Attention {
  Heads q;  ///< [batch, heads, queries, dim]
  Heads k;  ///< [batch, heads / group, keys, dim]
  Heads v;  ///< [batch, heads / group, keys, dim of values]
  float scale = 1;
  bool causal = false;                 ///< the last query sees all keys, one before it all but the last, and so on
  const std::uint8_t* mask = nullptr;  ///< [batch, heads, queries, keys]: not 0 where a query may see a key
  std::int64_t mask_batch = 0, mask_head = 0, mask_row = 0;  ///< strides
};

}  // namespace pissa
