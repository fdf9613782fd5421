// Calls as kernels of every device take them: plain pointers, sizes and strides, no framework.
//
// Letters: B batch, H heads, G kv heads, Lq query length, Lk key length, D head dim, Dv value dim.
// Strides count elements and may be 0 or any other number.
#pragma once

#include <cstdint>

namespace ff {

// A bool of the caller's, of which every byte but 0 is true: a mask may be a view of a picture. A
// `bool` in C++ is 0 or 1, and the compiler counts and selects with it as such.
struct Bool {
  uint8_t byte;

  constexpr operator bool() const { return byte != 0; }
};
static_assert(sizeof(Bool) == 1);

enum class Type : int32_t { kFloat32, kBFloat16, kFloat16, kBool, kUInt8 };

// Bytes of a number.
constexpr int64_t size_of(Type type) {
  return type == Type::kFloat32 ? 4 : type == Type::kBool || type == Type::kUInt8 ? 1 : 2;
}

// A (B, heads, rows, columns) operand somewhere in memory.
struct View {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

struct MutableView {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// Numbers of ALiBi, one for each head of each entry: a score falls by `slope` for every key between
// the query's place and the key. No data: none.
struct Slopes {
  const float* data = nullptr;
  int64_t batch = 0, head = 0;

  constexpr float at(int64_t b, int64_t h) const { return data[b * batch + h * head]; }
};

// Integers of a call, (B, L) by strides. No data: none.
struct Integers {
  const int64_t* data = nullptr;
  int64_t batch = 0, place = 0;

  constexpr int64_t at(int64_t b, int64_t i) const { return data[b * batch + i * place]; }
};

// Lengths of prefixes, (B). No data: none.
struct Prefixes {
  const int64_t* data = nullptr;
  int64_t batch = 0;

  constexpr int64_t at(int64_t b) const { return data[b * batch]; }
};

// What says which keys queries see beside the diagonal and the window.
struct RangeRules {
  Integers q_segments, k_segments;  // a query sees the keys of its own; both or none
  Prefixes prefixes;                // so many keys are seen from the left of the diagonal, too

  constexpr bool any() const { return q_segments.data || prefixes.data; }
};

// The keys that each query sees, where a rule of places does not say it: those from `first` to
// before `end`, (B, Lq), none if they are not in order. In an entry that is `scattered` it sees
// only those in between whose segment is its own. No data: the rule does.
struct KeyRanges {
  const int32_t *first = nullptr, *end = nullptr;
  const Bool* scattered = nullptr;  // (B)
  const int32_t *q_segments = nullptr,
                *k_segments = nullptr;  // (B, Lq), (B, Lk), of scattered ones
};

// Attention sinks (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024;
// of gpt-oss): a logit for each head, which takes weight as a score does and has no value. No data:
// none.
struct Sinks {
  const float* data = nullptr;
  int64_t head = 0;

  constexpr float at(int64_t h) const { return data[h * head]; }
};

// What position tables add to scores (cpu/position_table.h): numbers of each head, where those of
// adjacent queries are adjacent, with memory for a register behind the last. No data: none.
struct PositionBias {
  const float* data = nullptr;  // of the first head, query and key
  int64_t head = 0, key = 0;

  const float* at(int64_t h, int64_t query, int64_t j) const {
    return data + h * head + j * key + query;
  }
};

// Where the gradient of these goes, likewise: `entries` batch entries share their sums, which the
// caller has zeroed. No sums: it is not wanted.
struct PositionGradient {
  double* sums = nullptr;
  int64_t entries = 1, part = 0, head = 0, key = 0;

