#include "position_table.h"

#include <algorithm>

#include "task.h"

namespace ff {
namespace {

constexpr int64_t kMostLanes = 16;         // of a register, which reads behind the last query
constexpr int64_t kMostNumbers = 1 << 22;  // 16 MB
constexpr int64_t kMostSums = 1 << 21;     // likewise
constexpr int64_t kMostParts = 8;          // of the batch, whose sums are tasks of their own

// Calls body(h) for each of `count` heads.
template <class Body>
void for_heads(int64_t count, int64_t size, ParallelFor parallel, const Body& body) {
  const auto each = [](int64_t begin, int64_t end, const void* of) {
    for (int64_t h = begin; h < end; ++h) (*static_cast<const Body*>(of))(h);
  };
  run(parallel, count, 10.0 * double(count * size), each, body);
}

}  // namespace

PositionHeads::PositionHeads(const Attention& p, const PositionTable& table) : table_(table) {
  if (!table.data || p.q_len * p.kv_len == 0) return;
  const auto entry = [&](int64_t number) {
    legal_ = legal_ && 0 <= number && number < table_.entries;
    return legal_ ? int32_t(number) : 0;
  };
  const auto none = int32_t(table.entries);
  if (table.by_offset) {
    // By query less key: the other way round.
    const int64_t count = p.q_len + p.kv_len - 1;
    origin_ = p.kv_len - 1, key_ = -1;
    entries_.assign(size_t(count + kMostLanes), none);
    for (int64_t i = 0; i < count; ++i)
      entries_[size_t(i)] = entry(table.index.at(0, count - 1 - i));
    return;
  }
  key_ = (p.q_len + kMostLanes - 1) / kMostLanes * kMostLanes;
  entries_.assign(size_t(p.kv_len * key_), none);
  for (int64_t i = 0; i < p.q_len; ++i)
    for (int64_t j = 0; j < p.kv_len; ++j)
      entries_[size_t(j * key_ + i)] = entry(table.index.at(i, j));
}

int64_t PositionHeads::heads_at_once(int64_t members) const {
  return std::max<int64_t>(1, kMostNumbers / (members * int64_t(entries_.size())));
}

PositionBias PositionHeads::write_out(int64_t first, int64_t count, ParallelFor parallel) {
  const size_t size = entries_.size();
  // That of layers, in which no call has a table, and not fresh memory for each call.
  float* numbers = layer_scratch(size_t(count) * size);
  if (!numbers) return {};
  for_heads(count, int64_t(size), parallel, [&](int64_t h) {
    std::vector<float> own(size_t(table_.entries + 1));  // and 0 for places of none
    for (int64_t e = 0; e < table_.entries; ++e)
      own[size_t(e)] = table_.data[(first + h) * table_.head + e * table_.entry];
    float* to = numbers + size_t(h) * size;
    for (size_t i = 0; i < size; ++i) to[i] = own[size_t(entries_[i])];
  });
  return {numbers + origin_, int64_t(size), key_};
}

PositionGradient PositionHeads::sums_of(int64_t batch, int64_t heads) {
  const auto size = int64_t(entries_.size());
  const int64_t fitting = std::max<int64_t>(1, kMostSums / (heads * size));
  const int64_t parts = std::min({fitting, kMostParts, batch});
  const int64_t of_part = (batch + parts - 1) / parts;
  parts_ = (batch + of_part - 1) / of_part;
  sums_.assign(size_t(parts_ * heads * size), 0.0);
  return {sums_.data() + origin_, of_part, heads * size, size, key_};
}

void PositionHeads::collect(int64_t first, int64_t count, ParallelFor parallel, double* gradient) {
  const size_t size = entries_.size();
  for_heads(count, int64_t(size) * parts_, parallel, [&](int64_t h) {
    double* sums = sums_.data() + size_t(h) * size;
    for (int64_t part = 1; part < parts_; ++part) {
      const double* more = sums + size_t(part * count) * size;
      for (size_t i = 0; i < size; ++i) sums[i] += more[i];
    }
    std::vector<double> own(size_t(table_.entries + 1));
    for (size_t i = 0; i < size; ++i) own[size_t(entries_[i])] += sums[i];
    for (int64_t e = 0; e < table_.entries; ++e)
      gradient[(first + h) * table_.entries + e] = own[size_t(e)];
  });
}

}  // namespace ff
