// Split-KV: one head has too little to share out where few queries meet many keys, which are cut
// into splits. A split is a call of its own for as many keys; what it gives are the means of its
// values with the maximum and the sum of the weights behind them, from which the whole follows:
//     w_i = exp(m_i - max m) l_i      out = sum_i w_i out_i / sum_i w_i
// Where splits end is a matter of the lengths alone, and they are put together in order: neither
// threads nor other heads and batch entries change a bit.
#pragma once

#include "forward.h"

namespace ff {
namespace {

struct KvSplits {
  static constexpr int64_t kQueries = 2 * QueryTiles::kMost;  // more make enough tasks without
  static constexpr int64_t kShortest = 1024;                  // keys: a query tile's 50 us
  static constexpr int64_t kMost = 16;

  int64_t length, count;

  explicit KvSplits(const AttentionForward& p) : length(p.kv_len), count(1) {
    if (p.q_len > kQueries || p.kv_len <= kShortest || p.windowed() || p.dropout) return;
    const int64_t blocks = (p.kv_len + kMost * kBlock - 1) / (kMost * kBlock);
    length = blocks * kBlock > kShortest ? blocks * kBlock : kShortest;
    count = (p.kv_len + length - 1) / length;
  }
};

// A call for the keys first .. end of another, with results of its own.
inline AttentionForward keys_of(AttentionForward p, int64_t first, int64_t end) {
  const auto skip = [&](View& view, Type type, int64_t stride) {
    const int64_t size = size_of(type);
    if (view.data) view.data = static_cast<const char*>(view.data) + first * stride * size;
  };
  skip(p.key, p.type, p.key.row);
  skip(p.value, p.type, p.value.row);
  skip(p.mask, p.mask_type, p.mask.column);
  if (p.padding) p.padding += first * p.padding_column;
  if (p.positions.data) p.positions.data += first * p.positions.key;
  p.diagonal -= first;
  p.kv_len = end - first;
  return p;
}

template <class HalfMath>
class SplitKvTasks {
 public:
  SplitKvTasks(const AttentionForward& p, const KvSplits& splits)
      : p_(p),
        splits_(splits),
        base_(base_of(p)),
        rows_(p.heads / p.kv_heads * p.q_len),
        parts_(attention_parts<HalfMath>(p) / (p.batch * p.kv_heads)) {}

  // Key heads at a time, so that their results take no more than 2 MB.
  void run(ParallelFor parallel) {
    constexpr int64_t kFloats = 524288;
    const int64_t floats = splits_.count * rows_ * (p_.value_dim + 2), slices = all_slices();
    const int64_t fitting = kFloats / floats, most = fitting < 1 ? 1 : fitting;
    means_ = shared_scratch(size_t((most < slices ? most : slices) * floats));
    if (!means_) {
      *p_.out_of_memory = true;
      return;
    }
    for (first_ = 0; first_ < slices; first_ += count_) {
      count_ = slices - first_ < most ? slices - first_ : most;
      maxima_ = means_ + splits_.count * count_ * rows_ * p_.value_dim;
      sums_ = maxima_ + splits_.count * count_ * rows_;
      const double flops =
          2.0 * double(count_ * rows_) * double(p_.kv_len) * double(p_.head_dim + p_.value_dim);
      ff::run(parallel, splits_.count * count_ * parts_, flops, compute, *this);
      ff::run(parallel, count_, flops / double(p_.kv_len), merge, *this);
    }
  }

 private:
  int64_t all_slices() const { return p_.batch * p_.kv_heads; }

  // Where the results of a split stand in the arrays above, in rows.
  int64_t place(int64_t split) const { return (split * count_ - first_) * rows_; }

  static void compute(int64_t begin, int64_t end, const void* context) {
    const auto& tasks = *static_cast<const SplitKvTasks*>(context);
    const int64_t parts = tasks.count_ * tasks.parts_;  // of a split
    while (begin < end) {
      const int64_t split = begin / parts, part = begin % parts;
      const int64_t some = parts - part < end - begin ? parts - part : end - begin;
      const int64_t first = tasks.first_ * tasks.parts_ + part;
      attention_part<HalfMath>(tasks.call(split), first, first + some);
      begin += some;
    }
  }

  AttentionForward call(int64_t split) const {
    const int64_t first = split * splits_.length, end = first + splits_.length;
    AttentionForward p = keys_of(p_, first, end < p_.kv_len ? end : p_.kv_len);
    const int64_t head = p.q_len * p.value_dim, row = place(split);
    p.out = {means_ + row * p.value_dim, p.heads * head, head, p.value_dim, 1};
    p.lse = {maxima_ + row, p.heads * p.q_len, p.q_len, 1};
    p.sums = sums_ + row;
    if (split > 0) p.sinks = {};  // one of the splits has them
    return p;
  }

  static void merge(int64_t begin, int64_t end, const void* context) {
    const auto& tasks = *static_cast<const SplitKvTasks*>(context);
    for (int64_t i = begin * tasks.rows_; i < end * tasks.rows_; ++i)
      tasks.merge_row(tasks.first_ * tasks.rows_ + i);
  }

  // Row `row` of all, into the place of its first split and from there to the output.
  void merge_row(int64_t row) const {
    float maximum = -kInfinity;
    for (int64_t i = 0; i < splits_.count; ++i) {
      const float other = maxima_[place(i) + row];
      maximum = other > maximum ? other : maximum;
    }
    float* mean = means_ + (place(0) + row) * p_.value_dim;
    float sum = 0.0f;
    for (int64_t i = 0; i < splits_.count; ++i) {
      const int64_t at = place(i) + row;
      const float* other = means_ + at * p_.value_dim;
      const float weight = sums_[at] == 0.0f ? 0.0f : power(maxima_[at] - maximum) * sums_[at];
      for (int64_t d = 0; d < p_.value_dim; d += Vec::kLanes) {
        const int64_t some = p_.value_dim - d < Vec::kLanes ? p_.value_dim - d : Vec::kLanes;
        const Vec before = i == 0 ? Vec::zero() : Float32::load(mean + d, some);
        const Vec now = Vec::fma(Float32::load(other + d, some), Vec::set(weight), before);
        Float32::store(mean + d, now, some);
      }
      sum += weight;
    }
    const int64_t b = row / (p_.heads * p_.q_len), h = row / p_.q_len % p_.heads;
    const int64_t query = row % p_.q_len;
    store(p_.out.data, p_.type, b * p_.out.batch + h * p_.out.head + query * p_.out.row,
          p_.out.column, p_.value_dim, inverse(sum), mean);
    if (!p_.lse.data) return;
    p_.lse.data[b * p_.lse.batch + h * p_.lse.head + query * p_.lse.row] =
        log_sum(maximum, sum, base_);
  }

  float power(float x) const { return base_ == Base::kTwo ? std::exp2(x) : std::exp(x); }

  const AttentionForward& p_;
  const KvSplits& splits_;
  Base base_;      // of the maxima
  int64_t rows_;   // of a key head
  int64_t parts_;  // of a key head in a split
  int64_t first_ = 0, count_ = 0;
  float *means_ = nullptr, *maxima_ = nullptr, *sums_ = nullptr;
};

}  // namespace
}  // namespace ff