  double* at(int64_t b, int64_t h, int64_t query, int64_t j) const {
    return sums + b / entries * part + h * head + j * key + query;
  }
};

// A position table as it is given, of CUDA's kernels: (H, entries), or `turned` (entries, H), and
// which entry a score has, (Lq, Lk), or by offset of key to query (Lq + Lk - 1), all without gaps.
// As large as PositionBias, in whose place it stands. No data: none.
struct PositionEntries {
  const float* data;
  const int64_t* index;
  int32_t entries;
  bool turned, by_offset;
};
static_assert(sizeof(PositionEntries) == sizeof(PositionBias));

// How far a query sees that sees all keys: beyond any length, and sums of it with lengths are
// exact.
constexpr int64_t kEndless = int64_t{1} << 40;

struct Attention {
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  Type type;   // of query, key, value and out
  View query;  // (B, H, Lq, D)
  View key;    // (B, G, Lk, D); head h reads key head h / (H / G)
  View value;  // (B, G, Lk, Dv)

  View mask;  // (B, H, Lq, Lk) by strides of 0 where it broadcasts; no data: none
  Type mask_type = Type::kBool;
  const Bool* padding = nullptr;  // (B, Lk), true = the key is never read
  int64_t padding_batch = 0, padding_column = 0;

  float scale;
  float softcap = 0.0f;  // above 0: scores become softcap * tanh(score / softcap)

  // Query i stands beside key i + diagonal, and sees as many keys left of it and right of it.
  int64_t diagonal = 0;
  int64_t left = kEndless, right = kEndless;
  RangeRules rules;
  KeyRanges ranges;  // what all of these say, for the CPU's kernels (cpu/key_ranges.h)
  Slopes alibi;
  union {
    PositionBias positions = {};
    PositionEntries table;  // both begin with their data
  };
  Sinks sinks;
  bool exchanged = false;  // queries and keys have changed places: the keys have the diagonal

  constexpr bool causal() const { return right == 0; }
  constexpr bool windowed() const { return left < kEndless || right < kEndless || ranges.first; }

  // The keys that a query of entry b sees end before this one, and begin with that one.
  int64_t keys_seen_by(int64_t b, int64_t query) const {
    return ranges.end ? ranges.end[b * q_len + query] : within(query + diagonal + right + 1);
  }
  int64_t first_seen_by(int64_t b, int64_t query) const {
    return ranges.first ? ranges.first[b * q_len + query] : within(query + diagonal - left);
  }
  int64_t within(int64_t key) const { return key < 0 ? 0 : key > kv_len ? kv_len : key; }

  bool dropout = false;
  // Of a call that is a part of a larger one, for dropout: numbers of the first batch entry, query,
  // key and head, and how many heads there are (0: those of the call).
  int64_t entry = 0, first_query = 0, first_key = 0, first_head = 0, all_heads = 0;
  uint64_t seed = 0;
  uint64_t threshold = 0;  // a score is kept where its 32-bit word reaches this
  float keep_scale = 1.0f;

  bool* out_of_memory;  // set where a thread finds no scratch memory: the results are then void
};

enum class Activation : int32_t { kNone, kRelu, kGelu, kGeluTanh, kSilu, kQuickGelu };

// How weights of 8-bit integers are packed: features side by side, numbers of each side by side;
// and how many numbers sums of int32 hold.
constexpr int64_t kInt8Panel = 64, kInt8Step = 4, kInt8Widest = 65536;

// The weight W of a linear layer, (features, width), and its bias: rows of adjacent numbers where
// their owner keeps them, or 8-bit integers as pack_int8 packs them, each feature's times a scale.
struct Weight {
  const void* data;
  Type type;
  int64_t row = 0;                // of numbers
  const float* scales = nullptr;  // of integers: (features)
  int64_t part_features = 0;      // of integers: features that are packed together
  const void* bias = nullptr;     // (features), of the type of x
};

// Some weights of the same width and number of features, whose outputs stand side by side.
struct Weights {
  Weight each[3];
  int64_t count = 1;

