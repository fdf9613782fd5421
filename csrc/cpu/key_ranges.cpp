#include "key_ranges.h"

#include <algorithm>

namespace ff {
namespace {

// Keys of one number from `first` to before `end`, all of them or adjacent ones.
struct Run {
  int64_t number;
  int32_t first, end;

  bool operator<(const Run& other) const {
    return number != other.number ? number < other.number : first < other.first;
  }
};

// The segments of a batch entry's keys, by number.
class KeySegments {
 public:
  KeySegments(const Integers& numbers, int64_t b, int64_t length) {
    std::vector<Run> pieces;
    for (int64_t j = 0; j < length; ++j) {
      const int64_t number = numbers.at(b, j);
      if (pieces.empty() || pieces.back().number != number)
        pieces.push_back({number, int32_t(j), int32_t(j)});
      ++pieces.back().end;
    }
    if (!std::is_sorted(pieces.begin(), pieces.end())) std::sort(pieces.begin(), pieces.end());
    for (const Run& piece : pieces) {
      if (segments_.empty() || segments_.back().number != piece.number) {
        segments_.push_back(piece);
      } else {
        segments_.back().end = piece.end;
        scattered_ = true;
      }
    }
  }

  // Whether some segment has keys of others in its range.
  bool scattered() const { return scattered_; }

  // The place of a number among all, or -1.
  int32_t find(int64_t number) const {
    const auto at = std::lower_bound(segments_.begin(), segments_.end(), Run{number, 0, 0});
    return at != segments_.end() && at->number == number ? int32_t(at - segments_.begin()) : -1;
  }

  const Run& operator[](int32_t place) const { return segments_[size_t(place)]; }

 private:
  std::vector<Run> segments_;
  bool scattered_ = false;
};

// Calls body(i, place of the i-th number among the segments).
template <class Body>
void for_places(const KeySegments& segments, const Integers& numbers, int64_t b, int64_t length,
                const Body& body) {
  int64_t before = 0;
  int32_t place = -1;
  for (int64_t i = 0; i < length; ++i) {
    const int64_t number = numbers.at(b, i);
    if (i == 0 || number != before) place = segments.find(number);
    before = number;
    body(i, place);
  }
}

}  // namespace

KeyRangeTable key_ranges(const Attention& p) {
  const RangeRules& rules = p.rules;
  KeyRangeTable table;
  // One element more: of an empty vector there is no address, which would say that there are none.
  table.first.resize(size_t(p.batch * p.q_len + 1));
  table.end.resize(table.first.size());
  table.scattered.resize(size_t(p.batch + 1));
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t* first = table.first.data() + b * p.q_len;
    int32_t* end = table.end.data() + b * p.q_len;
    const int64_t prefix = rules.prefixes.data ? p.within(rules.prefixes.at(b)) : 0;
    for (int64_t i = 0; i < p.q_len; ++i) {
      first[i] = int32_t(p.first_seen_by(b, i));
      end[i] = int32_t(std::max(p.keys_seen_by(b, i), prefix));
    }
    if (!rules.q_segments.data) continue;
    const KeySegments segments(rules.k_segments, b, p.kv_len);
    for_places(segments, rules.q_segments, b, p.q_len, [&](int64_t i, int32_t place) {
      if (place < 0) {
        first[i] = end[i] = 0;
      } else {
        first[i] = std::max(first[i], segments[place].first);
        end[i] = std::min(end[i], segments[place].end);
      }
    });
    if (!segments.scattered()) continue;
    table.scattered[size_t(b)] = {1};
    table.q_segments.resize(size_t(p.batch * p.q_len));
    table.k_segments.resize(size_t(p.batch * p.kv_len));
    int32_t* of_queries = table.q_segments.data() + b * p.q_len;
    int32_t* of_keys = table.k_segments.data() + b * p.kv_len;
    for_places(segments, rules.q_segments, b, p.q_len,
               [&](int64_t i, int32_t place) { of_queries[i] = place; });
    for_places(segments, rules.k_segments, b, p.kv_len,
               [&](int64_t j, int32_t place) { of_keys[j] = place; });
  }
  return table;
}

}  // namespace ff
