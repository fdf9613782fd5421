// Segments and prefixes as ranges of keys, one for each query, which kernels read (KeyRanges in
// calls.h): of tiles whose ranges do not reach a block of keys it is not multiplied.
#pragma once

#include <vector>

#include "api.h"

namespace ff {

// Integers of a call by their strides: (batch), or (batch, length). No data: none.
struct Integers {
  const int64_t* data = nullptr;
  int64_t batch = 0, place = 0;

  int64_t at(int64_t b, int64_t i = 0) const { return data[b * batch + i * place]; }
};

// What ranges are made of, beside the diagonal and the window of the call.
struct RangeRules {
  Integers q_segments, k_segments;  // a query sees the keys of its own segment; both or none
  Integers prefixes;                // so many keys are seen from the left of the diagonal, too

  bool any() const { return q_segments.data || prefixes.data; }
};

// The memory of ranges.
struct KeyRangeTable {
  std::vector<int32_t> first, end, q_segments, k_segments;
  std::vector<Bool> scattered;

  KeyRanges ranges() const {
    return {first.data(), end.data(), scattered.data(), q_segments.data(), k_segments.data()};
  }
};

// In time linear in the lengths, where few segments are scattered.
FF_EXPORT KeyRangeTable key_ranges(const Attention&, const RangeRules&);

}  // namespace ff
