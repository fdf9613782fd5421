// The kinds of masks that are numbers (core/score_policy.py) but for those of places (diagonal.h):
// soft cap, ALiBi, position tables, segments and sinks. A kernel is built once more for the calls
// that have any; it reads at run time which. Without them nothing of it is left.
#pragma once

#include "calls.h"
#include "device.h"
#include "diagonal.h"
#include "float8.h"

namespace ff::cuda {
namespace {

inline bool has_kinds(const Attention& p) {
  const bool window = p.left < kEndless || (p.right < kEndless && !p.causal());
  return window || p.softcap > 0.0f || p.alibi.data || p.table.data || p.rules.any() ||
         p.sinks.data;
}

// Calls with 8-bit keys have one kernel for all that others have several for.
inline bool has_kinds(const Float8Forward&) { return true; }

// Which keys none of some queries sees by the segments of all of them, from the least to the
// largest.
struct SegmentRange {
  const int64_t* keys;  // null: there are no segments
  int64_t stride, least = INT64_MAX, largest = INT64_MIN;

  FF_DEVICE bool exclude() const { return keys; }
  FF_DEVICE bool excludes(int key) const {
    if (!keys) return false;
    const int64_t segment = keys[key * stride];
    return segment < least || segment > largest;
  }
};
struct NoSegmentRange {
  FF_DEVICE static constexpr bool exclude() { return false; }
  FF_DEVICE static constexpr bool excludes(int) { return false; }
};

// How near to cap * tanh(x / cap): to 2 roundings of float32, of which products of 16-bit numbers
// have 8192 or more already, or to less than one.
enum class Cap { kNarrow, kFull };

// Of one head of a batch entry.
struct Kinds {
  using Places = Bounds;
  static constexpr bool kAny = true;

  float cap, inverse_cap;  // 0: none
  float slope;
  int diagonal;  // query i stands beside key i + diagonal
  const int64_t *query_segments, *key_segments;
  int64_t query_stride, key_stride;
  float sink;          // a score without a value, or -inf
  const float* table;  // of positions
  const int64_t* index;
  int index_row, entry;  // from a query to the next, and from an entry
  uint32_t entries;

  FF_DEVICE Kinds(const Attention& p, int64_t b, int64_t h)
      : cap(p.softcap),
        inverse_cap(p.softcap > 0.0f ? 1.0f / p.softcap : 0.0f),
        slope(p.alibi.data ? p.alibi.at(b, h) : 0.0f),
        diagonal(int(p.exchanged ? -p.diagonal : p.diagonal)),
        query_segments(p.rules.q_segments.data),
        key_segments(p.rules.k_segments.data),
        query_stride(p.rules.q_segments.place),
        key_stride(p.rules.k_segments.place),
        sink(p.sinks.data ? p.sinks.at(h) : -__builtin_inff()),
        table(p.table.data),
        index(p.table.index + (p.table.by_offset ? p.q_len - 1 : 0)),
        index_row(p.table.by_offset ? -1 : int(p.kv_len)),
        entry(p.table.turned ? int(p.heads) : 1),
        entries(uint32_t(p.table.entries)) {
    if (table) table += h * (p.table.turned ? 1 : p.table.entries);
    if (!query_segments) return;
    query_segments += b * p.rules.q_segments.batch;
    key_segments += b * p.rules.k_segments.batch;
  }

  FF_DEVICE bool segmented() const { return query_segments; }
  FF_DEVICE int64_t query_segment(int i) const { return query_segments[i * query_stride]; }
  FF_DEVICE int64_t key_segment(int j) const { return key_segments[j * key_stride]; }

  // Of `count` queries from the first on, by whole warps, each of which finds it by itself.
  FF_DEVICE SegmentRange segments_of(int first, int count, int q_len) const {
    SegmentRange range{key_segments, key_stride};
    if (!key_segments) return range;
    for (int i = first + lane_index(); i < first + count; i += 32) {
      const int64_t segment = query_segment(i < q_len ? i : q_len - 1);
      range.least = segment < range.least ? segment : range.least;
      range.largest = segment > range.largest ? segment : range.largest;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const int64_t least = from_lane(range.least, mask), largest = from_lane(range.largest, mask);
      range.least = least < range.least ? least : range.least;
      range.largest = largest > range.largest ? largest : range.largest;
    }
    return range;
  }

