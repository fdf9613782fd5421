// A Transformer decoder layer (Vaswani et al., "Attention Is All You Need", 2017, section 3.1) in
// one call:
//
//     norm_first                               otherwise
//     normed = norm1(x)                        heads  = in_proj(x)
//     heads  = in_proj(normed)                 y      = out_proj(attention(heads)) + x
//     y      = out_proj(attention(heads)) + x  y      = norm1(y)
//     y      = to_memory(norm2(y)) + y         y      = norm2(to_memory(y) + y)
//     normed = norm3(y)                        out    = linear2(linear1(y)) + y
//     out    = linear2(linear1(normed)) + y    out    = norm3(out)
//
// With a cache the keys and values of x go behind those of the tokens before, and attention reads
// all of them there.
#pragma once

#include "cross_layers.h"

namespace ff {
namespace {

// Keys and values of x, side by side behind the queries of its rows, to where they are kept.
struct CacheRows {
  const DecoderLayer& p;
  const char* heads;  // the rows of queries, keys and values

  void run(int64_t index) const {
    const AttentionForward& a = p.attention;
    const int64_t entry = index / a.heads, head = index % a.heads;
    const int64_t size = size_of(a.type), row = 3 * p.width * size;
    const char* from = heads + entry * a.q_len * row + (p.width + head * a.head_dim) * size;
    for (int64_t i = 0; i < a.q_len; ++i, from += row) {
      copy(p.key_cache, entry, head, p.past + i, from);
      copy(p.value_cache, entry, head, p.past + i, from + p.width * size);
    }
  }

 private:
  void copy(const MutableView& to, int64_t entry, int64_t head, int64_t token,
            const char* from) const {
    const int64_t size = size_of(p.attention.type), dim = p.attention.head_dim;
    char* row =
        static_cast<char*>(to.data) + (entry * to.batch + head * to.head + token * to.row) * size;
    if (to.column == 1) {
      __builtin_memcpy(row, from, size_t(dim * size));
    } else {
      for (int64_t k = 0; k < dim; ++k)
        __builtin_memcpy(row + k * to.column * size, from + k * size, size_t(size));
    }
  }
};

inline void write_to_cache(const DecoderLayer& p, const void* heads, ParallelFor parallel) {
  const auto some = [](int64_t begin, int64_t end, const void* context) {
    for (int64_t i = begin; i < end; ++i) static_cast<const CacheRows*>(context)->run(i);
  };
  const AttentionForward& a = p.attention;
  run(parallel, a.batch * a.heads, 4.0 * double(a.batch * a.q_len) * double(p.width), some,
      CacheRows{p, static_cast<const char*>(heads)});
}

template <class HalfMath>
void decoder_layer(const DecoderLayer& p, ParallelFor parallel) {
  const LayerSteps<HalfMath> steps(p.type, p.attention, parallel);
  AttentionForward attention = p.attention;
  const int64_t width = p.width, length = attention.q_len;
  const LayerRows x{p.x, attention.batch, length, width, p.x_row};
  if (x.count() == 0) return;
  const int64_t one = steps.bytes(x.count(), width);
  const int64_t widest = steps.bytes(x.count(), 3 * width > p.hidden ? 3 * width : p.hidden);
  CrossAttentionLayer to_memory = p.to_memory;
  to_memory.query_dim = to_memory.out_dim = width;
  to_memory.query_row = to_memory.residual_row = width;
  to_memory.query_norm = p.norm_first ? &p.norm2 : nullptr;
  const CrossAttentionSteps<HalfMath> cross{steps, to_memory};
  const bool narrow = steps.is_narrow(attention);
  // Before and behind attention to the memory what is between is free.
  const int64_t between = widest + (narrow ? 2 : 1) * one;
  const int64_t of_memory = p.has_memory ? cross.bytes() : 0;
  char* memory = steps.memory(one + (of_memory > between ? of_memory : between));
  if (!memory) return;
  char *const sum = memory, *const wide = sum + one, *const attended = wide + widest;
  char* const normed = attended;  // one is read before the other is written

  const LayerRows scored = p.norm_first ? steps.normalize(p.norm1, x, normed) : x;
  const LayerRows wide_heads = steps.product(p.in_proj, scored, 3 * width, wide);
  const LayerRows heads = steps.narrowed(attention, wide_heads, attended);
  attention.query = steps.heads(attention, heads, 0, width);
  if (p.key_cache.data) {
    const auto all = [](const MutableView& v) {
      return View{v.data, v.batch, v.head, v.row, v.column};
    };
    if (!*attention.out_of_memory) write_to_cache(p, heads.data, parallel);
    attention.key = all(p.key_cache), attention.value = all(p.value_cache);
  } else {
    attention.key = steps.heads(attention, heads, 1, width);
    attention.value = steps.heads(attention, heads, 2, width);
  }
  char* const out_of_heads = narrow ? wide : attended;
  attention.out = steps.joined(out_of_heads, length, width, attention.head_dim);
  if (!*attention.out_of_memory) attention_forward<HalfMath>(attention, parallel);

  const LayerRows joined = steps.side_by_side(x, out_of_heads, width);
  const LayerRows gathered = steps.widened(attention, joined, attended);
  LayerRows y = steps.product(p.out_proj, gathered, width, sum, &x);
  if (!p.norm_first) y = steps.normalize(p.norm1, y, sum);
  if (p.has_memory) {
    to_memory.query = to_memory.residual = to_memory.out = sum;
    cross.run(wide, parallel);
    if (!p.norm_first) y = steps.normalize(p.norm2, y, sum);
  }
  const LayerRows fed = p.norm_first ? steps.normalize(p.norm3, y, normed) : y;
  const LayerRows hidden = steps.product(p.linear1, fed, p.hidden, wide, nullptr, p.activation);
  const LayerRows out = steps.product(p.linear2, hidden, width, p.out, &y);
  if (!p.norm_first) steps.normalize(p.norm3, out, p.out);
}

}  // namespace
}  // namespace ff
