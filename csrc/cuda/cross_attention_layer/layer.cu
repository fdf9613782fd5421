// The fused cross-attention layer: its launches.
#include "projections.cuh"

namespace ff::cuda {
namespace {

// Offsets into the workspace, in bytes. The projections write what modules give to the attention:
// (B, L, H, D) queries and (B, L, 2, H, D) keys and values.
struct Layout {
  int64_t queries, attended, keys, attention;

  explicit Layout(const CrossAttentionLayer& p) {
    const auto align = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    const int64_t inner = p.heads * p.head_dim, size = align(p.batch * p.q_len * inner * 2);
    queries = 0, attended = size, keys = 2 * size;
    attention = keys + align(p.batch * p.kv_len * 2 * inner * 2);
  }
};

AttentionForward attention_of(const CrossAttentionLayer& p, char* workspace) {
  const Layout layout(p);
  const int64_t inner = p.heads * p.head_dim;
  char* const keys = workspace + layout.keys;
  AttentionForward call;
  static_cast<Attention&>(call) = p;
  call.kv_heads = p.heads, call.value_dim = p.head_dim;
  call.query = {workspace + layout.queries, p.q_len * inner, p.head_dim, inner, 1};
  call.key = {keys, p.kv_len * 2 * inner, p.head_dim, 2 * inner, 1};
  call.value = call.key;
  call.value.data = keys + inner * 2;
  call.out = {workspace + layout.attended, p.q_len * inner, p.head_dim, inner, 1};
  return call;
}

Projection projection(const CrossAttentionLayer& p, const Sequence& x, int64_t length,
                      int64_t width, const Linear& linear, int64_t features, void* out) {
  Projection made;
  made.x = x, made.rows = int(p.batch * length), made.length = int(length);
  made.width = int(width), made.linear = linear, made.features = int(features), made.out = out;
  return made;
}

const char* run(const CrossAttentionLayer& p, const Projection& first, const Projection& second,
                int capability, void* stream) {
  return p.type == Type::kFloat16 ? run_projections<Half>(first, second, capability, stream)
                                  : run_projections<BFloat16>(first, second, capability, stream);
}

}  // namespace

int64_t cross_attention_layer_workspace(const CrossAttentionLayer& p, int capability) {
  if (p.batch * p.q_len == 0) return 0;
  return Layout(p).attention + attention_workspace(attention_of(p, nullptr), capability);
}

const char* cross_attention_layer_path(const CrossAttentionLayer& p, int capability) {
  return attention_path(attention_of(p, nullptr), capability);
}

const char* cross_attention_layer(const CrossAttentionLayer& p, void* workspace, void* stream) {
  if (p.type != Type::kFloat16 && p.type != Type::kBFloat16) return "this dtype has no kernel";
  const int capability = compute_capability();
  if (!runs(p.type, capability)) return "bfloat16 needs compute capability 8.0";
  if (p.dropout) return "the CUDA kernels have no dropout";
  constexpr int64_t kMost = 1 << 30;
  const int64_t inner = p.heads * p.head_dim;
  for (const int64_t size :
       {p.batch * p.q_len, p.batch * p.kv_len, p.query_dim, p.context_dim, 2 * inner, p.out_dim})
    if (size > kMost) return "more than 2^30 rows or columns";
  if (p.batch * p.q_len == 0) return nullptr;

  char* const memory = static_cast<char*>(workspace);
  const Layout layout(p);
  Projection queries =
      projection(p, p.x, p.q_len, p.query_dim, p.q_proj, inner, memory + layout.queries);
  Projection keys =
      projection(p, p.context, p.kv_len, p.context_dim, p.kv_proj, 2 * inner, memory + layout.keys);
  Projection out = projection(p, {memory + layout.attended, p.q_len * inner, inner}, p.q_len, inner,
                              p.out_proj, p.out_dim, p.out);
  queries.norm = p.query_norm, keys.norm = p.context_norm, out.residual = p.residual;

  const char* error = run(p, queries, keys, capability, stream);
  if (!error) error = attention_forward(attention_of(p, memory), memory + layout.attention, stream);
  return error ? error : run(p, out, {}, capability, stream);
}

}  // namespace ff::cuda
