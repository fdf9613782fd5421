// A Transformer encoder layer (Vaswani et al., "Attention Is All You Need", 2017, section 3.1) in one
// call:
//
//     norm_first                               otherwise
//     normed = norm1(x)                        heads  = in_proj(x)
//     heads  = in_proj(normed)                 y      = out_proj(attention(heads)) + x
//     y      = out_proj(attention(heads)) + x  y      = norm1(y)
//     normed = norm2(y)                        out    = linear2(linear1(y)) + y
//     out    = linear2(linear1(normed)) + y    out    = norm2(out)
//
// Steps hand over numbers of the layer's type, as the modules do: bits are those of its ops called
// one after the other.
#pragma once

#include "cpu/attention/attention.h"
#include "linear.h"
#include "norm.h"

namespace ff {
namespace {

inline int64_t size_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

template <class HalfMath>
class EncoderSteps {
 public:
  EncoderSteps(const EncoderLayer& p, ParallelFor parallel) : p_(p), parallel_(parallel) {}

  void run() {
    if (rows() == 0 || !allocate()) return;
    const void* tokens = p_.x;
    int64_t row = p_.x_row;
    if (p_.norm_first) normalize(p_.norm1, p_.x, p_.x_row, normed_), tokens = normed_, row = width();
    product(p_.in_proj, tokens, row, width(), 3 * width(), heads_);
    attend();
    product(p_.out_proj, attended_, width(), width(), width(), y_, p_.x, p_.x_row);
    tokens = y_;
    if (p_.norm_first) {
      normalize(p_.norm2, y_, width(), normed_);
      tokens = normed_;
    } else {
      normalize(p_.norm1, y_, width(), y_);
    }
    product(p_.linear1, tokens, width(), width(), p_.hidden, heads_, nullptr, 0, p_.activation);
    product(p_.linear2, heads_, p_.hidden, p_.hidden, width(), p_.out, y_, width());
    if (!p_.norm_first) normalize(p_.norm2, p_.out, width(), p_.out);
  }

 private:
  int64_t width() const { return p_.width; }
  int64_t rows() const { return p_.attention.batch * p_.attention.q_len; }

  bool allocate() {
    const int64_t widest = 3 * width() > p_.hidden ? 3 * width() : p_.hidden;
    const auto floats = [&](int64_t columns) {
      return (rows() * columns * size_of(p_.type) + 63) / 64 * 16;
    };
    float* memory = layer_scratch(size_t(floats(widest) + 2 * floats(width())));
    if (!memory) {
      *p_.out_of_memory = true;
      return false;
    }
    heads_ = memory, attended_ = memory + floats(widest);
    y_ = memory + floats(widest) + floats(width());
    normed_ = attended_;  // one is read before the other is written
    return true;
  }

  void normalize(const Norm& norm, const void* x, int64_t x_row, void* out) {
    NormRows call;
    call.rows = rows(), call.width = width(), call.type = p_.type, call.norm = norm;
    call.x = x, call.x_row = x_row;
    call.out = out, call.out_row = width();
    ff::norm(call, parallel_);
  }

  void product(const Weight& weight, const void* x, int64_t x_row, int64_t width, int64_t features,
               void* out, const void* residual = nullptr, int64_t residual_row = 0,
               Activation activation = Activation::kNone) {
    if (*p_.out_of_memory) return;
    Linear call;
    call.rows = rows(), call.length = p_.attention.q_len;
    call.width = width, call.features = features;
    call.type = p_.type, call.weight = weight, call.activation = activation;
    call.x = x, call.x_row = x_row;
    call.residual = residual, call.residual_row = residual_row;
    call.out = out, call.out_row = features;
    call.out_of_memory = p_.out_of_memory;
    linear<HalfMath>(call, parallel_);
  }

  void attend() {
    if (*p_.out_of_memory) return;
    AttentionForward call = p_.attention;
    const int64_t row = 3 * width(), size = size_of(p_.type);
    const auto part = [&](int64_t i) {
      return View{static_cast<const char*>(heads_) + i * width() * size, call.q_len * row,
                  call.head_dim, row, 1};
    };
    call.query = part(0), call.key = part(1), call.value = part(2);
    call.out = {attended_, call.q_len * width(), call.head_dim, width(), 1};
    attention_forward<HalfMath>(call, parallel_);
  }

  const EncoderLayer& p_;
  ParallelFor parallel_;
  void *heads_, *attended_, *normed_, *y_;  // heads_ has the hidden features as well
};

template <class HalfMath>
void encoder_layer(const EncoderLayer& p, ParallelFor parallel) {
  EncoderSteps<HalfMath>(p, parallel).run();
}

}  // namespace
}  // namespace ff