  // Whether one product can read them all.
  bool are_alike() const {
    for (int64_t i = 1; i < count; ++i)
      if (each[i].type != each[0].type || each[i].part_features != each[0].part_features)
        return false;
    return true;
  }
};

// Where sequences of any lengths begin that stand one behind the other, and where the last one
// ends: count + 1 numbers. No data: sequences are of one length.
struct Offsets {
  const int64_t* data = nullptr;
  int64_t count = 0;
};

// out = activation(x W^T + bias) + residual; columns of all matrices are adjacent.
struct Linear {
  int64_t rows, length;     // rows of x, in sequences of `length`, 1 at least
  Offsets packed = {};      // or of these lengths
  int64_t width, features;  // of each weight
  Type type;                // of everything but the weight, to whose type x is rounded first
  const void* x;
  int64_t x_row;
  Weight weight;
  const Weight* beside = nullptr;  // more weights like it: see Weights
  int64_t count = 1;               // with them
  Activation activation = Activation::kNone;
  const void* residual = nullptr;  // (rows, count * features)
  int64_t residual_row = 0;
  void* out;  // (rows, count * features)
  int64_t out_row;

  bool* out_of_memory;

  // The call with the index-th of its weights alone.
  Linear part(int64_t index) const {
    Linear one = *this;
    one.count = 1;
    if (index == 0) return one;
    const int64_t before = index * features * size_of(type);
    one.weight = beside[index - 1];
    if (residual) one.residual = static_cast<const char*>(residual) + before;
    one.out = static_cast<char*>(out) + before;
    return one;
  }
};

// Layer norm, (x - mean) / sqrt(variance + eps) * weight + bias, or RMS norm, which has no mean.
struct Norm {
  const void *weight = nullptr, *bias = nullptr;  // (width); none are 1 and 0
  float eps;
  bool rms = false;
};

// out = norm(x + residual), row by row; columns are adjacent.
struct NormRows {
  int64_t rows, width;
  Type type;  // of everything
  Norm norm;
  const void* x;
  int64_t x_row;
  const void* residual = nullptr;
  int64_t residual_row = 0;
  void* out;
  int64_t out_row;
};

// Gradients of log-sum-exps: (B, H, L) by strides, or none.
struct LseGradient {
  const float* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;

  float at(int64_t b, int64_t h, int64_t i) const {
    return data ? data[b * batch + h * head + i * row] : 0.0f;
  }
};

// Where the gradient of a mask goes. One of the two arrays, zeroed by the caller, or neither where
// it is not wanted. A mask that broadcasts has strides of 0 and sums over the scores that share an
// entry: possibly millions.
struct MaskGradient {
  float* values = nullptr;
  double* sums = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;

  // Whether batch entries of a head share sums, or heads of an entry.
  bool joins_entries() const { return sums && batch == 0; }
  bool joins_heads() const { return sums && head == 0; }
};

// Log-sum-exps: (B, H, L) by strides, or none.
struct MutableLse {
  float* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

struct AttentionForward : Attention {
  MutableView out;  // (B, H, Lq, Dv)
  MutableLse lse;

  // Where it is set, the call is a piece of another one: `out` is float32, and in the place of a
  // log-sum-exp the row's maximum goes to `lse` and its sum of exponentials here.
  float* sums = nullptr;

  Type out_type() const { return sums ? Type::kFloat32 : type; }
};

// Entropy of the weights of each query, and what each key receives of all of them; without values.
struct WeightStatistics : Attention {
  const Bool* query_padding = nullptr;  // (B, Lq), true = the query does not count
  int64_t query_padding_batch = 0, query_padding_column = 0;
  MutableLse lse;      // (B, H, Lq)
  MutableLse entropy;  // likewise, or none
  MutableLse mass;     // (B, H, Lk), 0 where nobody writes; or none

