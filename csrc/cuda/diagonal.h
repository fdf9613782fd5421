// What a causal call hides from a block of queries.
#pragma once

#include "calls.h"
#include "device.h"

namespace ff::cuda {
namespace {

// The first n of 64 bits.
FF_DEVICE uint64_t first_bits(int n) { return n <= 0 ? 0 : n >= 64 ? ~0ull : (1ull << n) - 1; }

// Query i sees key j where direction * (j - i) <= offset.
struct Diagonal {
  int direction;  // 0: it sees all; -1: the keys are those that have a diagonal
  int offset;

  FF_DEVICE explicit Diagonal(const Attention& p)
      : direction(causal(p) ? 1 - 2 * p.exchanged : 0), offset(causal(p) ? int(p.diagonal) : 0) {}

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

}  // namespace
}  // namespace ff::cuda
