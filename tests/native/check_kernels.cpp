// The CPU kernels against the formulas in double, without torch and Python: for machines that are
// emulated (`make emulate`). Runs every instruction set that the machine has; prints what is wrong.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/isa/bfloat16.h"
#include "cpu/api.h"

namespace {

using ff::Bool;
using ff::Type;
using Numbers = std::vector<double>;

struct Case {
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  bool masked, padded, causal;
};

const Case kCases[] = {
    {2, 3, 3, 20, 36, 64, 64, false, false, false}, {1, 4, 2, 49, 257, 40, 33, true, true, false},
    {1, 2, 1, 1, 300, 64, 64, false, true, false},  {2, 2, 2, 3, 19, 77, 5, true, false, true},
    {1, 2, 2, 70, 70, 1, 16, false, true, true},    {1, 1, 1, 5, 530, 160, 16, true, false, false},
    {1, 4, 2, 2, 2500, 16, 7, true, true, false},
};

void serial(int64_t tasks, void (*body)(int64_t, int64_t, const void*), const void* context) {
  for (int64_t i = 0; i < tasks; ++i) body(i, i + 1, context);
}

// A contiguous (B, H, rows, columns) tensor in a type, and what its numbers are in double.
struct Tensor {
  int64_t heads, rows, columns;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  Numbers exact;
  Type type;

  Tensor(Type type, int64_t batch, int64_t heads, int64_t rows, int64_t columns,
         std::mt19937* random)
      : heads(heads), rows(rows), columns(columns), type(type) {
    const auto count = size_t(batch * heads * rows * columns);
    std::normal_distribution<float> normal;
    wide.resize(count + 1, std::numeric_limits<float>::quiet_NaN());
    narrow.resize(count + 1, 0xffff);
    for (size_t i = 0; i < count && random; ++i) {
      wide[i] = normal(*random);
      if (type == Type::kFloat32) continue;
      ff::kernels().convert(&wide[i], &narrow[i], type, 1);
      wide[i] = narrow_value(i);
    }
    exact.assign(wide.begin(), wide.end() - 1);
  }

  float narrow_value(size_t i) const {
    if (type == Type::kBFloat16) return ff::bfloat16_to_float(narrow[i]);
    const uint32_t bits = narrow[i];  // float16
    const int exponent = int(bits >> 10 & 31), mantissa = int(bits & 1023);
    const float size = exponent ? std::ldexp(float(1024 + mantissa), exponent - 25)
                                : std::ldexp(float(mantissa), -24);
    if (exponent == 31) return std::numeric_limits<float>::quiet_NaN();
    return bits & 0x8000u ? -size : size;
  }

  double value(size_t i) const { return type == Type::kFloat32 ? wide[i] : narrow_value(i); }

  ff::View view() const {
    return {type == Type::kFloat32 ? static_cast<const void*>(wide.data()) : narrow.data(),
            heads * rows * columns, rows * columns, columns, 1};
  }

  ff::MutableView out() {
    const ff::View v = view();
    return {const_cast<void*>(v.data), v.batch, v.head, v.row, v.column};
  }

