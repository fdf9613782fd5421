// Attention forward in float32 on the CUDA cores.
//
// A block owns some queries of one head and walks the keys in tiles through the online softmax. Of
// two neighbouring lanes each owns every other row of its warp, and of 16 pairs each owns every
// 16th key of a tile, then four columns in a row of the values: all that a row needs is in one
// warp, and reads of 16 bytes from shared memory serve both lanes of a pair at once.
//
// Sums over keys are made of chains of 8 or 16 keys, these of up to 256, and these of all: in one
// chain of 4,096 keys of one sign the roundings would add up to more than those of a plain product.
#include "float32.cuh"

#include <cmath>

namespace ff::cuda {
namespace {
namespace float32 {

FF_DEVICE float exponential(float x) { return exp2(x * 1.44269504f); }

// maximum + log(sum), rounded once or nearly so: the power of two in the sum first.
FF_DEVICE float log_sum(float maximum, float sum) {
  constexpr float kLn2 = 0x1.62e4p-1f, kRest = 1.42860677e-6f;  // so that products are exact
  int exponent;
  float fraction = frexpf(sum, &exponent);
  if (fraction < 0.7f) fraction *= 2.0f, --exponent;  // log(1) is to be 0
  const float power = float(exponent) * kLn2, total = maximum + power;
  const float added = total - maximum;
  const float missing = (maximum - (total - added)) + (power - added);
  return total + (missing + fmaf(float(exponent), kRest, logf(fraction)));
}

template <int kThreadRows>
FF_DEVICE void add(const float (&chain)[kThreadRows][4], float (&sums)[kThreadRows][4]) {
  for (int i = 0; i < kThreadRows; ++i) {
    for (int j = 0; j < 4; ++j) sums[i][j] += chain[i][j];
  }
}

// Products of a lane's queries and keys in `depth` dims are added to their scores.
template <class TileConfig, int kThreadRows>
FF_DEVICE void add_scores(const float* query_rows, const float* key_rows, int depth,
                          float (&scores)[kThreadRows][4]) {
  for (int first = 0; first < depth; first += TileConfig::kChain) {
    float chain[kThreadRows][4] = {};
    const int end = least(first + TileConfig::kChain, depth);
#pragma unroll TileConfig::kUnroll
    for (int d = first; d < end; d += 4) {
      Float4 keys[4];
      for (int j = 0; j < 4; ++j) keys[j] = load4(key_rows + 16 * j * TileConfig::kStride + d);
      for (int i = 0; i < kThreadRows; ++i) {
        const Float4 query = load4(query_rows + 2 * i * TileConfig::kStride + d);
        for (int e = 0; e < 4; ++e)
          for (int j = 0; j < 4; ++j) chain[i][j] = fmaf(query.at[e], keys[j].at[e], chain[i][j]);
      }
    }
    add(chain, scores);
  }
}

// Weighted values of `count` keys are added to a lane's columns.
template <class TileConfig, int kThreadRows>
FF_DEVICE void add_values(const float* weight_rows, const float* value_rows, int count,
                          float (&sums)[kThreadRows][4]) {
  for (int first = 0; first < count; first += TileConfig::kChain) {
    float chain[kThreadRows][4] = {};
    const int end = least(first + TileConfig::kChain, count);
#pragma unroll TileConfig::kUnroll
    for (int k = first; k < end; k += 4) {
      Float4 values[4];
      for (int e = 0; e < 4; ++e) values[e] = load4(value_rows + (k + e) * kSlice);
      for (int i = 0; i < kThreadRows; ++i) {
        const Float4 weights = load4(weight_rows + 2 * i * TileConfig::kWeightStride + k);
        for (int e = 0; e < 4; ++e)
          for (int j = 0; j < 4; ++j)
            chain[i][j] = fmaf(weights.at[e], values[e].at[j], chain[i][j]);
      }
    }
    add(chain, sums);
  }
}

// Products to scores before masks.
template <int kThreadRows>
FF_DEVICE void shape_scores(const Kinds& kinds, int last_query, int last_key, int query, int key,
                            float (&scores)[kThreadRows][4]) {
  if (kinds.cap > 0.0f) {
    for (int i = 0; i < kThreadRows; ++i)
      for (int j = 0; j < 4; ++j) scores[i][j] = kinds.capped<Cap::kFull>(scores[i][j]);
  }
  if (kinds.slope != 0.0f) {
    for (int i = 0; i < kThreadRows; ++i)
      for (int j = 0; j < 4; ++j)
        scores[i][j] = kinds.biased(scores[i][j], query + 2 * i, key + 16 * j);
  }
  if (kinds.positioned()) {
    for (int i = 0; i < kThreadRows; ++i)
      for (int j = 0; j < 4; ++j)
        scores[i][j] +=
            kinds.position(least(query + 2 * i, last_query), least(key + 16 * j, last_key));
  }
}

// Hides those of other segments than the query's.
template <int kThreadRows>
FF_DEVICE void separate_scores(const Kinds& kinds, int last_query, int last_key, int query, int key,
                               float (&scores)[kThreadRows][4]) {
  int64_t of_keys[4];
  for (int j = 0; j < 4; ++j) of_keys[j] = kinds.key_segment(least(key + 16 * j, last_key));
  for (int i = 0; i < kThreadRows; ++i) {
    const int64_t own = kinds.query_segment(least(query + 2 * i, last_query));
    for (int j = 0; j < 4; ++j)
      if (own != of_keys[j]) scores[i][j] = -INFINITY;
  }
}

// Hides scores and adds a float mask to them, in the rows and keys of a lane.
template <int kThreadRows, class Places>
FF_DEVICE void mask_scores(const AttentionForward& p, const Place& place, const Places& places,
                           int row, int key, float (&scores)[kThreadRows][4]) {
  bool shown[4];
  int64_t columns[4];
  for (int j = 0; j < 4; ++j) {
    const int k = key + 16 * j;
    shown[j] = k < place.end_key && !(place.padding && place.padding[k * p.padding_column]);
    columns[j] = k * p.mask.column;
  }
#pragma unroll  // or scores stay in local memory on sm_100, with kinds
  for (int i = 0; i < kThreadRows; ++i) {
    const int query = place.first_row + row + 2 * i;
    const int64_t offset = place.b * p.mask.batch + place.h * p.mask.head + query * p.mask.row;
    for (int j = 0; j < 4; ++j) {
      bool visible = shown[j] && query < p.q_len && !places.hides(query, key + 16 * j);
      if (p.mask.data && visible) {
        if (p.mask_type == Type::kBool) {
          visible = static_cast<const Bool*>(p.mask.data)[offset + columns[j]];
        } else {
          scores[i][j] += static_cast<const float*>(p.mask.data)[offset + columns[j]];
        }
      }
      if (!visible) scores[i][j] = -INFINITY;
    }
  }
}

// Four columns of a row, up to column `end`; all or none of them where rows are aligned.
FF_DEVICE void store4(const Float4& from, float* row, int column, int end, bool aligned) {
  if (aligned) {
    if (column < end) reinterpret_cast<Float4*>(row)[column / 4] = from;
    return;
  }
  for (int e = 0; e < 4; ++e)
    if (column + e < end) row[column + e] = from.at[e];
}

template <class TileConfig, class Kinds>
FF_KERNEL(TileConfig::kThreads)
attention_float32_kernel(Call c) {
  constexpr int kThreadRows = TileConfig::kThreadRows, kSlices = TileConfig::kColumns / kSlice;
  const AttentionForward& p = c.p;
  Shared shared;
  float* stages_memory = shared.take<float>(TileConfig::kStages * TileConfig::kStageFloats);
  float* weights = shared.take<float>(TileConfig::kRows * TileConfig::kWeightStride);
  int* scratch = shared.take<int>(2 * TileConfig::kThreads / 32);

  // The last queries first: under a diagonal they take longest.
  const unsigned tiles = unsigned((p.q_len + TileConfig::kRows - 1) / TileConfig::kRows);
  const unsigned block = unsigned(block_count() - 1 - block_index());
  const unsigned head = block / tiles, b = head / unsigned(p.heads), h = head % unsigned(p.heads);
  const Kinds kinds(p, b, h);
  const typename Kinds::Places places(p, b);
  Place place;
  {
    const unsigned group = h / (unsigned(p.heads) / unsigned(p.kv_heads));
    place.b = b;
    place.h = h;
    place.first_row = int(block % tiles) * TileConfig::kRows;
    place.rows = least(TileConfig::kRows, int(p.q_len) - place.first_row);
    place.query = static_cast<const float*>(p.query.data) + b * p.query.batch + h * p.query.head +
                  place.first_row * p.query.row;
    place.key = static_cast<const float*>(p.key.data) + b * p.key.batch + group * p.key.head;
    place.value =
        static_cast<const float*>(p.value.data) + b * p.value.batch + group * p.value.head;
    place.padding = p.padding ? p.padding + b * p.padding_batch : nullptr;
    place.first_key = 0;
    place.end_key = int(p.kv_len);
    places.limit(place.first_row, place.rows, place.first_key, place.end_key);
    const auto segments = kinds.segments_of(place.first_row, place.rows, int(p.q_len));
    if ((place.padding || segments.exclude()) && place.end_key > TileConfig::kKeys)
      visible_bounds<TileConfig>(place.padding, p.padding_column, segments, scratch,
                                 &place.first_key, &place.end_key);
    place.first_key -= place.first_key % TileConfig::kKeys;
  }

  // Of this lane: rows row, row + 2, ... of the tile; keys lane, lane + 16, ...; four columns.
  const int lane = lane_index() / 2;
  const int row = warp_index() * 2 * kThreadRows + lane_index() % 2;
  float* const weight_rows = weights + row * TileConfig::kWeightStride;

  // Sums are relative to the maximum; `part` is of the last keys, `out` times `rescale` of those
  // before.
  float out[kSlices][kThreadRows][4] = {}, part[kSlices][kThreadRows][4] = {};
  float maximum[kThreadRows], sum[kThreadRows], rescale[kThreadRows];
  for (int i = 0; i < kThreadRows; ++i)
    maximum[i] = kinds.sink, sum[i] = sink_weight(kinds.sink, lane), rescale[i] = 1.0f;
  const auto merge = [&] {
    for (int s = 0; s < kSlices; ++s) {
      for (int i = 0; i < kThreadRows; ++i) {
        for (int e = 0; e < 4; ++e) {
          out[s][i][e] = fmaf(out[s][i][e], rescale[i], part[s][i][e]);
          part[s][i][e] = 0.0f;
        }
      }
    }
    for (int i = 0; i < kThreadRows; ++i) rescale[i] = 1.0f;
  };

  Stages<TileConfig> stages(c, place, stages_memory);
  for (int key = place.first_key; key < place.end_key; key += TileConfig::kKeys) {
    float scores[kThreadRows][4] = {};
    for (int step = 0; step < stages.depth_steps(); ++step) {
      const float* stage = stages.begin();
      const float* query_rows = stage + row * TileConfig::kStride;
      const float* key_rows = stage + (TileConfig::kRows + lane) * TileConfig::kStride;
      const int depth = least(TileConfig::kDepth, int(p.head_dim) - step * TileConfig::kDepth);
      add_scores<TileConfig>(query_rows, key_rows, depth, scores);
      stages.end();
    }

    for (int i = 0; i < kThreadRows; ++i) {
      for (int j = 0; j < 4; ++j) scores[i][j] = rounded_product(scores[i][j], p.scale);
    }
    if constexpr (Kinds::kAny)
      shape_scores(kinds, int(p.q_len) - 1, place.end_key - 1, recomputed(place.first_row + row),
                   recomputed(key + lane), scores);
    if (p.mask.data || place.padding || key + TileConfig::kKeys > place.end_key ||
        places.crosses(place.first_row, TileConfig::kRows, key, TileConfig::kKeys))
      mask_scores(p, place, places, recomputed(row), recomputed(key + lane), scores);
    if constexpr (Kinds::kAny) {
      if (kinds.segmented())
        separate_scores(kinds, int(p.q_len) - 1, place.end_key - 1,
                        recomputed(place.first_row + row), recomputed(key + lane), scores);
    }

    float larger[kThreadRows];
    for (int i = 0; i < kThreadRows; ++i) {
      larger[i] = fmaxf(
          maximum[i], fmaxf(fmaxf(scores[i][0], scores[i][1]), fmaxf(scores[i][2], scores[i][3])));
    }
    for (int mask = 2; mask < 32; mask *= 2) {
      for (int i = 0; i < kThreadRows; ++i)
        larger[i] = fmaxf(larger[i], shuffle_xor(larger[i], mask));
    }
    for (int i = 0; i < kThreadRows; ++i) {
      // -inf - -inf would be NaN. Natural exponents until the maximum is off: the weight there is
      // exactly 1, and a mask of finfo.min stays a number.
      const float zero = larger[i] == -INFINITY ? 0.0f : larger[i];
      const float factor = exponential(maximum[i] - zero);
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = exponential(scores[i][j] - zero);
        weight_rows[2 * i * TileConfig::kWeightStride + lane + 16 * j] = scores[i][j];
      }
      const float sum_here = (scores[i][0] + scores[i][1]) + (scores[i][2] + scores[i][3]);
      maximum[i] = larger[i];
      sum[i] = fmaf(sum[i], factor, sum_here);
      rescale[i] *= factor;
      for (int s = 0; s < kSlices; ++s) {
        for (int e = 0; e < 4; ++e) part[s][i][e] *= factor;
      }
    }

    // The weights are for this warp alone, and seen after the barrier of the next stage.
    const int count = least(TileConfig::kKeys, place.end_key - key);
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      if (kSlice * s >= p.value_dim) break;
      for (int offset = 0; offset < TileConfig::kKeys; offset += TileConfig::kValueKeys) {
        const float* value_rows = stages.begin() + 4 * lane;
        add_values<TileConfig>(weight_rows + offset, value_rows,
                               least(TileConfig::kValueKeys, count - offset), part[s]);
        stages.end();
      }
    }
    if (key / TileConfig::kKeys % 4 == 3) merge();
  }
  merge();

