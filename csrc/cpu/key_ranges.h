// Segments and prefixes as ranges of keys, one for each query, which kernels read (KeyRanges in
// calls.h): of tiles whose ranges do not reach a block of keys it is not multiplied.
#pragma once

#include <vector>

#include "api.h"

namespace ff {

// The memory of ranges.
struct KeyRangeTable {
  std::vector<int32_t> first, end, q_segments, k_segments;
  std::vector<Bool> scattered;

  KeyRanges ranges() const {
    return {first.data(), end.data(), scattered.data(), q_segments.data(), k_segments.data()};
  }
};

// In time linear in the lengths, where few segments are scattered.
FF_EXPORT KeyRangeTable key_ranges(const Attention&);

}  // namespace ff
