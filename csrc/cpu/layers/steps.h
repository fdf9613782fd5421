// The steps of whole layers: norms and products of rows, and the memory between them.
//
// Steps hand over numbers of the layer's type, as modules do: bits are those of the ops called one
// after the other.
#pragma once

#include "linear.h"
#include "norm.h"

namespace ff {
namespace {

// Rows of a layer, in sequences.
struct LayerRows {
  const void* data;
  int64_t batch, length, width, row;
  Offsets packed = {};  // of sequences in the one of a batch of 1

  int64_t count() const { return batch * length; }
};

template <class HalfMath>
struct LayerSteps {
  Type type;
  bool* out_of_memory;
  ParallelFor parallel;

  LayerSteps(Type type, const Attention& p, ParallelFor parallel)
      : type(type), out_of_memory(p.out_of_memory), parallel(parallel) {}

  // Bytes of a matrix, so that the next one is aligned.
  int64_t bytes(int64_t rows, int64_t columns) const {
    return (rows * columns * size_of(type) + 63) / 64 * 64;
  }

  bool is_narrow(const Attention& attention) const { return attention.type != type; }

  // Memory for all steps.
  char* memory(int64_t bytes) const {
    auto* found = reinterpret_cast<char*>(layer_scratch(size_t(bytes / 4)));
    if (!found) *out_of_memory = true;
    return found;
  }

  // Rows side by side in memory.
  static LayerRows side_by_side(const LayerRows& like, const void* data, int64_t width) {
    return {data, like.batch, like.length, width, width, like.packed};
  }

  LayerRows normalize(const Norm& norm, const LayerRows& x, void* out) const {
    NormRows call;
    call.rows = x.count(), call.width = x.width, call.type = type, call.norm = norm;
    call.x = x.data, call.x_row = x.row;
    call.out = out, call.out_row = x.width;
    ff::norm(call, parallel);
    return side_by_side(x, out, x.width);
  }

  LayerRows product(const Weight& weight, const LayerRows& x, int64_t features, void* out,
                    const LayerRows* residual = nullptr,
                    Activation activation = Activation::kNone) const {
    Linear call = linear_call(weight, x, features, out, features);
    call.activation = activation;
    if (residual) call.residual = residual->data, call.residual_row = residual->row;
    if (!*out_of_memory) linear<HalfMath>(call, parallel);
    return side_by_side(x, out, features);
  }

  // Of weights side by side, of so many features in all.
  LayerRows product(const Weights& weights, const LayerRows& x, int64_t features, void* out) const {
    Linear call = linear_call(weights.each[0], x, features / weights.count, out, features);
    call.beside = weights.each + 1, call.count = weights.count;
    const bool alike = weights.are_alike();
    for (int64_t i = 0; i < (alike ? 1 : call.count) && !*out_of_memory; ++i)
      linear<HalfMath>(alike ? call : call.part(i), parallel);
    return side_by_side(x, out, features);
  }

  // Rows in the type of an attention: themselves, or a copy in `memory`, half as large.
  LayerRows narrowed(const Attention& attention, const LayerRows& rows, void* memory) const {
    if (!is_narrow(attention)) return rows;
    struct Rounding {
      const LayerRows& rows;
      uint16_t* to;
    };
    const auto round = [](int64_t begin, int64_t end, const void* context) {
      const auto& [rows, to] = *static_cast<const Rounding*>(context);
      const auto* from = static_cast<const float*>(rows.data);
      for (int64_t i = begin; i < end; ++i)
        ff::convert(from + i * rows.row, to + i * rows.width, Type::kBFloat16, rows.width);
    };
    return copied(rows, memory, round, Rounding{rows, static_cast<uint16_t*>(memory)});
  }

  // Rows of an attention in the type of the layer, likewise.
  LayerRows widened(const Attention& attention, const LayerRows& rows, void* memory) const {
    if (!is_narrow(attention)) return rows;
    struct Widening {
      const LayerRows& rows;
      float* to;
    };
    const auto widen = [](int64_t begin, int64_t end, const void* context) {
      const auto& [rows, to] = *static_cast<const Widening*>(context);
      for (int64_t i = begin; i < end; ++i)
        load(rows.data, Type::kBFloat16, i * rows.row, 1, rows.width, rows.width,
             to + i * rows.width);
    };
    return copied(rows, memory, widen, Widening{rows, static_cast<float*>(memory)});
  }

  // The heads of the index-th of the parts, each `width` wide, that stand side by side in rows of
  // an attention.
  static View heads(const Attention& attention, const LayerRows& rows, int64_t index,
                    int64_t width) {
    const int64_t before = index * width * size_of(attention.type);
    return {static_cast<const char*>(rows.data) + before, rows.length * rows.row,
            attention.head_dim, rows.row, 1};
  }

  // Where heads of `width` numbers in all write theirs, side by side.
  static MutableView joined(void* out, int64_t length, int64_t width, int64_t head_dim) {
    return {out, length * width, head_dim, width, 1};
  }

 private:
  // Rows side by side, from which `body` makes them.
  template <class Context>
  LayerRows copied(const LayerRows& rows, void* memory, void (*body)(int64_t, int64_t, const void*),
                   const Context& context) const {
    if (!*out_of_memory)
      run(parallel, rows.count(), 8.0 * double(rows.count()) * double(rows.width), body, context);
    return side_by_side(rows, memory, rows.width);
  }

  Linear linear_call(const Weight& weight, const LayerRows& x, int64_t features, void* out,
                     int64_t out_row) const {
    Linear call;
    call.rows = x.count(), call.length = x.length, call.packed = x.packed;
    call.width = x.width, call.features = features;
    call.type = type, call.weight = weight;
    call.x = x.data, call.x_row = x.row;
    call.out = out, call.out_row = out_row;
    call.out_of_memory = out_of_memory;
    return call;
  }
};

}  // namespace
}  // namespace ff
