// Attention forward in float32 on the CUDA cores: how its operands come to shared memory.
//
// Tiles of 64 keys come in stages: a slice of the head dim of queries and keys, and another one
// until the scores are complete, then slices of the values. Queries come again with each tile,
// which is at most half of the traffic, so that shared memory does not grow with the head dim.
#pragma once

#include "calls.h"
#include "cuda/device.h"
#include "cuda/kinds.cuh"

namespace ff::cuda {

// Attention of float32 operands: one launch, head dims up to 256, no dropout.
const char* attention_float32(const ff::AttentionForward& call, void* stream);
const char* attention_float32_path(const ff::AttentionForward& call, int capability);

namespace {
namespace float32 {

struct Call {
  AttentionForward p;
  bool vector_query, vector_key, vector_value, vector_out;  // whole rows of aligned 16 bytes
};

constexpr int kSlice = 64;  // value dims that come at once

// `kRows` queries against 64 keys; up to `kColumns` value dims.
template <int kRows_, int kWarps, int kColumns_>
struct Config {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kKeys = 64, kThreads = 32 * kWarps;
  static constexpr int kThreadRows = kRows / (2 * kWarps);
  // Few queries are about latency: two large stages, all of a tile of head dim 64, and no rest to
  // wait for. Many are about blocks that fit on a processor.
  static constexpr bool kFew = kRows == 16;
  static constexpr int kDepth = kFew ? 64 : 16;
  static constexpr int kStages = kFew ? 2 : 3;
  static constexpr int kValueKeys = kFew ? 64 : 32, kParts = kKeys / kValueKeys;
  static constexpr int kUnroll = kFew ? 2 : 1;  // beyond it registers run out
  // Products that are added up in one chain, of head dims and of keys. Errors of few numbers do not
  // average out: single rows are up to 2.4 times as far off with longer chains than with these.
  static constexpr int kChain = kFew ? 8 : 16;
  // Rows of 20 or 68 floats: 8 of them begin at 8 different groups of 4 banks.
  static constexpr int kStride = kDepth + 4, kWeightStride = kKeys + 4;
  static constexpr int kStageFloats = (kRows + kKeys) * kStride;
  static_assert(kStageFloats >= kValueKeys * kSlice);
  static constexpr int kShared = shared_bytes<float>(kStages * kStageFloats) +
                                 shared_bytes<float>(kRows * kWeightStride) +
                                 shared_bytes<int>(2 * kWarps);
  static_assert(kShared <= 48 << 10);
};

struct alignas(16) Float4 {
  float at[4];
};

FF_DEVICE Float4 load4(const float* from) { return *reinterpret_cast<const Float4*>(from); }

// x as if it were another number: what follows from it is not moved out of loops (offsets of all
// copies and masks would take 50 registers).
FF_DEVICE int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

FF_DEVICE int least(int a, int b) { return a < b ? a : b; }

// Copies `columns` of each of kRows rows; rows from `rows` on and hidden ones become 0, as columns
// do up to the next multiple of 4. Who calls commits and waits.
template <int kThreads, int kRows, int kWidth, int kStride, class Hidden>
FF_DEVICE void copy_rows(float* to, const float* from, int64_t stride, int rows, int columns,
                         bool vector, const Hidden& hidden) {
  const int thread = recomputed(thread_index());
  if (vector) {
    constexpr int kPerRow = kWidth / 4, kStep = kThreads / kPerRow, kPasses = kRows / kStep;
    static_assert(kPasses * kStep == kRows);
    const int row = thread / kPerRow, column = thread % kPerRow * 4;
    if (column >= columns) return;
    bool shown[kPasses];
    for (int i = 0; i < kPasses; ++i) shown[i] = row + i * kStep < rows && !hidden(row + i * kStep);
    from += row * stride + column;
    to += row * kStride + column;
    for (int i = 0; i < kPasses; ++i) {
      copy_async16(to + i * kStep * kStride, from, shown[i]);
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
#pragma unroll 1
  for (int r = row; r < kRows; r += kBatch * kStep) {
    float values[kBatch];
    for (int e = 0; e < kBatch; ++e) {
      const int i = r + e * kStep;
      values[e] = i < rows && column < columns && !hidden(i) ? *from : 0.0f;
      from += kStep * stride;
    }
    for (int e = 0; e < kBatch; ++e) to[e * kStep * kStride] = values[e];
    to += kBatch * kStep * kStride;
  }
}

// From the first visible key's to behind the last one's, for the whole block.
template <class TileConfig, class Segments>
FF_DEVICE void visible_bounds(const Bool* padding, int64_t stride, const Segments& segments,
                              int* scratch, int* first, int* end) {
  int low = *end, high = 0;
#pragma unroll 4
  for (int key = *first + thread_index(); key < *end; key += TileConfig::kThreads) {
    const bool shown = !(padding && padding[key * stride]) && !segments.excludes(key);
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
  for (int i = 0; i < TileConfig::kThreads / 32; ++i) {
    low = scratch[2 * i] < low ? scratch[2 * i] : low;
    high = scratch[2 * i + 1] > high ? scratch[2 * i + 1] : high;
  }
  *first = low;
  *end = high;
}

// Where a block stands: one head of one entry, its first query, and the keys that it can see.
struct Place {
  const float *query, *key, *value;
  const Bool* padding;  // of the entry, or null
  int64_t b, h;
  int first_row, rows, first_key, end_key;
};

// The stages of all tiles in their order, each begun some steps before it is used.
template <class TileConfig>
class Stages {
 public:
  FF_DEVICE Stages(const Call& c, const Place& place, float* memory)
      : c_(c), place_(place), memory_(memory), key_(place.first_key) {
    depth_steps_ = (int(c.p.head_dim) + TileConfig::kDepth - 1) / TileConfig::kDepth;
    steps_ = depth_steps_ + (int(c.p.value_dim) + kSlice - 1) / kSlice * TileConfig::kParts;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) start();
  }

  FF_DEVICE int depth_steps() const { return depth_steps_; }

  // The next stage, complete.
  FF_DEVICE const float* begin() {
    wait_copies<1>();
    barrier();
    if constexpr (TileConfig::kStages > 2) start();
    const float* stage = memory_ + used_ * TileConfig::kStageFloats;
    used_ = used_ + 1 == TileConfig::kStages ? 0 : used_ + 1;
    return stage;
  }

  // The stage that `begin` gave is no longer needed.
  FF_DEVICE void end() {
    if constexpr (TileConfig::kStages == 2) {
      if (key_ < place_.end_key) barrier();
      start();
    }
  }

 private:
  FF_DEVICE void start() {
    if (key_ < place_.end_key) {
      float* stage = memory_ + started_ * TileConfig::kStageFloats;
      if (step_ < depth_steps_) {
        start_depth(stage, step_ * TileConfig::kDepth);
      } else {
        const int slice = step_ - depth_steps_;
        start_values(stage, slice / TileConfig::kParts * kSlice,
                     slice % TileConfig::kParts * TileConfig::kValueKeys);
      }
      if (++step_ == steps_) step_ = 0, key_ += TileConfig::kKeys;
    }
    started_ = started_ + 1 == TileConfig::kStages ? 0 : started_ + 1;
    commit_copies();
  }

  // Hidden keys are read here: their scores are not used.
  FF_DEVICE void start_depth(float* stage, int column) const {
    const auto none = [](int) { return false; };
    const int columns = least(TileConfig::kDepth, int(c_.p.head_dim) - column);
    copy_rows<TileConfig::kThreads, TileConfig::kRows, TileConfig::kDepth, TileConfig::kStride>(
        stage, place_.query + column, c_.p.query.row, place_.rows, columns, c_.vector_query, none);
    copy_rows<TileConfig::kThreads, TileConfig::kKeys, TileConfig::kDepth, TileConfig::kStride>(
        stage + TileConfig::kRows * TileConfig::kStride, place_.key + key_ * c_.p.key.row + column,
        c_.p.key.row, place_.end_key - key_, columns, c_.vector_key, none);
  }

  FF_DEVICE void start_values(float* stage, int column, int offset) const {
    const int key = key_ + offset;
    const auto hidden = [&](int row) {
      return place_.padding && place_.padding[(key + row) * c_.p.padding_column];
    };
    copy_rows<TileConfig::kThreads, TileConfig::kValueKeys, kSlice, kSlice>(
        stage, place_.value + key * c_.p.value.row + column, c_.p.value.row, place_.end_key - key,
        least(kSlice, int(c_.p.value_dim) - column), c_.vector_value, hidden);
  }

  const Call& c_;
  const Place& place_;
  float* memory_;
  int key_, step_ = 0, started_ = 0, used_ = 0, depth_steps_, steps_;
};

}  // namespace float32
}  // namespace
}  // namespace ff::cuda
