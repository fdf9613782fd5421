// A Transformer encoder layer (Vaswani et al., "Attention Is All You Need", 2017, section 3.1) in
// one call:
//
//     norm_first                               otherwise
//     normed = norm1(x)                        heads  = in_proj(x)
//     heads  = in_proj(normed)                 y      = out_proj(attention(heads)) + x
//     y      = out_proj(attention(heads)) + x  y      = norm1(y)
//     normed = norm2(y)                        out    = linear2(linear1(y)) + y
//     out    = linear2(linear1(normed)) + y    out    = norm2(out)
#pragma once

#include "cpu/attention/attention.h"
#include "steps.h"

namespace ff {
namespace {

template <class HalfMath>
void encoder_layer(const EncoderLayer& p, ParallelFor parallel) {
  const LayerSteps<HalfMath> steps(p.type, p.attention, parallel);
  AttentionForward attention = p.attention;
  const int64_t width = p.width, length = attention.q_len, dim = attention.head_dim;
  const LayerRows x{p.x, attention.batch, length, width, p.x_row, p.packed};
  if (x.count() == 0) return;
  const int64_t one = steps.bytes(x.count(), width);
  const int64_t widest = steps.bytes(x.count(), 3 * width > p.hidden ? 3 * width : p.hidden);
  char* memory = steps.memory(widest + 2 * one);
  if (!memory) return;
  char *const wide = memory, *const attended = memory + widest, *const sum = attended + one;
  char* const normed = attended;  // one is read before the other is written
  const bool narrow = steps.is_narrow(attention);

  const LayerRows scored = p.norm_first ? steps.normalize(p.norm1, x, normed) : x;
  const LayerRows wide_heads = steps.product(p.in_proj, scored, 3 * width, wide);
  // Three parts of half the size fit where `attended` and `sum` are.
  const LayerRows heads = steps.narrowed(attention, wide_heads, attended);
  attention.query = steps.heads(attention, heads, 0, width);
  attention.key = steps.heads(attention, heads, 1, width);
  attention.value = steps.heads(attention, heads, 2, width);
  char* const out_of_heads = narrow ? wide : attended;
  attention.out = steps.joined(out_of_heads, length, width, dim);
  if (*attention.out_of_memory) return;
  if (p.packed.data) {
    varlen_forward(attention, {p.packed.count, p.packed.data, p.packed.data, false}, parallel);
  } else {
    attention_forward<HalfMath>(attention, parallel);
  }

  const LayerRows joined = steps.side_by_side(x, out_of_heads, width);
  const LayerRows gathered = steps.widened(attention, joined, attended);
  LayerRows y = steps.product(p.out_proj, gathered, width, sum, &x);
  if (!p.norm_first) y = steps.normalize(p.norm1, y, sum);
  const LayerRows fed = p.norm_first ? steps.normalize(p.norm2, y, normed) : y;
  const LayerRows hidden = steps.product(p.linear1, fed, p.hidden, wide, nullptr, p.activation);
  const LayerRows out = steps.product(p.linear2, hidden, width, p.out, &y);
  if (!p.norm_first) steps.normalize(p.norm2, out, p.out);
}

}  // namespace
}  // namespace ff
