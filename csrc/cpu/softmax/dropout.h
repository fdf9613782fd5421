// The random bits of dropout: a function of seed, head and position, the same on every backend
// (fastfusion/core/philox.py has the definition).
#pragma once

#include "mask.h"

namespace ff {
namespace {

// The softmax over keys, and that over queries of a bidirectional call.
constexpr uint32_t kRowStream = 0, kColumnStream = 1;

// Sixteen counters of Philox4x32-10 (Salmon et al., SC 2011) side by side, which the compiler
// vectorises: c[w] holds word w of all of them.
struct Philox {
  static constexpr int64_t kWide = 16;
  uint32_t c[4][kWide];

  void run(uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int64_t i = 0; i < kWide; ++i) {
        const uint64_t x = uint64_t(0xD2511F53u) * c[0][i], y = uint64_t(0xCD9E8D57u) * c[2][i];
        c[0][i] = uint32_t(y >> 32) ^ c[1][i] ^ k0;
        c[2][i] = uint32_t(x >> 32) ^ c[3][i] ^ k1;
        c[1][i] = uint32_t(y);
        c[3][i] = uint32_t(x);
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
  }
};

// factor[j][i] = keep_scale where dropout keeps the score of query i and the block's key j. A
// counter is a query and four keys. A function of its own: in a caller that has grown GCC 12 no
// longer keeps the rounds in registers, and calls took up to 1.5 times as long.
[[maybe_unused]] __attribute__((noinline)) void dropout_factors(const Scores& scores,
                                                                const Block& block, uint32_t stream,
                                                                float* factor) {
  const Attention& p = scores.p;
  const int64_t columns = scores.columns, count = block.count;
  const int64_t heads = p.all_heads ? p.all_heads : p.heads;
  const uint32_t slice = uint32_t((p.entry + scores.b) * heads + p.first_head + scores.h);
  const auto key = [&](int64_t k) { return block[k] + p.first_key; };
  Philox random;
  for (int64_t j = 0; j < count;) {
    const int64_t group = key(j) / 4;
    int64_t end = j;
    while (end < count && key(end) / 4 == group) ++end;
    for (int64_t i = 0; i < columns; i += Philox::kWide) {
      const int64_t wide = columns - i < Philox::kWide ? columns - i : Philox::kWide;
      for (int64_t l = 0; l < Philox::kWide; ++l) {
        const int64_t at = i + l < scores.queries.count ? i + l : 0;
        random.c[0][l] = uint32_t(group),
        random.c[1][l] = uint32_t(scores.queries[at] + p.first_query);
        random.c[2][l] = slice, random.c[3][l] = stream;
      }
      random.run(p.seed);
      for (int64_t k = j; k < end; ++k)
        for (int64_t l = 0; l < wide; ++l)
          factor[k * columns + i + l] =
              random.c[key(k) % 4][l] >= p.threshold ? p.keep_scale : 0.0f;
    }
    j = end;
  }
}

}  // namespace
}  // namespace ff
