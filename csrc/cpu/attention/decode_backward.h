// The decode path backward: a row of scores per query, all its keys at once, so that K is read
// twice, V once, and the gradients of both are written once. backward.h has the formulas.
#pragma once

#include "decode.h"
#include "gradient_sums.h"

namespace ff {
namespace {

// Whether a key head's rows of scores are few and short enough: 1 MB for the two of each query.
inline bool takes_decode_path(const Attention& p) {
  const int64_t rows = p.kv_heads > 0 ? p.heads / p.kv_heads * p.q_len : 0;
  return p.q_len <= kDecodeLength && rows * p.kv_len <= int64_t{1} << 17;
}

template <class T>
class DecodeBackwardTask {
 public:
  using Call = AttentionBackward;

  explicit DecodeBackwardTask(const AttentionBackward& p)
      : p_(p),
        members_(p.heads / p.kv_heads),
        rows_(members_ * p.q_len),
        length_(padded(p.kv_len)),
        dim_(padded(p.head_dim)),
        value_dim_(padded(p.value_dim)),
        scaling_(scaling_of<Float32Math>(p.scale, Base::kE)),
        grad_scale_(p.scale) {}

  bool allocate() {
    const bool copies = p_.key.column != 1 || p_.value.column != 1;
    const int64_t widest = dim_ > value_dim_ ? dim_ : value_dim_;
    return carve(p_, {{&query_, rows_ * dim_},
                      {&grad_, rows_ * value_dim_},
                      {&scores_, rows_ * length_},
                      {&grad_scores_, rows_ * length_},
                      {&derivative_, p_.softcap > 0.0f ? rows_ * length_ : 0},
                      {&factor_, p_.dropout ? length_ : 0},
                      {&scaled_, dim_},
                      {&row_, widest},
                      {&copy_, copies ? kBlock * widest : 0},
                      {&list_, p_.padding ? p_.kv_len : 0}});
  }

  void run(int64_t b, int64_t group) {
    const KeyRange seen = keys_seen(p_, b, {{p_.q_len, nullptr}, 0, p_.q_len});
    const Positions keys = visible_keys(p_, b, seen.first, seen.end, list_);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t h = group * members_ + r / p_.q_len, query = r % p_.q_len;
      products(b, h, query, r, keys);
      softmax(b, h, query, r, keys);
      query_gradient(b, h, query, r, keys);
    }
    write(p_.grad_key, b, group, keys, grad_scores_, query_, dim_, p_.head_dim, grad_scale_.sums);
    write(p_.grad_value, b, group, keys, scores_, grad_, value_dim_, p_.value_dim, 1.0f);
  }

 private:
  bool capped() const { return p_.softcap > 0.0f; }

  template <class Body>
  static void for_blocks(const Positions& keys, const Body& body) {
    for (int64_t done = 0; done < keys.count; done += kBlock) body(block_at(keys, done));
  }

  // S and dP of a query, the latter times the factors of dropout.
  void products(int64_t b, int64_t h, int64_t query, int64_t r, const Positions& keys) {
    const int64_t group = h / members_;
    const Slice key(p_.key, p_.type, b, group), value(p_.value, p_.type, b, group);
    float *own = query_ + r * dim_, *grad = grad_ + r * value_dim_;
    load(p_.query.data, p_.type, b * p_.query.batch + h * p_.query.head + query * p_.query.row,
         p_.query.column, p_.head_dim, dim_, own);
    load(p_.grad_out.data, p_.type,
         b * p_.grad_out.batch + h * p_.grad_out.head + query * p_.grad_out.row, p_.grad_out.column,
         p_.value_dim, value_dim_, grad);
    for (int64_t i = 0; i < dim_; ++i) scaled_[i] = own[i] * scaling_.factor;
    const Vec unit = Vec::set(scaling_.unit);
    for_blocks(keys, [&](const Block& block) {
      float* scores = scores_ + r * length_ + block.first;
      float* grads = grad_scores_ + r * length_ + block.first;
      with_rows<T>(key, block, p_.head_dim, copy_, [&](const auto& rows) {
        for (int64_t j = 0; j < block.count; j += Vec::kLanes)
          (dot_products(scaled_, rows, j, block.count - j, p_.head_dim) * unit).store(scores + j);
      });
      with_rows<T>(value, block, p_.value_dim, copy_, [&](const auto& rows) {
        for (int64_t j = 0; j < block.count; j += Vec::kLanes)
          dot_products(grad, rows, j, block.count - j, p_.value_dim).store(grads + j);
      });
      const Scores at{p_,
                      b,
                      h,
                      one(query),
                      1,
                      scores,
                      capped() ? derivative_ + r * length_ + block.first : nullptr};
      make_row(at, block);
      if (p_.dropout) {
        dropout_factors(at, block, kRowStream, factor_ + block.first);
        for (int64_t j = 0; j < block.count; ++j) grads[j] *= factor_[block.first + j];
      }
    });
    for (int64_t j = keys.count; j < padded(keys.count); ++j) {
      scores_[r * length_ + j] = -kInfinity;
      grad_scores_[r * length_ + j] = 0.0f;
    }
  }