  const double* row(int64_t b, int64_t h, int64_t i) const {
    return exact.data() + ((b * heads + h) * rows + i) * columns;
  }
  double* row(int64_t b, int64_t h, int64_t i) {
    return exact.data() + ((b * heads + h) * rows + i) * columns;
  }
};

double dot(const double* a, const double* b, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

void add(double* to, double factor, const double* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

// Weights of a softmax over `count` scores that stand `stride` apart; -inf is hidden.
Numbers softmax(const double* scores, int64_t count, int64_t stride) {
  Numbers weights(static_cast<size_t>(count), 0.0);
  double largest = -INFINITY, sum = 0.0;
  for (int64_t i = 0; i < count; ++i) largest = std::fmax(largest, scores[i * stride]);
  if (std::isinf(largest)) return weights;
  for (int64_t i = 0; i < count; ++i)
    sum += weights[size_t(i)] = std::exp(scores[i * stride] - largest);
  for (double& weight : weights) weight /= sum;
  return weights;
}

int failures = 0;

void compare(const char* name, const Tensor& tensor, double most, const char* about) {
  double error = 0.0, size = 0.0;
  for (size_t i = 0; i < tensor.exact.size(); ++i) {
    const double difference = tensor.value(i) - tensor.exact[i];
    error += difference * difference;
    size += tensor.exact[i] * tensor.exact[i];
  }
  const double relative = std::sqrt(error / std::fmax(size, 1e-30));
  if (relative <= most) return;
  std::printf("WRONG %s %s: relative error %.2g, at most %.2g\n", about, name, relative, most);
  ++failures;
}

void check(const Case& c, Type type, const char* about) {
  std::mt19937 random(1);
  const auto normal = [&](int64_t heads, int64_t rows, int64_t columns) {
    return Tensor(type, c.batch, heads, rows, columns, &random);
  };
  const auto empty = [&](int64_t heads, int64_t rows, int64_t columns) {
    Tensor t(type, c.batch, heads, rows, columns, nullptr);
    t.exact.assign(t.exact.size(), 0.0);
    return t;
  };
  const double most = type == Type::kFloat32 ? 2e-6 : type == Type::kFloat16 ? 2e-3 : 2e-2;
  const Tensor query = normal(c.heads, c.q_len, c.head_dim);
  const Tensor key = normal(c.kv_heads, c.kv_len, c.head_dim);
  const Tensor value = normal(c.kv_heads, c.kv_len, c.value_dim);
  const Tensor grad_out = normal(c.heads, c.q_len, c.value_dim);
  const Tensor query_value = normal(c.heads, c.q_len, c.value_dim);
  const Tensor grad_keys = normal(c.heads, c.kv_len, c.value_dim);
  const Tensor mask(Type::kFloat32, c.batch, c.heads, c.q_len, c.kv_len, &random);
  constexpr uint8_t kBytes[] = {0, 0, 0, 0, 128, 255};  // two of six hide a key
  std::vector<Bool> padding(size_t(c.batch * c.kv_len));
  for (size_t i = 0; i < padding.size() && c.padded; ++i) padding[i] = {kBytes[random() % 6]};

  bool out_of_memory = false;
  const auto describe = [&](ff::Attention& p) {
    p.batch = c.batch, p.heads = c.heads, p.kv_heads = c.kv_heads, p.q_len = c.q_len;
    p.kv_len = c.kv_len, p.head_dim = c.head_dim, p.value_dim = c.value_dim, p.type = type;
    p.query = query.view(), p.key = key.view(), p.value = value.view();
    if (c.masked) p.mask = mask.view(), p.mask_type = Type::kFloat32;
    if (c.padded) p.padding = padding.data();
    p.padding_batch = c.kv_len, p.padding_column = 1;
    p.scale = 0.3f, p.right = c.causal ? 0 : ff::kEndless, p.out_of_memory = &out_of_memory;
  };

  // The formulas, for each head.
  Tensor out = empty(c.heads, c.q_len, c.value_dim), out_k = empty(c.heads, c.kv_len, c.value_dim);
  Tensor grad_query = empty(c.heads, c.q_len, c.head_dim);
  Tensor grad_key = empty(c.kv_heads, c.kv_len, c.head_dim);
  Tensor grad_value = empty(c.kv_heads, c.kv_len, c.value_dim);
  Tensor both_query = grad_query, both_key = grad_key, both_value = grad_value;
  Tensor grad_query_value = empty(c.heads, c.q_len, c.value_dim);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t g = h / (c.heads / c.kv_heads), width = c.kv_len;
      Numbers scores(static_cast<size_t>(c.q_len * width)), rows = scores, grads = scores;
      for (int64_t i = 0; i < c.q_len; ++i)
        for (int64_t j = 0; j < width; ++j) {
          const auto at = size_t(i * width + j);
          scores[at] = double(0.3f) * dot(query.row(b, h, i), key.row(b, g, j), c.head_dim);
          if (c.masked) scores[at] += mask.row(b, h, i)[j];
          rows[at] = scores[at];
          if (padding[size_t(b * width + j)] || (c.causal && j > i)) rows[at] = -INFINITY;
        }
      for (int64_t i = 0; i < c.q_len; ++i) {
        const Numbers weights = softmax(&rows[size_t(i * width)], width, 1);
        double delta = 0.0;
        for (int64_t j = 0; j < width; ++j) {
          const auto at = size_t(i * width + j);
          grads[at] = dot(grad_out.row(b, h, i), value.row(b, g, j), c.value_dim);
          delta += weights[size_t(j)] * grads[at];
          add(out.row(b, h, i), weights[size_t(j)], value.row(b, g, j), c.value_dim);
          add(grad_value.row(b, g, j), weights[size_t(j)], grad_out.row(b, h, i), c.value_dim);
        }
        for (int64_t j = 0; j < width; ++j) {
          double& grad = grads[size_t(i * width + j)];
          grad = double(0.3f) * weights[size_t(j)] * (grad - delta);
          add(grad_query.row(b, h, i), grad, key.row(b, g, j), c.head_dim);
          add(grad_key.row(b, g, j), grad, query.row(b, h, i), c.head_dim);
        }
      }
      for (int64_t j = 0; j < width; ++j) {  // the other direction
        const Numbers weights = softmax(&scores[size_t(j)], c.q_len, width);
        double delta = 0.0;
        for (int64_t i = 0; i < c.q_len; ++i) {
          const double weight = weights[size_t(i)];
          delta += weight * dot(grad_keys.row(b, h, j), query_value.row(b, h, i), c.value_dim);
          add(out_k.row(b, h, j), weight, query_value.row(b, h, i), c.value_dim);
          add(grad_query_value.row(b, h, i), weight, grad_keys.row(b, h, j), c.value_dim);
        }
        for (int64_t i = 0; i < c.q_len; ++i) {
          const double product = dot(grad_keys.row(b, h, j), query_value.row(b, h, i), c.value_dim);
          grads[size_t(i * width + j)] += double(0.3f) * weights[size_t(i)] * (product - delta);
        }
      }
      for (int64_t i = 0; i < c.q_len; ++i)
        for (int64_t j = 0; j < width; ++j) {
          add(both_query.row(b, h, i), grads[size_t(i * width + j)], key.row(b, g, j), c.head_dim);
          add(both_key.row(b, g, j), grads[size_t(i * width + j)], query.row(b, h, i), c.head_dim);
        }
    }

  ff::AttentionForward forward;
  describe(forward);
  forward.out = out.out();
  ff::kernels().attention_forward(forward, serial);
  compare("out", out, most, about);

  ff::AttentionBackward backward;
  describe(backward);
  backward.grad_out = grad_out.view();
  backward.grad_query = grad_query.out(), backward.grad_key = grad_key.out();
  backward.grad_value = grad_value.out();
  ff::kernels().attention_backward(backward, serial);
  compare("d query", grad_query, most, about);
  compare("d key", grad_key, most, about);
  compare("d value", grad_value, most, about);

  if (c.causal || c.heads != c.kv_heads) return;
  ff::BidirectionalForward both;
  describe(both);
  both.query_value = query_value.view(), both.query_value_dim = c.value_dim;
  both.out_q = out.out(), both.out_k = out_k.out();
  ff::kernels().bidirectional_forward(both, serial);
  compare("out_q", out, most, about);
  compare("out_k", out_k, most, about);

  ff::BidirectionalBackward gradients;
  describe(gradients);
  gradients.query_value = query_value.view(), gradients.query_value_dim = c.value_dim;
  gradients.grad_out_q = grad_out.view(), gradients.grad_out_k = grad_keys.view();
  both_value.exact = grad_value.exact;
  gradients.grad_query = both_query.out(), gradients.grad_key = both_key.out();
  gradients.grad_value = both_value.out();
  gradients.grad_query_value = grad_query_value.out();
  ff::kernels().bidirectional_backward(gradients, serial);
  compare("both, d query", both_query, most, about);
  compare("both, d key", both_key, most, about);
  compare("both, d value", both_value, most, about);
  compare("both, d query_value", grad_query_value, most, about);
  if (out_of_memory) ++failures;
}

ff::Weight of(const Tensor& weight, const Tensor* bias) {
  ff::Weight w{};
  w.data = weight.view().data, w.type = weight.type, w.row = weight.columns;
  if (bias) w.bias = bias->view().data;
  return w;
}

struct LinearCase {
  int64_t rows, length, width, features;
};
// Rows of outer products, inner products and both; widths and features that fill no register.
constexpr LinearCase kLinearCases[] = {{6, 1, 9, 5},      {40, 20, 33, 50}, {33, 33, 64, 7},
                                       {130, 65, 40, 49}, {3, 3, 300, 100}, {64, 64, 17, 16},
                                       {40, 20, 2048, 61}};

void check(const LinearCase& c, Type type, const char* about) {
  std::mt19937 random(1);
  const auto tensor = [&](int64_t rows, int64_t columns) {
    return Tensor(type, 1, 1, rows, columns, &random);
  };
  const Tensor x = tensor(c.rows, c.width), weight = tensor(c.features, c.width);
  const Tensor bias = tensor(1, c.features), residual = tensor(c.rows, c.features);
  Tensor out(type, 1, 1, c.rows, c.features, nullptr);
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t f = 0; f < c.features; ++f) {
      const double sum = bias.row(0, 0, 0)[f] + dot(x.row(0, 0, i), weight.row(0, 0, f), c.width);
      out.row(0, 0, i)[f] =
          0.5 * sum * (1.0 + std::erf(sum * std::sqrt(0.5))) + residual.row(0, 0, i)[f];
    }
  bool out_of_memory = false;
  ff::Linear p;
  p.rows = c.rows, p.length = c.length, p.width = c.width, p.features = c.features, p.type = type;
  p.x = x.view().data, p.x_row = c.width, p.weight = of(weight, &bias);
  p.activation = ff::Activation::kGelu;
  p.residual = residual.view().data, p.residual_row = c.features;
  p.out = out.out().data, p.out_row = c.features, p.out_of_memory = &out_of_memory;
  ff::kernels().linear(p, serial);
  compare("linear", out, type == Type::kFloat32 ? 1e-6 : 5e-3, about);
  if (out_of_memory) ++failures;
}

// A weight of random 8-bit integers, as kernels read it and as a matrix.
struct Packed {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<int> numbers;

