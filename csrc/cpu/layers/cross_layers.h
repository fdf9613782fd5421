// Cross-attention with its projections, and the fusion of two sequences (calls.h), in one call
// each.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/bidirectional/forward.h"
#include "steps.h"

namespace ff {
namespace {

// The steps of a CrossAttentionLayer.
template <class HalfMath>
struct CrossAttentionSteps {
  const LayerSteps<HalfMath>& steps;
  const CrossAttentionLayer& p;

  int64_t inner() const { return p.attention.heads * p.attention.head_dim; }
  LayerRows query() const {
    return {p.query, p.attention.batch, p.attention.q_len, p.query_dim, p.query_row};
  }
  LayerRows context() const {
    return {p.context, p.attention.batch, p.attention.kv_len, p.context_dim, p.context_row};
  }
  LayerRows value_context() const {
    return {p.value_context, p.attention.batch, p.attention.kv_len, p.value_dim, p.value_row};
  }
  int64_t of_query() const { return steps.bytes(query().count(), inner()); }
  // Of keys, or of values.
  int64_t of_either() const { return p.context ? steps.bytes(context().count(), inner()) : 0; }
  int64_t of_context() const { return 2 * of_either(); }
  int64_t of_query_norm() const {
    return p.query_norm ? steps.bytes(query().count(), p.query_dim) : 0;
  }
  int64_t of_context_norm() const {
    return p.context_norm ? steps.bytes(context().count(), p.context_dim) : 0;
  }
  int64_t bytes() const {
    const int64_t narrow = steps.is_narrow(p.attention) ? of_context() : 0;
    return 2 * of_query() + of_context() + narrow + of_query_norm() + of_context_norm();
  }

  // In `memory` of so many bytes. `out` may be `residual`.
  void run(char* memory, ParallelFor parallel) const {
    AttentionForward attention = p.attention;
    const int64_t inner = this->inner();
    const bool narrow = steps.is_narrow(attention);
    char *const queries = memory, *const attended = memory + of_query();
    char *const keys = attended + of_query(), *const narrow_keys = keys + of_context();
    char* const norms = narrow ? narrow_keys + of_context() : narrow_keys;

    const LayerRows asking =
        p.query_norm ? steps.normalize(*p.query_norm, query(), norms) : query();
    const LayerRows asked_by = steps.product(p.q_proj, asking, inner, queries);
    attention.query =
        steps.heads(attention, steps.narrowed(attention, asked_by, attended), 0, inner);
    if (p.context && context().count() > 0) {
      const LayerRows asked =
          p.context_norm ? steps.normalize(*p.context_norm, context(), norms + of_query_norm())
                         : context();
      const auto* by = p.kv_proj.each;
      const LayerRows wide = p.value_context ? steps.product(by[0], asked, inner, keys)
                                             : steps.product(p.kv_proj, asked, 2 * inner, keys);
      const LayerRows first = steps.narrowed(attention, wide, narrow_keys);
      attention.key = steps.heads(attention, first, 0, inner);
      if (p.value_context) {
        const LayerRows values = steps.product(by[1], value_context(), inner, keys + of_either());
        const LayerRows second = steps.narrowed(attention, values, narrow_keys + of_either());
        attention.value = steps.heads(attention, second, 0, inner);
      } else {
        attention.value = steps.heads(attention, first, 1, inner);
      }
    }
    char* const out_of_heads = narrow ? queries : attended;
    attention.out = steps.joined(out_of_heads, attention.q_len, inner, attention.head_dim);
    if (!*attention.out_of_memory) attention_forward<HalfMath>(attention, parallel);

    const LayerRows joined = steps.side_by_side(query(), out_of_heads, inner);
    const LayerRows gathered = steps.widened(attention, joined, attended);
    const LayerRows residual{p.residual, query().batch, query().length, p.out_dim, p.residual_row};
    steps.product(p.out_proj, gathered, p.out_dim, p.out, p.residual ? &residual : nullptr);
  }
};

template <class HalfMath>
void cross_attention_layer(const CrossAttentionLayer& p, ParallelFor parallel) {
  const LayerSteps<HalfMath> steps(p.type, p.attention, parallel);
  const CrossAttentionSteps<HalfMath> cross{steps, p};
  if (cross.query().count() == 0) return;
  if (char* memory = steps.memory(cross.bytes())) cross.run(memory, parallel);
}

// What a stream of a CrossModalLayer has in memory.
template <class HalfMath>
struct StreamSteps {
  const LayerSteps<HalfMath>& steps;
  const CrossModalLayer& p;
  const FusionStream& stream;
  int64_t inner;