  bool ignores(int64_t b, int64_t query) const {
    return query_padding && query_padding[b * query_padding_batch + query * query_padding_column];
  }
};

struct AttentionBackward : Attention {
  View grad_out;  // (B, H, Lq, Dv)
  LseGradient grad_lse;
  MutableView grad_query, grad_key, grad_value;
  MaskGradient grad_mask;
  PositionGradient grad_positions;
  double* grad_sinks = nullptr;  // (B, H), zeroed by the caller; where there are sinks
  int64_t grad_sinks_batch = 0;
};

// Attention from queries to keys and, with the same scores, from keys to queries.
struct Bidirectional : Attention {  // kv_heads = heads
  int64_t query_value_dim;
  View query_value;                     // (B, H, Lq, Dw)
  const Bool* query_padding = nullptr;  // (B, Lq), true = the query is not read by keys
  int64_t query_padding_batch = 0, query_padding_column = 0;
};

struct BidirectionalForward : Bidirectional {
  MutableView out_q, out_k;  // (B, H, Lq, Dv), (B, H, Lk, Dw)
  MutableLse lse_q, lse_k;
};

struct BidirectionalBackward : Bidirectional {
  View grad_out_q, grad_out_k;
  LseGradient grad_lse_q, grad_lse_k;
  MutableView grad_query, grad_key, grad_value, grad_query_value;
  MaskGradient grad_mask;
};

// A Transformer encoder layer: self-attention and a feed-forward network, each with a residual and
// a norm, of sequences (batch, length, width). Beside tokens of float32 attention may be of
// bfloat16, here and in a decoder layer: what is projected for it, and what it gives, is rounded.
struct EncoderLayer {
  Type type;                   // of the tokens
  AttentionForward attention;  // its shapes, masks and scale; the layer gives it memory
  Offsets packed = {};         // where these stand, the attention is one entry of all tokens
  int64_t width, hidden;       // of the tokens, and between linear1 and linear2
  const void* x;
  int64_t x_row;    // rows are at one stride
  Weights in_proj;  // of queries, keys and values: one for all, or three
  Weight out_proj, linear1, linear2;
  Norm norm1, norm2;
  bool norm_first;
  Activation activation;
  void* out;  // contiguous
};

// out_proj(attention(q_proj(norm(query)), kv_proj(norm(context)))) + residual; norms, residual and,
// where keys and values are given, kv_proj are left out. Keys stand before values in kv_proj;
// values may be projected from a context of their own, which has no norm.
struct CrossAttentionLayer {
  Type type;                   // of the tokens
  AttentionForward attention;  // its shapes, type, masks and scale; the layer gives it memory
  int64_t query_dim, context_dim, out_dim;
  const void* query;
  int64_t query_row;
  const void* context = nullptr;  // none: attention has the keys and values
  int64_t context_row = 0;
  const void* value_context = nullptr;  // none: values come from the context, too
  int64_t value_dim = 0, value_row = 0;
  Weight q_proj;
  Weights kv_proj;  // one for both, or one each
  Weight out_proj;
  const Norm *query_norm = nullptr, *context_norm = nullptr;
  const void* residual = nullptr;
  int64_t residual_row = 0;
  void* out;  // contiguous
};

// A Transformer decoder layer: self-attention, attention to a memory, and a feed-forward network,
// each with a residual and a norm.
struct DecoderLayer {
  Type type;                   // of the tokens
  AttentionForward attention;  // its shapes, masks and scale; the layer gives it memory
  int64_t width, hidden;       // of the tokens, and between linear1 and linear2
  const void* x;
  int64_t x_row;    // rows are at one stride
  Weights in_proj;  // of queries, keys and values: one for all, or three
  Weight out_proj, linear1, linear2;
  Norm norm1, norm2, norm3;  // of the three in turn
  bool norm_first;
  Activation activation;

  // Keys and values (B, H, kv_len, head_dim): of `past` tokens before x, behind which the layer
  // writes those of x. No data: there are no others.
  MutableView key_cache, value_cache;
  int64_t past = 0;

  bool has_memory = false;
  CrossAttentionLayer to_memory;  // its weights, context and attention

  void* out;  // contiguous
};

// One of the two sequences of a CrossModalLayer.
struct FusionStream {
  int64_t length, width, hidden;
  const void* x;
  int64_t x_row;
  Weight in_proj, out_proj, linear1, linear2;  // in_proj: what scores are made of, then values
  Norm norm1, norm2;
  void* out;  // contiguous
};

// Attention between two sequences both ways, and a feed-forward network for each.
struct CrossModalLayer {
  Type type;                       // of the tokens
  BidirectionalForward attention;  // its shapes, type, masks and scale; the layer gives it memory
  FusionStream streams[2];         // queries, keys
  bool norm_first;
  Activation activation;
};

}  // namespace ff