  // A score before masks, of a product that has its scale. NaN stays NaN.
  template <Cap kCap>
  FF_DEVICE float capped(float score) const {
    const float bound = 9.02f * cap;  // tanh of what is larger is 1 in float32
    const float near = score > bound ? bound : score < -bound ? -bound : score;
    const float x = near * inverse_cap, square = x * x;
    // tanh(x) / x = top / bottom, which errs by 2e-8.
    float top = fmaf(1.338442235e-8f, square, 2.063592829e-5f);
    float bottom = fmaf(7.790306204e-7f, square, 3.288528326e-4f);
    top = fmaf(top, square, 3.497464604e-3f), bottom = fmaf(bottom, square, 2.588438783e-2f);
    top = fmaf(top, square, 1.338269328e-1f), bottom = fmaf(bottom, square, 4.671601454e-1f);
    if constexpr (kCap == Cap::kNarrow) {
      return near * (fmaf(top, square, 1.0f) * reciprocal(fmaf(bottom, square, 1.0f)));
    } else {
      // As the CPU has it (cpu/softmax/scores.h): what is taken off is the smaller part, and so are
      // its errors; of small scores all is left.
      const float size = x < 0.0f ? -x : x, power = exp2(size * -2.88539008f);
      const float less = (bottom - top) * reciprocal(fmaf(bottom, square, 1.0f));
      const float end = score > cap ? cap : score < -cap ? -cap : score;
      return size <= 1.001f ? fmaf(-(near * square), less, near)
                            : fmaf(-end, 2.0f * power * reciprocal(1.0f + power), end);
    }
  }
  FF_DEVICE float biased(float score, int query, int key) const {
    const int distance = query + diagonal - key;
    return fmaf(-slope, float(distance < 0 ? -distance : distance), score);
  }
  FF_DEVICE bool positioned() const { return table; }
  // NaN where the index has no entry of the table, which a kernel cannot raise.
  FF_DEVICE float position(int query, int key) const {
    const auto number = uint32_t(index[int64_t(query) * index_row + key]);
    return number < entries ? table[int64_t(number) * entry] : __builtin_nanf("");
  }

 private:
  FF_DEVICE static int64_t from_lane(int64_t x, int mask) {
    const uint32_t low = shuffle_xor(uint32_t(uint64_t(x)), mask);
    const uint32_t high = shuffle_xor(uint32_t(uint64_t(x) >> 32), mask);
    return int64_t(uint64_t(high) << 32 | low);
  }
};

struct NoKinds {
  using Places = Diagonal;
  static constexpr bool kAny = false;
  static constexpr float sink = -__builtin_inff();

  FF_DEVICE NoKinds(const Attention&, int64_t, int64_t) {}
  FF_DEVICE static NoSegmentRange segments_of(int, int, int) { return {}; }
};

// What the sum of a lane begins with where the maximum of its row begins with a sink: one lane of a
// row has its weight.
FF_DEVICE float sink_weight(float sink, int lane_of_row) {
  return sink > -__builtin_inff() && lane_of_row == 0 ? 1.0f : 0.0f;
}

// What a kernel is built for: scores that stay raw products, scores in natural units, and the same
// with kinds, of keys of 16 bits or of 8.
struct Products {
  using Call = AttentionForward;
  static constexpr bool kFloat8 = false;
  static constexpr bool kNatural = false;
  using Kinds = NoKinds;
};
struct Natural {
  using Call = AttentionForward;
  static constexpr bool kFloat8 = false;
  static constexpr bool kNatural = true;
  using Kinds = NoKinds;
};
struct WithKinds {
  using Call = AttentionForward;
  static constexpr bool kFloat8 = false;
  static constexpr bool kNatural = true;
  using Kinds = ff::cuda::Kinds;
};
struct WithFloat8 {
  using Call = Float8Forward;
  static constexpr bool kFloat8 = true;
  static constexpr bool kNatural = true;
  using Kinds = ff::cuda::Kinds;
};

}  // namespace
}  // namespace ff::cuda
