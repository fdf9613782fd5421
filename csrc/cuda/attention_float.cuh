// Attention forward in float32 on the CUDA cores.
//
// A block owns some queries of one head and walks the keys in tiles of 64 through the online
// softmax. Of two neighbouring lanes each owns every other row of its warp, and of 16 pairs each
// owns every 16th key of a tile, then four columns in a row of the values: all that a row needs is
// in one warp, and reads of 16 bytes from shared memory serve both lanes of a pair at once.
//
// Tiles come in stages: a slice of the head dim of queries and keys, then slices of the values.
// Queries come again with each tile, which is at most a third of the traffic, so that shared memory
// does not grow with the head dim. Products over up to 256 keys are added up apart: in one chain of
// 4,096 keys of one sign the roundings would add up to more than those of a plain product.
#pragma once

#include <cmath>

#include "../calls.h"
#include "device.h"

#ifndef FF_UNROLL
#ifdef __CUDACC__
#define FF_UNROLL _Pragma("unroll")
#else
#define FF_UNROLL
#endif
#endif

namespace ff::cuda {

// Attention of float32 operands: one launch, head dims up to 256, no dropout.
const char* attention_float32(const ff::AttentionForward& call, void* stream);
const char* attention_float32_path(const ff::AttentionForward& call, int capability);

namespace {

struct Float32Call {
  AttentionForward p;
  bool vector_query, vector_key, vector_value, vector_out;  // whole rows of aligned 16 bytes
};

// `kRows` queries against 64 keys; up to `kColumns` value dims.
template <int kRows_, int kWarps, int kColumns_>
struct Float32Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kKeys = 64, kThreads = 32 * kWarps;
  static constexpr int kThreadRows = kRows / (2 * kWarps);
  // Few queries are about latency: two large stages, all of a tile of head dim 64, and no rest to
  // wait for. Many are about blocks that fit on a processor.
  static constexpr bool kFew = kRows == 16;
  static constexpr int kDepth = kFew ? 64 : 16;
  static constexpr int kStages = kFew ? 2 : 3;
  static constexpr int kValueKeys = kFew ? 64 : 32, kParts = kKeys / kValueKeys;
  // Rows of 20 or 68 floats: 8 of them begin at 8 different groups of 4 banks.
  static constexpr int kStride = kDepth + 4, kWeightStride = kKeys + 4;
  static constexpr int kStageFloats = (kRows + kKeys) * kStride;
  static_assert(kStageFloats >= kValueKeys * 64);
  static constexpr int kShared = shared_bytes<float>(kStages * kStageFloats) +
                                 shared_bytes<float>(kRows * kWeightStride) +
                                 shared_bytes<int>(2 * kWarps);
  static_assert(kShared <= 48 << 10);
};

constexpr float kLog2e = 1.44269504f;
constexpr float kNegativeInfinity = -INFINITY;

struct alignas(16) Float4 {
  float at[4];
};

FF_DEVICE Float4 load4(const float* from) { return *reinterpret_cast<const Float4*>(from); }

FF_DEVICE int least(int a, int b) { return a < b ? a : b; }

// Copies `columns` of each of kRows rows; rows from `rows` on and hidden ones become 0, as columns
// do up to the next multiple of 4. Who calls commits and waits.
template <int kThreads, int kRows, int kWidth, int kStride, class Hidden>
FF_DEVICE void copy_rows(float* to, const float* from, int64_t stride, int rows, int columns,
                         bool vector, const Hidden& hidden) {
  const int thread = thread_index();
  if (vector) {
    constexpr int kPerRow = kWidth / 4, kStep = kThreads / kPerRow, kPasses = kRows / kStep;
    static_assert(kPasses * kStep == kRows);
    const int row = thread / kPerRow, column = thread % kPerRow * 4;
    if (column >= columns) return;
    bool shown[kPasses];
    FF_UNROLL
    for (int i = 0; i < kPasses; ++i) shown[i] = row + i * kStep < rows && !hidden(row + i * kStep);
    from += row * stride + column;
    to += row * kStride + column;
    FF_UNROLL
    for (int i = 0; i < kPasses; ++i) {
      copy_async16(to + i * kStep * kStride, shown[i] ? from : nullptr, shown[i]);
      from += kStep * stride;
    }
    return;
  }
  constexpr int kStep = kThreads / kWidth, kPasses = kRows / kStep;
  constexpr int kBatch = kPasses < 8 ? kPasses : 8;  // loads on their way
  static_assert(kBatch * (kPasses / kBatch) * kStep == kRows);
  const int row = thread / kWidth, column = thread % kWidth;
  if (column >= (columns + 3) / 4 * 4) return;
  from += row * stride + column;
  to += row * kStride + column;
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (int r = row; r < kRows; r += kBatch * kStep) {
    float values[kBatch];
    FF_UNROLL
    for (int e = 0; e < kBatch; ++e) {
      const int i = r + e * kStep;
      values[e] = i < rows && column < columns && !hidden(i) ? *from : 0.0f;
      from += kStep * stride;
    }
    FF_UNROLL
    for (int e = 0; e < kBatch; ++e) to[e * kStep * kStride] = values[e];
    to += kBatch * kStep * kStride;
  }
}

// From the first visible key's to behind the last one's, for the whole block.
template <class Tile>
FF_DEVICE void visible_bounds(const bool* padding, int64_t stride, int* scratch, int* first,
                              int* end) {
  int low = *end, high = 0;
#ifdef __CUDACC__
#pragma unroll 4
#endif
  for (int key = thread_index(); key < *end; key += Tile::kThreads) {
    const bool shown = !padding[key * stride];
    low = shown && key < low ? key : low;
    high = shown ? key + 1 : high;
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const int other_low = shuffle_xor(low, mask), other_high = shuffle_xor(high, mask);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  if (lane_index() == 0) {
    scratch[2 * warp_index()] = low;
    scratch[2 * warp_index() + 1] = high;
  }
  barrier();
  for (int i = 0; i < Tile::kThreads / 32; ++i) {
    low = scratch[2 * i] < low ? scratch[2 * i] : low;
    high = scratch[2 * i + 1] > high ? scratch[2 * i + 1] : high;
  }
  *first = low;
  *end = high;
}

// Where a block stands: one head of one entry, its first query, and the keys that it can see.
struct Float32Place {
  const float *query, *key, *value;
  const bool* padding;  // of the entry, or null
  int64_t b, h;
  int first_row, rows, first_key, end_key;
};

// The stages of all tiles in their order, each begun some steps before it is used.
template <class Tile>
class Float32Stages {
 public:
  static constexpr int kWidth = 64;  // of a slice of values

  FF_DEVICE Float32Stages(const Float32Call& c, const Float32Place& place, float* memory)
      : c_(c), place_(place), memory_(memory), key_(place.first_key) {
    depth_steps_ = (int(c.p.head_dim) + Tile::kDepth - 1) / Tile::kDepth;
    steps_ = depth_steps_ + (int(c.p.value_dim) + kWidth - 1) / kWidth * Tile::kParts;
    FF_UNROLL
    for (int i = 0; i < 2; ++i) start();
  }

  FF_DEVICE int depth_steps() const { return depth_steps_; }

  // The next stage, complete.
  FF_DEVICE const float* begin() {
    wait_copies<1>();
    barrier();
    if constexpr (Tile::kStages > 2) start();
    const float* stage = memory_ + used_ * Tile::kStageFloats;
    used_ = used_ + 1 == Tile::kStages ? 0 : used_ + 1;
    return stage;
  }

  // The stage that `begin` gave is no longer needed.
  FF_DEVICE void end() {
    if constexpr (Tile::kStages == 2) {
      if (key_ < place_.end_key) barrier();
      start();
    }
  }

 private:
  FF_DEVICE void start() {
    if (key_ < place_.end_key) {
      float* stage = memory_ + started_ * Tile::kStageFloats;
      if (step_ < depth_steps_) {
        start_depth(stage, step_ * Tile::kDepth);
      } else {
        const int slice = step_ - depth_steps_;
        start_values(stage, slice / Tile::kParts * kWidth, slice % Tile::kParts * Tile::kValueKeys);
      }
      if (++step_ == steps_) step_ = 0, key_ += Tile::kKeys;
    }
    started_ = started_ + 1 == Tile::kStages ? 0 : started_ + 1;
    commit_copies();
  }

  // Hidden keys are read here: their scores are not used.
  FF_DEVICE void start_depth(float* stage, int column) const {
    const auto none = [](int) { return false; };
    const int columns = least(Tile::kDepth, int(c_.p.head_dim) - column);
    copy_rows<Tile::kThreads, Tile::kRows, Tile::kDepth, Tile::kStride>(
        stage, place_.query + column, c_.p.query.row, place_.rows, columns, c_.vector_query, none);
    copy_rows<Tile::kThreads, Tile::kKeys, Tile::kDepth, Tile::kStride>(
        stage + Tile::kRows * Tile::kStride, place_.key + key_ * c_.p.key.row + column,
        c_.p.key.row, place_.end_key - key_, columns, c_.vector_key, none);
  }

  FF_DEVICE void start_values(float* stage, int column, int offset) const {
    const int key = key_ + offset;
    const auto hidden = [&](int row) {
      return place_.padding && place_.padding[(key + row) * c_.p.padding_column];
    };
    copy_rows<Tile::kThreads, Tile::kValueKeys, kWidth, kWidth>(
        stage, place_.value + key * c_.p.value.row + column, c_.p.value.row, place_.end_key - key,
        least(kWidth, int(c_.p.value_dim) - column), c_.vector_value, hidden);
  }

  const Float32Call& c_;
  const Float32Place& place_;
  float* memory_;
  int key_, step_ = 0, started_ = 0, used_ = 0, depth_steps_, steps_;
};

// Hides scores and adds a float mask to them, in the rows and keys of a lane.
template <int kThreadRows>
FF_DEVICE void mask_scores(const AttentionForward& p, const Float32Place& place, int row, int key,
                           float (&scores)[kThreadRows][4]) {
  bool shown[4];
  int64_t columns[4];
  FF_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int k = key + 16 * j;
    shown[j] = k < place.end_key && !(place.padding && place.padding[k * p.padding_column]);
    columns[j] = k * p.mask.column;
  }
  FF_UNROLL
  for (int i = 0; i < kThreadRows; ++i) {
    const int query = place.first_row + row + 2 * i;
    const int64_t offset = place.b * p.mask.batch + place.h * p.mask.head + query * p.mask.row;
    FF_UNROLL
    for (int j = 0; j < 4; ++j) {
      bool visible = shown[j] && query < p.q_len && !(p.causal && key + 16 * j > query);
      if (p.mask.data && visible) {
        if (p.mask_type == Type::kBool) {
          visible = static_cast<const bool*>(p.mask.data)[offset + columns[j]];
        } else {
          scores[i][j] += static_cast<const float*>(p.mask.data)[offset + columns[j]];
        }
      }
      if (!visible) scores[i][j] = kNegativeInfinity;
    }
  }
}

template <class Tile>
FF_KERNEL(Tile::kThreads)
attention_float32_kernel(Float32Call c) {
  constexpr int kThreadRows = Tile::kThreadRows, kSlices = Tile::kColumns / 64;
  const AttentionForward& p = c.p;
  Shared shared;
  float* stages_memory = shared.take<float>(Tile::kStages * Tile::kStageFloats);
  float* weights = shared.take<float>(Tile::kRows * Tile::kWeightStride);
  int* scratch = shared.take<int>(2 * Tile::kThreads / 32);

  Float32Place place;
  {
    // The last queries first: under a diagonal they take longest.
    const unsigned tiles = unsigned((p.q_len + Tile::kRows - 1) / Tile::kRows);
    const unsigned block = unsigned(block_count() - 1 - block_index());
    const unsigned head = block / tiles, b = head / unsigned(p.heads), h = head % unsigned(p.heads);
    const unsigned group = h / (unsigned(p.heads) / unsigned(p.kv_heads));
    place.b = b;
    place.h = h;
    place.first_row = int(block % tiles) * Tile::kRows;
    place.rows = least(Tile::kRows, int(p.q_len) - place.first_row);
    place.query = static_cast<const float*>(p.query.data) + b * p.query.batch + h * p.query.head +
                  place.first_row * p.query.row;
    place.key = static_cast<const float*>(p.key.data) + b * p.key.batch + group * p.key.head;
    place.value =
        static_cast<const float*>(p.value.data) + b * p.value.batch + group * p.value.head;
    place.padding = p.padding ? p.padding + b * p.padding_batch : nullptr;
    place.first_key = 0;
    place.end_key = int(p.kv_len);
    if (p.causal) place.end_key = least(place.end_key, place.first_row + place.rows);
    if (place.padding && place.end_key > Tile::kKeys)
      visible_bounds<Tile>(place.padding, p.padding_column, scratch, &place.first_key,
                           &place.end_key);
    place.first_key -= place.first_key % Tile::kKeys;
  }

  // Of this lane: rows row, row + 2, ... of the tile; keys lane, lane + 16, ...; four columns.
  const int lane = lane_index() / 2;
  const int row = warp_index() * 2 * kThreadRows + lane_index() % 2;
  float* const weight_rows = weights + row * Tile::kWeightStride;

  // Sums are relative to the maximum; `part` is of the last keys, `out` times `rescale` of those
  // before.
  float out[kSlices][kThreadRows][4] = {}, part[kSlices][kThreadRows][4] = {};
  float maximum[kThreadRows], sum[kThreadRows], rescale[kThreadRows];
  FF_UNROLL
  for (int i = 0; i < kThreadRows; ++i)
    maximum[i] = kNegativeInfinity, sum[i] = 0.0f, rescale[i] = 1.0f;
  const auto merge = [&] {
    FF_UNROLL
    for (int s = 0; s < kSlices; ++s) {
      FF_UNROLL
      for (int i = 0; i < kThreadRows; ++i) {
        FF_UNROLL
        for (int e = 0; e < 4; ++e) {
          out[s][i][e] = fmaf(out[s][i][e], rescale[i], part[s][i][e]);
          part[s][i][e] = 0.0f;
        }
      }
    }
    FF_UNROLL
    for (int i = 0; i < kThreadRows; ++i) rescale[i] = 1.0f;
  };

  Float32Stages<Tile> stages(c, place, stages_memory);
  for (int key = place.first_key; key < place.end_key; key += Tile::kKeys) {
    float scores[kThreadRows][4] = {};
    for (int step = 0; step < stages.depth_steps(); ++step) {
      const float* stage = stages.begin();
      const float* query_rows = stage + row * Tile::kStride;
      const float* key_rows = stage + (Tile::kRows + lane) * Tile::kStride;
      const int depth = least(Tile::kDepth, int(p.head_dim) - step * Tile::kDepth);
#ifdef __CUDACC__
#pragma unroll 2
#endif
      for (int d = 0; d < depth; d += 4) {
        Float4 keys[4];
        FF_UNROLL
        for (int j = 0; j < 4; ++j) keys[j] = load4(key_rows + 16 * j * Tile::kStride + d);
        FF_UNROLL
        for (int i = 0; i < kThreadRows; ++i) {
          const Float4 query = load4(query_rows + 2 * i * Tile::kStride + d);
          FF_UNROLL
          for (int e = 0; e < 4; ++e) {
            FF_UNROLL
            for (int j = 0; j < 4; ++j)
              scores[i][j] = fmaf(query.at[e], keys[j].at[e], scores[i][j]);
          }
        }
      }
      stages.end();
    }

    FF_UNROLL
    for (int i = 0; i < kThreadRows; ++i) {
      FF_UNROLL
      for (int j = 0; j < 4; ++j) scores[i][j] *= p.scale;
    }
    if (p.mask.data || place.padding || key + Tile::kKeys > place.end_key ||
        (p.causal && key + Tile::kKeys > place.first_row))
      mask_scores(p, place, row, key + lane, scores);

    float larger[kThreadRows];
    FF_UNROLL
    for (int i = 0; i < kThreadRows; ++i) {
      larger[i] = fmaxf(
          maximum[i], fmaxf(fmaxf(scores[i][0], scores[i][1]), fmaxf(scores[i][2], scores[i][3])));
    }
    for (int mask = 2; mask < 32; mask *= 2) {
      FF_UNROLL
      for (int i = 0; i < kThreadRows; ++i)
        larger[i] = fmaxf(larger[i], shuffle_xor(larger[i], mask));
    }
    FF_UNROLL
    for (int i = 0; i < kThreadRows; ++i) {
      // -inf - -inf would be NaN. Natural exponents until the maximum is off: the weight there is
      // exactly 1, and a mask of finfo.min stays a number.
      const float zero = larger[i] == kNegativeInfinity ? 0.0f : larger[i];
      const float factor = exp2((maximum[i] - zero) * kLog2e);
      FF_UNROLL
      for (int j = 0; j < 4; ++j) {
        scores[i][j] = exp2((scores[i][j] - zero) * kLog2e);
        weight_rows[2 * i * Tile::kWeightStride + lane + 16 * j] = scores[i][j];
      }
      const float sum_here = (scores[i][0] + scores[i][1]) + (scores[i][2] + scores[i][3]);
      maximum[i] = larger[i];
      sum[i] = fmaf(sum[i], factor, sum_here);
      rescale[i] *= factor;
      FF_UNROLL
      for (int s = 0; s < kSlices; ++s) {
        FF_UNROLL
        for (int e = 0; e < 4; ++e) part[s][i][e] *= factor;
      }
    }
    barrier_warp();

    const int count = least(Tile::kKeys, place.end_key - key);
    FF_UNROLL
    for (int s = 0; s < kSlices; ++s) {
      if (64 * s >= p.value_dim) break;
      for (int offset = 0; offset < Tile::kKeys; offset += Tile::kValueKeys) {
        const float* value_rows = stages.begin() + 4 * lane;
        const int end = least(Tile::kValueKeys, count - offset);
#ifdef __CUDACC__
#pragma unroll 2
#endif
        for (int k = 0; k < end; k += 4) {
          Float4 values[4];
          FF_UNROLL
          for (int e = 0; e < 4; ++e) values[e] = load4(value_rows + (k + e) * 64);
          FF_UNROLL
          for (int i = 0; i < kThreadRows; ++i) {
            const Float4 w = load4(weight_rows + 2 * i * Tile::kWeightStride + offset + k);
            FF_UNROLL
            for (int e = 0; e < 4; ++e) {
              FF_UNROLL
              for (int j = 0; j < 4; ++j)
                part[s][i][j] = fmaf(w.at[e], values[e].at[j], part[s][i][j]);
            }
          }
        }
        stages.end();
      }
    }
    if (key / Tile::kKeys % 4 == 3) merge();
  }
  merge();

  for (int mask = 2; mask < 32; mask *= 2) {
    FF_UNROLL
    for (int i = 0; i < kThreadRows; ++i) sum[i] += shuffle_xor(sum[i], mask);
  }
  wait_copies<0>();
  FF_UNROLL
  for (int i = 0; i < kThreadRows; ++i) {
    if (row + 2 * i >= place.rows) break;
    const int64_t query = place.first_row + row + 2 * i;
    const bool dead = sum[i] == 0.0f;
    const float inverse = 1.0f / sum[i];
    float* to = static_cast<float*>(p.out.data) + place.b * p.out.batch + place.h * p.out.head +
                query * p.out.row + 4 * lane;
    FF_UNROLL
    for (int s = 0; s < kSlices; ++s) {
      Float4 means;
      FF_UNROLL
      for (int e = 0; e < 4; ++e) means.at[e] = dead ? 0.0f : out[s][i][e] * inverse;
      const int left = int(p.value_dim) - 64 * s - 4 * lane;
      if (c.vector_out && left >= 4) {
        *reinterpret_cast<Float4*>(to + 64 * s) = means;
      } else {
        FF_UNROLL
        for (int e = 0; e < 4; ++e)
          if (e < left) to[64 * s + e] = means.at[e];
      }
    }
    if (p.lse.data && lane == 0)
      p.lse.data[place.b * p.lse.batch + place.h * p.lse.head + query * p.lse.row] =
          dead ? kNegativeInfinity : maximum[i] + logf(sum[i]);
  }
}

}  // namespace
}  // namespace ff::cuda
