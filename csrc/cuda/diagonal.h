// Which keys a block of queries sees by their places.
#pragma once

#include "calls.h"
#include "device.h"

namespace ff::cuda {
namespace {

// The first n of 64 bits.
FF_DEVICE uint64_t first_bits(int n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }

// Of a causal call or none: query i sees key j where direction * (j - i) <= offset.
struct Diagonal {
  int direction;  // 0: it sees all; -1: the keys are those that have a diagonal
  int offset;

  FF_DEVICE Diagonal(const Attention& p, int64_t)
      : direction(causal(p) ? 1 - 2 * p.exchanged : 0), offset(causal(p) ? int(p.diagonal) : 0) {}

  FF_DEVICE bool any() const { return direction != 0; }

  FF_DEVICE bool hides(int query, int key) const { return direction * (key - query) > offset; }

  // Whether it hides any of so many keys from any of so many queries, from these on.
  FF_DEVICE bool crosses(int query, int queries, int key, int keys) const {
    return direction > 0 ? hides(query, key + keys - 1) : hides(query + queries - 1, key);
  }

  // Bit by bit, which of the 64 keys from `key` on a query sees; only of a causal call.
  FF_DEVICE uint64_t seen(int query, int key) const {
    const int limit = direction > 0 ? query + offset + 1 - key : query - offset - key;
    return direction > 0 ? first_bits(limit) : ~first_bits(limit);
  }

  // The keys [begin, end) without those that it hides from all of the queries.
  FF_DEVICE void limit(int query, int queries, int& begin, int& end) const {
    if (direction > 0) {
      const int seen = query + queries + offset;
      end = seen < 0 ? 0 : seen < end ? seen : end;
    } else if (direction < 0 && query - offset > begin) {
      begin = query - offset;
    }
  }

 private:
  // Windows are not run here, `right` is 0 or kEndless: its upper half says which. The flag of all
  // 64 bits would be kept in a register, one more than tiles of 64 columns have on sm_90.
  FF_DEVICE static bool causal(const Attention& p) {
    static_assert(kEndless >> 32 != 0);
    return int(p.right >> 32) == 0;
  }
};

// Of a window, a causal mask and a prefix, for kernels with kinds: query i sees the keys from
// first(i) to before end(i), neither of which falls from one query to the next.
struct Bounds {
  int64_t before, behind;       // from i + before to i + behind, but for the prefix
  int all_before, keys_before;  // so many queries see the keys of all places before their own; so
                                // many keys are seen by all queries of places before
  int kv_len;

  FF_DEVICE Bounds(const Attention& p, int64_t b)
      : before(p.exchanged ? -p.diagonal - p.right : p.diagonal - p.left),
        behind(p.exchanged ? p.left - p.diagonal : p.diagonal + p.right),
        all_before(0),
        keys_before(0),
        kv_len(int(p.kv_len)) {
    if (!p.rules.prefixes.data) return;
    const int64_t prefix = p.rules.prefixes.at(b);
    if (p.exchanged) {
      all_before = prefix < p.q_len ? int(prefix) : int(p.q_len);
    } else {
      keys_before = within(prefix);
    }
  }

  FF_DEVICE int first(int query) const { return query < all_before ? 0 : within(query + before); }
  FF_DEVICE int end(int query) const {
    const int end = within(query + behind + 1);
    return end < keys_before ? keys_before : end;
  }

  // The same as a diagonal's.
  FF_DEVICE static constexpr bool any() { return true; }
  FF_DEVICE bool hides(int query, int key) const { return key < first(query) || key >= end(query); }
  FF_DEVICE bool crosses(int query, int queries, int key, int keys) const {
    return key < first(query + queries - 1) || key + keys > end(query);
  }
  FF_DEVICE uint64_t seen(int query, int key) const {
    return first_bits(end(query) - key) & ~first_bits(first(query) - key);
  }
  // The same of any of so many queries: others need not be read.
  FF_DEVICE uint64_t reach(int query, int queries, int key) const {
    return first_bits(end(query + queries - 1) - key) & ~first_bits(first(query) - key);
  }
  FF_DEVICE void limit(int query, int queries, int& begin, int& end) const {
    const int first = this->first(query), last = this->end(query + queries - 1);
    begin = first > begin ? first : begin;
    end = last < end ? last : end;
  }

 private:
  FF_DEVICE int within(int64_t key) const { return key < 0 ? 0 : key > kv_len ? kv_len : int(key); }
};

}  // namespace
}  // namespace ff::cuda