  for (int mask = 2; mask < 32; mask *= 2) {
    for (int i = 0; i < kThreadRows; ++i) sum[i] += shuffle_xor(sum[i], mask);
  }
  for (int i = 0; i < kThreadRows; ++i) {
    if (row + 2 * i >= place.rows) break;
    const int64_t query = place.first_row + row + 2 * i;
    const bool dead = sum[i] == 0.0f;
    const float inverse = 1.0f / sum[i];
    float* to = static_cast<float*>(p.out.data) + place.b * p.out.batch + place.h * p.out.head +
                query * p.out.row;
    for (int s = 0; s < kSlices; ++s) {
      Float4 means;
      for (int e = 0; e < 4; ++e) means.at[e] = dead ? 0.0f : out[s][i][e] * inverse;
      store4(means, to, kSlice * s + 4 * lane, int(p.value_dim), c.vector_out);
    }
    if (p.lse.data && lane == 0)
      p.lse.data[place.b * p.lse.batch + place.h * p.lse.head + query * p.lse.row] =
          dead ? -INFINITY : log_sum(maximum[i], sum[i]);
  }
}

// Whether all rows consist of 16 bytes that are aligned.
bool takes_vectors(const void* data, int64_t batch, int64_t head, int64_t row, int64_t columns) {
  const auto bits = reinterpret_cast<uintptr_t>(data);
  return bits % 16 == 0 && batch % 4 == 0 && head % 4 == 0 && row % 4 == 0 && columns % 4 == 0;
}

// Small tiles where there are few queries to share between processors.
bool few(const AttentionForward& call) { return call.q_len <= 128; }

template <class TileConfig, class Kinds = NoKinds>
const char* run(const Call& c, void* stream) {
  const int64_t tiles = (c.p.q_len + TileConfig::kRows - 1) / TileConfig::kRows;
  const Launch size{c.p.batch * c.p.heads * tiles, TileConfig::kThreads, TileConfig::kShared,
                    stream};
  return launch<attention_float32_kernel<TileConfig, Kinds>>(size, c);
}

}  // namespace float32
}  // namespace

