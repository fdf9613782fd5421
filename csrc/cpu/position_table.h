// Position tables as kernels read them (PositionBias in calls.h): the entries of a head are written
// out once, in the order in which scores stand, for all batch entries; kernels gather nothing.
//
// By offset that is a line of q_len + kv_len - 1 numbers, from which the queries of a key read
// adjacent ones. By an index of each score it is as large as that, and heads are taken as many at a
// time as fit 16 MB, or one.
#pragma once

#include <vector>

#include "key_ranges.h"

namespace ff {

// As a call has it.
struct PositionTable {
  const float* data = nullptr;  // (H, entries) by strides
  int64_t entries = 0, head = 0, entry = 0;
  Integers index;  // (q_len, kv_len), or, `by_offset`, (1, q_len + kv_len - 1)
  bool by_offset = false;
};

// Moves an operand on, if there is one.
inline void skip_heads(View& view, Type type, int64_t heads) {
  if (view.data)
    view.data = static_cast<const char*>(view.data) + heads * view.head * size_of(type);
}

inline void skip_heads(MutableView& view, Type type, int64_t heads) {
  if (view.data) view.data = static_cast<char*>(view.data) + heads * view.head * size_of(type);
}

// A call for so many of the key heads, and the query heads that share them.
inline Attention key_heads_of(Attention p, int64_t first, int64_t count) {
  const int64_t members = p.heads / p.kv_heads, head = first * members;
  skip_heads(p.query, p.type, head), skip_heads(p.key, p.type, first);
  skip_heads(p.value, p.type, first), skip_heads(p.mask, p.mask_type, head);
  if (p.alibi.data) p.alibi.data += head * p.alibi.head;
  if (p.positions.data) p.positions.data += head * p.positions.head;
  if (p.sinks.data) p.sinks.data += head * p.sinks.head;
  if (p.all_heads == 0) p.all_heads = p.heads;
  p.first_head += head, p.kv_heads = count, p.heads = count * members;
  return p;
}

inline AttentionForward key_heads_of(AttentionForward p, int64_t first, int64_t count) {
  const int64_t head = p.heads / p.kv_heads * first;
  skip_heads(p.out, p.out_type(), head);
  if (p.lse.data) p.lse.data += head * p.lse.head;
  static_cast<Attention&>(p) = key_heads_of(static_cast<const Attention&>(p), first, count);
  return p;
}

inline AttentionBackward key_heads_of(AttentionBackward p, int64_t first, int64_t count) {
  const int64_t head = p.heads / p.kv_heads * first;
  skip_heads(p.grad_out, p.type, head), skip_heads(p.grad_query, p.type, head);
  skip_heads(p.grad_key, p.type, first), skip_heads(p.grad_value, p.type, first);
  if (p.grad_lse.data) p.grad_lse.data += head * p.grad_lse.head;
  if (p.grad_mask.values) p.grad_mask.values += head * p.grad_mask.head;
  if (p.grad_mask.sums) p.grad_mask.sums += head * p.grad_mask.head;
  if (p.grad_sinks) p.grad_sinks += head;
  static_cast<Attention&>(p) = key_heads_of(static_cast<const Attention&>(p), first, count);
  return p;
}

// The heads of a call, with what their table adds and, backward, where its gradient is summed up.
class FF_EXPORT PositionHeads {
 public:
  PositionHeads(const Attention&, const PositionTable&);

  // Whether the index has entries of the table alone.
  bool is_legal() const { return legal_; }

  // Calls body(call) for `p`, or for some of its heads after the other; `Call` is AttentionForward
  // or, where `gradient` is given, (H, entries), AttentionBackward, too. Of that the order of sums
  // is a matter of sizes alone.
  template <class Call, class Body>
  void for_parts(const Call& p, ParallelFor parallel, double* gradient, const Body& body) {
    if (p.batch * p.heads * p.q_len * p.kv_len == 0 || !table_.data) return body(p);
    const int64_t members = p.heads / p.kv_heads, most = heads_at_once(members);
    for (int64_t first = 0; first < p.kv_heads; first += most) {
      const int64_t left = p.kv_heads - first, count = left < most ? left : most;
      Call part = count == p.kv_heads ? p : key_heads_of(p, first, count);
      part.positions = write_out(first * members, count * members, parallel);
      if (!part.positions.data) {
        *p.out_of_memory = true;
        return;
      }
      if constexpr (requires { part.grad_positions; }) {
        if (gradient) part.grad_positions = sums_of(p.batch, part.heads);
        body(part);
        if (gradient) collect(first * members, part.heads, parallel, gradient);
      } else {
        body(part);
      }
    }
  }

 private:
  int64_t heads_at_once(int64_t members) const;
  PositionBias write_out(int64_t first, int64_t count, ParallelFor);
  PositionGradient sums_of(int64_t batch, int64_t heads);
  void collect(int64_t first, int64_t count, ParallelFor, double* gradient);

  PositionTable table_;
  bool legal_ = true;
  int64_t origin_ = 0, key_ = 0;  // the place of query 0 and key 0, and from a key to the next
  int64_t parts_ = 0;             // of the batch
  std::vector<int32_t> entries_;  // of the table, at each place of a head; as many as it has: none
  std::vector<double> sums_;  // at each place, head by head, of some batch entries and of others
};

}  // namespace ff
