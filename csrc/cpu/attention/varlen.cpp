// Packed sequences: each is a call of its own to the kernels of attention, on the rows that are
// its.
//
// The calls' parts are shared out by work, not by number: a chunk is a run of parts that takes
// about as long as any other, whichever sequences they belong to. What a part computes does not
// depend on the chunk that it falls into.

#include <algorithm>
#include <vector>

#include "cpu/key_ranges.h"

namespace ff {
namespace {

void advance(View& view, Type type, int64_t rows) {
  view.data = static_cast<const char*>(view.data) + rows * view.row * size_of(type);
}

void advance(MutableView& view, Type type, int64_t rows) {
  view.data = static_cast<char*>(view.data) + rows * view.row * size_of(type);
}

void advance_outputs(AttentionForward& p, int64_t, int64_t queries, int64_t) {
  advance(p.out, p.type, queries);
  if (p.lse.data) p.lse.data += queries * p.lse.row;
}

void advance_outputs(AttentionBackward& p, int64_t sequence, int64_t queries, int64_t keys) {
  advance(p.grad_out, p.type, queries);
  if (p.grad_lse.data) p.grad_lse.data += queries * p.grad_lse.row;
  advance(p.grad_query, p.type, queries);
  advance(p.grad_key, p.type, keys);
  advance(p.grad_value, p.type, keys);
  if (p.grad_mask.values) p.grad_mask.values += sequence * p.grad_mask.batch;
  if (p.grad_mask.sums) p.grad_mask.sums += sequence * p.grad_mask.batch;
  if (p.grad_sinks) p.grad_sinks += sequence * p.heads;
}

int64_t parts_of(const AttentionForward& p) { return kernels().attention_parts(p); }
int64_t parts_of(const AttentionBackward& p) {
  return p.grad_mask.joins_heads() && p.kv_heads > 0 ? 1 : p.kv_heads;
}

// Whether all sequences add to the same entries of a mask's gradient.
bool shares_sums(const AttentionForward&) { return false; }
bool shares_sums(const AttentionBackward& p) { return p.grad_mask.joins_entries(); }

void run_parts(const AttentionForward& p, int64_t begin, int64_t end) {
  kernels().attention_part(p, begin, end);
}

void run_parts(const AttentionBackward& p, int64_t begin, int64_t end) {
  kernels().attention_backward_part(p, begin, end);
}

template <class Call>
class Packed {
 public:
  Packed(const Call& whole, const Sequences& sequences) : whole_(whole), sequences_(sequences) {
    parts_.push_back(0);
    work_.push_back(0.0);
    if (sequences.prefixes.data) {
      std::vector<KeyRangeTable> ranges;
      for (int64_t i = 0; i < sequences.count; ++i) {
        Call p = sequence(i);
        p.rules.prefixes = sequences.prefixes;
        p.rules.prefixes.data += i * p.rules.prefixes.batch;
        ranges.push_back(key_ranges(p));
      }
      ranges_ = std::move(ranges);
    }
    for (int64_t i = 0; i < sequences.count; ++i) {
      const Call p = sequence(i);
      const int64_t parts = parts_of(p);
      const double scores = double(p.q_len) * double(p.kv_len) * double(p.heads);
      parts_.push_back(parts_.back() + parts);
      work_.push_back(work_.back() + (parts > 0 ? scores + 1.0 : 0.0));  // or empty ones vanish
    }
  }

  void run(ParallelFor parallel) {
    if (shares_sums(whole_)) return run_heads(parallel);
    const double flops = 2.0 * work_.back() * double(whole_.head_dim + whole_.value_dim);
    chunks_ = flops < 2e6 ? 1 : std::min(parts_.back(), kChunks);
    const auto body = [](int64_t begin, int64_t end, const void* context) {
      static_cast<const Packed*>(context)->run_chunks(begin, end);
    };
    chunks_ < 2 ? body(0, 1, this) : parallel(chunks_, body, this);
  }

 private:
  static constexpr int64_t kChunks = 256;

  // One sequence after the other for each part of the heads, so that sums have one order.
  void run_heads(ParallelFor parallel) {
    const auto body = [](int64_t begin, int64_t end, const void* context) {
      const auto& all = *static_cast<const Packed*>(context);
      for (int64_t i = 0; i < all.sequences_.count; ++i) run_parts(all.sequence(i), begin, end);
    };
    const int64_t parts = sequences_.count > 0 ? parts_of(sequence(0)) : 0;
    if (parts > 0) parallel(parts, body, this);
  }

  Call sequence(int64_t i) const {
    const int64_t q = sequences_.q_offsets[i], k = sequences_.kv_offsets[i];
    Call p = whole_;
    p.batch = 1, p.entry = i;
    p.q_len = sequences_.q_offsets[i + 1] - q, p.kv_len = sequences_.kv_offsets[i + 1] - k;
    advance(p.query, p.type, q);
    advance(p.key, p.type, k);
    advance(p.value, p.type, k);
    if (p.mask.data) {
      p.mask.data = static_cast<const char*>(p.mask.data) + i * p.mask.batch * size_of(p.mask_type);
    }
    if (p.alibi.data) p.alibi.data += i * p.alibi.batch;
    p.diagonal = sequences_.bottom_right ? p.kv_len - p.q_len : 0;
    if (!ranges_.empty()) p.ranges = ranges_[size_t(i)].ranges();
    advance_outputs(p, i, q, k);
    return p;
  }

  // The part with which a chunk begins.
  int64_t first_part(int64_t chunk) const {
    if (chunk == 0) return 0;
    if (chunk == chunks_) return parts_.back();
    const double work = work_.back() * double(chunk) / double(chunks_);
    const int64_t i = std::upper_bound(work_.begin(), work_.end(), work) - work_.begin() - 1;
    if (i >= sequences_.count) return parts_.back();
    const double share = (work - work_[size_t(i)]) / (work_[size_t(i) + 1] - work_[size_t(i)]);
    const int64_t parts = parts_[size_t(i) + 1] - parts_[size_t(i)];
    return parts_[size_t(i)] + std::min(parts, int64_t(share * double(parts)));
  }

  void run_chunks(int64_t begin, int64_t end) const {
    const int64_t first = first_part(begin), last = first_part(end);
    int64_t i = std::upper_bound(parts_.begin(), parts_.end(), first) - parts_.begin() - 1;
    for (; i < sequences_.count && parts_[size_t(i)] < last; ++i) {
      const int64_t before = parts_[size_t(i)], after = parts_[size_t(i) + 1];
      run_parts(sequence(i), std::max(first, before) - before, std::min(last, after) - before);
    }
  }

  const Call& whole_;
  const Sequences& sequences_;
  int64_t chunks_ = 1;
  std::vector<int64_t> parts_;  // before each sequence, and all
  std::vector<double> work_;
  std::vector<KeyRangeTable> ranges_;  // of sequences with prefixes
};

}  // namespace

void varlen_forward(const AttentionForward& p, const Sequences& sequences, ParallelFor parallel) {
  Packed<AttentionForward>(p, sequences).run(parallel);
}

void varlen_backward(const AttentionBackward& p, const Sequences& sequences, ParallelFor parallel) {
  Packed<AttentionBackward>(p, sequences).run(parallel);
}

}  // namespace ff