  LayerRows x() const {
    return {stream.x, p.attention.batch, stream.length, stream.width, stream.x_row};
  }
  int64_t widest() const {
    const int64_t columns = 2 * inner > stream.hidden ? 2 * inner : stream.hidden;
    return steps.bytes(x().count(), columns);
  }
  int64_t of_heads() const { return steps.bytes(x().count(), inner); }
  int64_t of_tokens() const { return steps.bytes(x().count(), stream.width); }
  int64_t bytes() const { return widest() + of_heads() + 2 * of_tokens(); }

  // What the heads have gathered, as the output projection takes it.
  char* attended(char* memory) const { return memory + widest(); }

  // Where the heads write that: an attention in bfloat16 between tokens of float32 reads a copy of
  // its operands from `attended`, and the operands themselves have had their time.
  char* out_of_heads(char* memory) const {
    return steps.is_narrow(p.attention) ? memory : attended(memory);
  }

  // What scores are made of, and values, as the attention reads them.
  LayerRows project(char* memory) const {
    char* const normed = attended(memory) + of_heads();
    const LayerRows scored = p.norm_first ? steps.normalize(stream.norm1, x(), normed) : x();
    const LayerRows wide = steps.product(stream.in_proj, scored, 2 * inner, memory);
    return steps.narrowed(p.attention, wide, attended(memory));
  }

  // The output, from what the heads have gathered.
  void finish(char* memory) const {
    char *const normed = attended(memory) + of_heads(), *const sum = normed + of_tokens();
    const LayerRows joined = steps.side_by_side(x(), out_of_heads(memory), inner), tokens = x();
    const LayerRows gathered = steps.widened(p.attention, joined, attended(memory));
    LayerRows y = steps.product(stream.out_proj, gathered, stream.width, sum, &tokens);
    if (!p.norm_first) y = steps.normalize(stream.norm1, y, sum);
    const LayerRows fed = p.norm_first ? steps.normalize(stream.norm2, y, normed) : y;
    const LayerRows hidden =
        steps.product(stream.linear1, fed, stream.hidden, memory, nullptr, p.activation);
    const LayerRows out = steps.product(stream.linear2, hidden, stream.width, stream.out, &y);
    if (!p.norm_first) steps.normalize(stream.norm2, out, stream.out);
  }
};

template <class HalfMath>
void cross_modal_layer(const CrossModalLayer& p, ParallelFor parallel) {
  const LayerSteps<HalfMath> steps(p.type, p.attention, parallel);
  BidirectionalForward attention = p.attention;
  const int64_t dim = attention.head_dim, inner = attention.heads * dim;
  const StreamSteps<HalfMath> queries{steps, p, p.streams[0], inner};
  const StreamSteps<HalfMath> keys{steps, p, p.streams[1], inner};
  char* memory = steps.memory(queries.bytes() + keys.bytes());
  if (!memory) return;
  char* const behind = memory + queries.bytes();

  const LayerRows of_queries = queries.project(memory), of_keys = keys.project(behind);
  attention.query = steps.heads(attention, of_queries, 0, inner);
  attention.query_value = steps.heads(attention, of_queries, 1, inner);
  attention.key = steps.heads(attention, of_keys, 0, inner);
  attention.value = steps.heads(attention, of_keys, 1, inner);
  attention.out_q = steps.joined(queries.out_of_heads(memory), attention.q_len, inner, dim);
  attention.out_k = steps.joined(keys.out_of_heads(behind), attention.kv_len, inner, dim);
  if (!*attention.out_of_memory) bidirectional_forward<HalfMath>(attention, parallel);
  queries.finish(memory);
  keys.finish(behind);
}

}  // namespace
}  // namespace ff