  Packed(int64_t features, int64_t width, std::mt19937* random) {
    const int64_t panels = (features + 63) / 64, steps = (width + 3) / 4;
    bytes.assign(size_t(panels * steps * 256), 128);
    for (int64_t f = 0; f < features; ++f) {
      scales.push_back(0.01f + 0.001f * float(f % 7));
      for (int64_t k = 0; k < width; ++k) {
        numbers.push_back(int((*random)() % 255) - 127);
        bytes[size_t(((f / 64 * steps + k / 4) * 64 + f % 64) * 4 + k % 4)] =
            uint8_t(numbers.back() + 128);
      }
    }
  }
};

void check_linear_int8(const LinearCase& c, Type type, const char* about) {
  std::mt19937 random(1);
  const Tensor x(type, 1, 1, c.rows, c.width, &random), bias(type, 1, 1, 1, c.features, &random);
  const Packed weight(c.features, c.width, &random);
  Tensor out(type, 1, 1, c.rows, c.features, nullptr);
  for (int64_t i = 0; i < c.rows; ++i) {
    const double* row = x.row(0, 0, i);
    float most = 0.0f;
    for (int64_t k = 0; k < c.width; ++k) most = std::fmax(most, float(std::fabs(row[k])));
    for (int64_t f = 0; f < c.features; ++f) {
      double sum = 0.0;
      for (int64_t k = 0; k < c.width; ++k)
        sum += std::nearbyint(float(row[k]) * (127.0f / most)) *
               weight.numbers[size_t(f * c.width + k)];
      out.row(0, 0, i)[f] =
          bias.row(0, 0, 0)[f] + sum * double(most) / 127.0 * double(weight.scales[size_t(f)]);
    }
  }
  bool out_of_memory = false;
  ff::Linear p;
  p.rows = c.rows, p.length = c.length, p.width = c.width, p.features = c.features, p.type = type;
  p.x = x.view().data, p.x_row = c.width;
  p.weight = {weight.bytes.data(),  Type::kUInt8, 0,
              weight.scales.data(), c.features,   bias.view().data};
  p.out = out.out().data, p.out_row = c.features, p.out_of_memory = &out_of_memory;
  ff::kernels().linear(p, serial);
  compare("linear of integers", out, type == Type::kFloat32 ? 1e-6 : 5e-3, about);
  if (out_of_memory) ++failures;
}

// The encoder layer gives the bits of its steps.
void check_layer(Type type, bool norm_first, const char* about) {
  constexpr int64_t kBatch = 2, kLength = 21, kWidth = 24, kHeads = 3, kHidden = 70;
  constexpr int64_t kRows = kBatch * kLength, kHead = kWidth / kHeads;
  std::mt19937 random(1);
  const auto tensor = [&](int64_t rows, int64_t columns) {
    return Tensor(type, 1, 1, rows, columns, &random);
  };
  const auto empty = [&](int64_t columns) { return Tensor(type, 1, 1, kRows, columns, nullptr); };
  const Tensor x = tensor(kRows, kWidth), in = tensor(3 * kWidth, kWidth);
  const Tensor to = tensor(kWidth, kWidth), first = tensor(kHidden, kWidth);
  const Tensor second = tensor(kWidth, kHidden), scale = tensor(1, kWidth);
  Tensor heads = empty(3 * kWidth), attended = empty(kWidth), y = empty(kWidth);
  Tensor normed = empty(kWidth), hidden = empty(kHidden), steps = empty(kWidth);
  Tensor whole = empty(kWidth);
  bool out_of_memory = false;

  const auto norm = [&](const Tensor& from, Tensor& into) {
    ff::NormRows p;
    p.rows = kRows, p.width = kWidth, p.type = type, p.norm = {scale.view().data, nullptr, 1e-5f};
    p.x = from.view().data, p.x_row = kWidth, p.out = into.out().data, p.out_row = kWidth;
    ff::kernels().norm(p, serial);
  };
  const auto linear = [&](const Tensor& from, const Tensor& weight, Tensor& into,
                          const Tensor* residual, ff::Activation activation) {
    ff::Linear p;
    p.rows = kRows, p.length = kLength, p.width = from.columns, p.features = into.columns;
    p.type = type, p.x = from.view().data, p.x_row = from.columns, p.weight = of(weight, nullptr);
    p.activation = activation;
    if (residual) p.residual = residual->view().data, p.residual_row = kWidth;
    p.out = into.out().data, p.out_row = into.columns, p.out_of_memory = &out_of_memory;
    ff::kernels().linear(p, serial);
  };
  ff::EncoderLayer layer{};
  ff::AttentionForward& a = layer.attention;
  a.batch = kBatch, a.heads = a.kv_heads = kHeads, a.q_len = a.kv_len = kLength;
  a.head_dim = a.value_dim = kHead, a.type = type, a.scale = 0.3f, a.right = 0;
  a.out_of_memory = &out_of_memory;
  layer.type = type, layer.width = kWidth, layer.hidden = kHidden;
  layer.x = x.view().data, layer.x_row = kWidth;
  layer.in_proj.each[0] = of(in, nullptr), layer.out_proj = of(to, nullptr);
  layer.linear1 = of(first, nullptr), layer.linear2 = of(second, nullptr);
  layer.norm1 = layer.norm2 = {scale.view().data, nullptr, 1e-5f};
  layer.norm_first = norm_first, layer.activation = ff::Activation::kSilu;
  layer.out = whole.out().data;
  ff::kernels().encoder_layer(layer, serial);

  constexpr auto kNone = ff::Activation::kNone;
  if (norm_first) norm(x, normed);
  linear(norm_first ? normed : x, in, heads, nullptr, kNone);
  ff::AttentionForward call = a;
  const auto part = [&](int64_t i) {
    const auto* data = static_cast<const char*>(heads.view().data);
    const int64_t size = type == Type::kFloat32 ? 4 : 2;
    return ff::View{data + i * kWidth * size, kLength * 3 * kWidth, kHead, 3 * kWidth, 1};
  };
  call.query = part(0), call.key = part(1), call.value = part(2);
  call.out = {attended.out().data, kLength * kWidth, kHead, kWidth, 1};
  ff::kernels().attention_forward(call, serial);
  linear(attended, to, y, &x, kNone);
  if (!norm_first) norm(y, y);
  if (norm_first) norm(y, normed);
  linear(norm_first ? normed : y, first, hidden, nullptr, ff::Activation::kSilu);
  linear(hidden, second, steps, &y, kNone);
  if (!norm_first) norm(steps, steps);
  bool same = !out_of_memory;
  for (size_t i = 0; i < whole.exact.size(); ++i) same = same && whole.value(i) == steps.value(i);
  if (!same) ++failures, std::printf("%s encoder layer: not the bits of its steps\n", about);

  // Without a memory a decoder layer is the same; with a cache it reads keys and values there.
  ff::DecoderLayer decoder{};
  decoder.type = type, decoder.attention = a;
  decoder.width = kWidth, decoder.hidden = kHidden;
  decoder.x = layer.x, decoder.x_row = kWidth, decoder.in_proj = layer.in_proj;
  decoder.out_proj = layer.out_proj, decoder.linear1 = layer.linear1;
  decoder.linear2 = layer.linear2, decoder.norm1 = decoder.norm3 = layer.norm1;
  decoder.norm_first = norm_first, decoder.activation = layer.activation;
  for (const bool cached : {false, true}) {
    Tensor result = empty(kWidth), keys = empty(kWidth), values = empty(kWidth);
    decoder.out = result.out().data;
    if (cached) {
      decoder.key_cache = {keys.out().data, kLength * kWidth, kHead, kWidth, 1};
      decoder.value_cache = {values.out().data, kLength * kWidth, kHead, kWidth, 1};
    }
    ff::kernels().decoder_layer(decoder, serial);
    same = !out_of_memory;
    for (size_t i = 0; i < result.exact.size(); ++i) {
      same = same && result.value(i) == whole.value(i);
      if (!cached) continue;
      const size_t row = i / kWidth * 3 * kWidth + i % kWidth;
      same = same && keys.value(i) == heads.value(row + kWidth);
      same = same && values.value(i) == heads.value(row + 2 * kWidth);
    }
    if (!same) ++failures, std::printf("%s decoder layer: not the encoder's bits\n", about);
  }
}

}  // namespace

int main() {
  for (int i = 0; ff::compiled_isa(i); ++i) {
    const char* isa = ff::compiled_isa(i);
    if (!ff::supported_isa(i)) {
      std::printf("%s: compiled, but this machine does not have it\n", isa);
      continue;
    }
    ff::select_isa(isa);
    const int before = failures;
    int number = 0;
    for (const Case& c : kCases) {
      for (const Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16}) {
        char about[64];
        std::snprintf(about, sizeof about, "%s, case %d, type %d,", isa, number, int(type));
        check(c, type, about);
      }
      ++number;
    }
    for (const LinearCase& c : kLinearCases) {
      for (const Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16}) {
        char about[64];
        std::snprintf(about, sizeof about, "%s, case %d, type %d,", isa, number, int(type));
        check(c, type, about);
        check_linear_int8(c, type, about);
      }
      ++number;
    }
    for (const Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16})
      for (const bool norm_first : {false, true}) check_layer(type, norm_first, isa);
    std::printf("%s: %s\n", isa, failures == before ? "right" : "WRONG");
  }
  return failures != 0;
}