using namespace float32;

const char* attention_float32(const ff::AttentionForward& call, void* stream) {
  const auto vectors = [](const auto& x, int64_t columns) {
    return takes_vectors(x.data, x.batch, x.head, x.row, columns);
  };
  constexpr int64_t kMost = int64_t(1) << 30;
  if (call.q_len > kMost || call.kv_len > kMost) return "more than 2^30 queries or keys";
  const Call c{call, vectors(call.query, call.head_dim), vectors(call.key, call.head_dim),
               vectors(call.value, call.value_dim), vectors(call.out, call.value_dim)};
  if (has_kinds(
          call)) {  // there are fewer kernels, but those of 65 to 128 columns lose registers alone
    if (call.value_dim <= 64)
      return few(call) ? run<Config<16, 4, 64>, Kinds>(c, stream)
                       : run<Config<64, 4, 64>, Kinds>(c, stream);
    return few(call) ? run<Config<16, 4, 256>, Kinds>(c, stream)
                     : run<Config<64, 8, 256>, Kinds>(c, stream);
  }
  if (call.value_dim <= 64)
    return few(call) ? run<Config<16, 4, 64>>(c, stream) : run<Config<64, 4, 64>>(c, stream);
  if (call.value_dim <= 128)
    return few(call) ? run<Config<16, 4, 128>>(c, stream) : run<Config<64, 8, 128>>(c, stream);
  return few(call) ? run<Config<16, 4, 256>>(c, stream) : run<Config<64, 8, 256>>(c, stream);
}

const char* attention_float32_path(const ff::AttentionForward& call, int) {
  return few(call) ? "float32 cores, tiles of 16 queries" : "float32 cores, tiles of 64 queries";
}

}  // namespace ff::cuda