  // P c in the place of S, dS in that of dP.
  void softmax(int64_t b, int64_t h, int64_t query, int64_t r, const Positions& keys) {
    float *scores = scores_ + r * length_, *grads = grad_scores_ + r * length_;
    const FirstStatistics sink(p_, h, Base::kE);
    float maximum = sink.maximum, sum = 0.0f, delta = 0.0f;
    for (int64_t j = 0; j < keys.count; ++j) maximum = scores[j] > maximum ? scores[j] : maximum;
    const Vec offset = finite(Vec::set(maximum));
    for_blocks(keys, [&](const Block& block) {
      FourSums weights, weighted;
      for (int64_t j = block.first; j < block.first + block.count; j += Vec::kLanes) {
        const Vec weight = exponential(Vec::load(scores + j), 1.0f, offset);
        const int64_t part = j / Vec::kLanes % 4;
        weight.store(scores + j);
        weights.part[part] = weights.part[part] + weight;
        weighted.part[part] = Vec::fma(weight, Vec::load(grads + j), weighted.part[part]);
      }
      sum += weights.total().total();
      delta += weighted.total().total();
    });
    const float sink_weight = sink.sum > 0.0f ? std::exp(sink.maximum - maximum) : 0.0f;
    sum += sink_weight;
    const float divisor = inverse(sum), mean = sum == 0.0f ? 0.0f : delta / sum;
    const float grad_lse = sum == 0.0f ? 0.0f : p_.grad_lse.at(b, h, query);
    // What the rounding of the mean leaves over is common to a row: without it the gradient of a
    // query over 4,500 keys of one sign errs three times as much.
    float rest = 0.0f;
    for_blocks(keys, [&](const Block& block) {
      FourSums left;
      for (int64_t j = block.first; j < block.first + block.count; j += Vec::kLanes) {
        const Vec grad = Vec::load(grads + j) - Vec::set(mean);
        Vec& part = left.part[j / Vec::kLanes % 4];
        part = Vec::fma(Vec::load(scores + j), grad, part);
      }
      rest += left.total().total();
    });
    rest = (rest - sink_weight * mean) * divisor;
    if (p_.grad_sinks) {
      const float grad = (0.0f - mean) - rest + grad_lse;
      p_.grad_sinks[b * p_.grad_sinks_batch + h] += double(sink_weight * divisor * grad);
    }
    for (int64_t j = 0; j < keys.count; j += Vec::kLanes) {
      const Vec weight = Vec::load(scores + j) * Vec::set(divisor);
      const Vec centred = (Vec::load(grads + j) - Vec::set(mean)) - Vec::set(rest);
      const Vec grad = centred + Vec::set(grad_lse);
      (weight * grad).store(grads + j);
      (p_.dropout ? weight * Vec::load(factor_ + j) : weight).store(scores + j);
    }
    add_mask_gradient(p_.grad_mask, b, h, query, {keys, 0, keys.count}, grads, 1);
    add_position_gradient(p_.grad_positions, b, h, one(query), {keys, 0, keys.count}, grads, 1);
    if (capped()) through_cap(derivative_ + r * length_, keys.count, grads);
    grad_scale_.apply(keys.count, grads);
  }

  void query_gradient(int64_t b, int64_t h, int64_t query, int64_t r, const Positions& keys) {
    const Slice key(p_.key, p_.type, b, h / members_);
    for (int64_t i = 0; i < dim_; ++i) row_[i] = 0.0f;
    for_blocks(keys, [&](const Block& block) {
      with_rows<T>(key, block, p_.head_dim, copy_, [&](const auto& rows) {
        add_rows(grad_scores_ + r * length_ + block.first, rows, block.count, p_.head_dim, 1.0f,
                 row_);
      });
    });
    const MutableView& to = p_.grad_query;
    store(to.data, p_.type, b * to.batch + h * to.head + query * to.row, to.column, p_.head_dim,
          grad_scale_.sums, row_);
  }

  // Row j of `to`: factor * sum_r weight[r][j] * from[r]; 0 for keys that are hidden.
  void write(const MutableView& to, int64_t b, int64_t group, const Positions& keys,
             const float* weight, const float* from, int64_t columns, int64_t count, float factor) {
    auto* data = static_cast<typename T::Element*>(to.data) + b * to.batch + group * to.head;
    int64_t next = 0;
    for (int64_t j = 0; j < p_.kv_len; ++j) {
      const bool visible = next < keys.count && keys[next] == j;
      for (int64_t d = 0; d < count; d += Vec::kLanes) {
        Vec sum = Vec::zero();
        for (int64_t r = 0; r < rows_ && visible; ++r)
          sum = Vec::fma(Vec::set(weight[r * length_ + next]), Vec::load(from + r * columns + d),
                         sum);
        store_lanes<T>(data + j * to.row + d * to.column, to.column,
                       count - d < Vec::kLanes ? count - d : Vec::kLanes, sum * Vec::set(factor));
      }
      next += visible;
    }
  }

  const AttentionBackward& p_;
  int64_t members_, rows_, length_, dim_, value_dim_;
  Scaling scaling_;
  GradientScale grad_scale_;
  float *query_, *grad_, *scores_, *grad_scores_, *derivative_;
  float *factor_, *scaled_, *row_, *copy_;
  int32_t* list_;
};

}  // namespace
}  // namespace ff
