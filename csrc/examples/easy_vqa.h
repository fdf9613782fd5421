// The model of fastfusion/applications/vqa/model.py on a CPU, of one question at a time, from its
// checkpoint: the weights are read where they lie in the file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "cpu/api.h"
#include "safetensors.h"

namespace easy_vqa {

using safetensors::File;

constexpr int64_t kPixels = 64, kColours = 3, kKernel = 4, kStages = 3;

// Everything on the calling thread; a pool would share [0, tasks) out.
inline void serial(int64_t tasks, void (*body)(int64_t, int64_t, const void*),
                   const void* context) {
  body(0, tasks, context);
}

// (rows, width), contiguous.
struct Matrix {
  int64_t rows = 0, width = 0;
  std::vector<float> numbers;

  void resize(int64_t new_rows, int64_t new_width) {
    rows = new_rows, width = new_width;
    numbers.resize(size_t(rows * width));
  }
  float* row(int64_t i) { return numbers.data() + i * width; }
  const float* row(int64_t i) const { return numbers.data() + i * width; }
};

// A linear layer whose weight (features, width) is the file's.
struct Layer {
  ff::Weight weight;
  int64_t width, features;
};

inline Layer layer(const float* weight, const float* bias, int64_t width, int64_t features) {
  ff::Weight found{};
  found.data = weight, found.type = ff::Type::kFloat32, found.row = width, found.bias = bias;
  return {found, width, features};
}

inline Layer read_layer(const File& file, const std::string& weight, const std::string& bias,
                        int64_t width, int64_t features) {
  return layer(file.numbers<float>(weight, {features, width}),
               file.numbers<float>(bias, {features}), width, features);
}

inline Layer read_layer(const File& file, const std::string& name, int64_t width,
                        int64_t features) {
  return read_layer(file, name + ".weight", name + ".bias", width, features);
}

inline ff::Norm read_norm(const File& file, const std::string& name, int64_t width) {
  return {file.numbers<float>(name + ".weight", {width}),
          file.numbers<float>(name + ".bias", {width}), 1e-5f};
}

// What one modality owns of the fusion layer.
struct Stream {
  Layer in_proj, out_proj, linear1, linear2;
  ff::Norm norm1, norm2;

  Stream(const File& file, const std::string& name, int64_t width, int64_t hidden)
      : in_proj(read_layer(file, name + ".in_proj", width, 2 * width)),
        out_proj(read_layer(file, name + ".out_proj", width, width)),
        linear1(read_layer(file, name + ".linear1", width, hidden)),
        linear2(read_layer(file, name + ".linear2", hidden, width)),
        norm1(read_norm(file, name + ".norm1", width)),
        norm2(read_norm(file, name + ".norm2", width)) {}
};

// What the checkpoint says of itself.
struct Config {
  int64_t words = 0, answers = 0, width = 0, num_heads = 0, dim_feedforward = 0, num_layers = 0;
  int64_t max_words = 0;
  std::vector<std::string> names;  // of the answers

  explicit Config(const File& file) {
    if (file.metadata("format") != "fastfusion easy-vqa 2") file.fail("is of another format");
    Json sizes(file.metadata("config"), file.path() + ": config");
    sizes.object([&](const std::string& key) {
      int64_t* size = key == "words"             ? &words
                      : key == "answers"         ? &answers
                      : key == "width"           ? &width
                      : key == "num_heads"       ? &num_heads
                      : key == "dim_feedforward" ? &dim_feedforward
                      : key == "num_layers"      ? &num_layers
                      : key == "max_words"       ? &max_words
                                                 : nullptr;
      if (size) {
        *size = sizes.integer();
      } else {
        sizes.skip();
      }
    });
    constexpr int64_t kMost = 1 << 20;
    for (const int64_t size :
         {words, answers, width, num_heads, dim_feedforward, num_layers, max_words})
      if (size < 1 || size > kMost) file.fail("has a size below 1 or above 2^20 in its config");
    if (width % num_heads != 0 || width % 4 != 0)
      file.fail("has a width that is no multiple of num_heads and of 4");
    Json list(file.metadata("answers"), file.path() + ": answers");
    list.array([&] { names.push_back(list.string()); });
    if (int64_t(names.size()) != answers)
      file.fail("has another number of answers than its config");
  }
};

// fastfusion.applications.vqa.model.EasyVQA of a file that stays open.
class Model {
 public:
  Model(const Model&) = delete;  // layers know where out_of_memory_ is
  explicit Model(const File& file) : config(file) {
    int64_t channels = kColours;
    for (int i = 0; i < kStages; ++i) {
      const int64_t features = config.width >> (kStages - 1 - i);
      const std::string name = "model.stem." + std::to_string(2 * i);
      stem_.push_back(layer(
          file.numbers<float>(name + ".weight", {features, channels, kKernel, kKernel}),
          file.numbers<float>(name + ".bias", {features}), channels * kKernel * kKernel, features));
      channels = features;
    }
    position_ = file.numbers<float>("model.stem.position", {kTokens, config.width});
    words_ = file.numbers<float>("model.question.word.weight", {config.words, config.width});
    word_position_ =
        file.numbers<float>("model.question.position", {config.max_words, config.width});
    for (int64_t i = 0; i < config.num_layers; ++i) {
      visual_layers_.push_back(encoder_layer(file, "visual", i));
      text_layers_.push_back(encoder_layer(file, "text", i));
    }
    for (const char* name : {"visual", "text"})
      streams_.emplace_back(file, std::string("model.transformer.fusion.") + name, config.width,
                            config.dim_feedforward);
    output_ = read_layer(file, "model.transformer.output", 2 * config.width, config.answers);
  }

  // The logits, until the next call. `image`: (3, 64, 64); `words`: (length), 0 = padding.
  const std::vector<float>& answer(const uint8_t* image, const int64_t* words, int64_t length) {
    look(image);
    encode(visual_layers_, nullptr, &visual_);
    read(words, length);
    encode(text_layers_, padding_.data(), &text_);
    fuse();
    pooled_.resize(1, 2 * config.width);
    mean(visual_, nullptr, pooled_.row(0));
    mean(text_, padding_.data(), pooled_.row(0) + config.width);
    linear(pooled_, output_, &logits_);
    if (out_of_memory_) throw std::bad_alloc();
    return logits_.numbers;
  }

  const Config config;

 private:
  static constexpr int64_t kTokens = (kPixels >> kStages) * (kPixels >> kStages);

  ff::EncoderLayer encoder_layer(const File& file, const std::string& modality, int64_t number) {
    const std::string name =
        "model.transformer." + modality + "_encoder.layers." + std::to_string(number) + ".";
    const int64_t width = config.width, hidden = config.dim_feedforward;
    ff::EncoderLayer call{};
    call.type = ff::Type::kFloat32, call.width = width, call.hidden = hidden;
    const std::string attention = name + "self_attn.";
    call.in_proj.each[0] =
        read_layer(file, attention + "in_proj_weight", attention + "in_proj_bias", width, 3 * width)
            .weight;
    call.out_proj = read_layer(file, attention + "out_proj", width, width).weight;
    call.linear1 = read_layer(file, name + "linear1", width, hidden).weight;
    call.linear2 = read_layer(file, name + "linear2", hidden, width).weight;
    call.norm1 = read_norm(file, name + "norm1", width);
    call.norm2 = read_norm(file, name + "norm2", width);
    call.activation = ff::Activation::kRelu;
    describe_heads(&call.attention);
    return call;
  }

  void describe_heads(ff::Attention* call) {
    call->batch = 1, call->heads = call->kv_heads = config.num_heads;
    call->head_dim = call->value_dim = config.width / config.num_heads;
    call->type = ff::Type::kFloat32;
    call->scale = float(1.0 / std::sqrt(double(call->head_dim)));
    call->out_of_memory = &out_of_memory_;
  }

  void linear(const Matrix& x, const Layer& layer, Matrix* out,
              ff::Activation activation = ff::Activation::kNone, const float* residual = nullptr) {
    out->resize(x.rows, layer.features);
    ff::Linear call{};
    call.rows = call.length = x.rows, call.width = layer.width, call.features = layer.features;
    call.type = ff::Type::kFloat32, call.weight = layer.weight, call.activation = activation;
    call.x = x.row(0), call.x_row = x.width;
    call.residual = residual, call.residual_row = layer.features;
    call.out = out->row(0), call.out_row = layer.features;
    call.out_of_memory = &out_of_memory_;
    ff::kernels().linear(call, serial);
  }

  // In place: a row is read before it is written.
  static void normalize(const ff::Norm& norm, Matrix* x) {
    ff::NormRows call{};
    call.rows = x->rows, call.width = x->width, call.type = ff::Type::kFloat32, call.norm = norm;
    call.x = call.out = x->row(0), call.x_row = call.out_row = x->width;
    ff::kernels().norm(call, serial);
  }

  // The image as tokens: convolutions of 4x4 pixels, every second one, as linear layers.
  void look(const uint8_t* image) {
    visual_.resize(kPixels * kPixels, kColours);
    for (int64_t c = 0; c < kColours; ++c)
      for (int64_t i = 0; i < visual_.rows; ++i)
        visual_.row(i)[c] = float(image[c * visual_.rows + i]) / 255.0f * 2.0f - 1.0f;
    for (int i = 0; i < kStages; ++i) {
      gather_patches(visual_, kPixels >> i);
      const bool last = i == kStages - 1;
      linear(patches_, stem_[size_t(i)], &visual_,
             last ? ff::Activation::kNone : ff::Activation::kRelu, last ? position_ : nullptr);
    }
  }

  // The numbers under the kernel at every place of (size, size) pixels, as its weight has them.
  void gather_patches(const Matrix& pixels, int64_t size) {
    const int64_t half = size / 2, channels = pixels.width;
    patches_.resize(half * half, channels * kKernel * kKernel);
    const std::vector<float> outside(size_t(channels), 0.0f);
    for (int64_t place = 0; place < patches_.rows; ++place) {
      for (int64_t i = 0; i < kKernel * kKernel; ++i) {
        const int64_t y = 2 * (place / half) + i / kKernel - 1;
        const int64_t x = 2 * (place % half) + i % kKernel - 1;
        const bool inside = y >= 0 && y < size && x >= 0 && x < size;
        const float* from = inside ? pixels.row(y * size + x) : outside.data();
        float* to = patches_.row(place) + i;
        for (int64_t c = 0; c < channels; ++c) to[c * kKernel * kKernel] = from[c];
      }
    }
  }

  // The question as tokens, and which of them are padding.
  void read(const int64_t* words, int64_t length) {
    text_.resize(length, config.width);
    padding_.resize(size_t(length));
    for (int64_t i = 0; i < length; ++i) {
      padding_[size_t(i)] = {words[i] == 0};
      for (int64_t k = 0; k < config.width; ++k)
        text_.row(i)[k] =
            words_[words[i] * config.width + k] + word_position_[i * config.width + k];
    }
  }

  void encode(const std::vector<ff::EncoderLayer>& layers, const ff::Bool* padding,
              Matrix* tokens) {
    for (ff::EncoderLayer call : layers) {
      call.attention.q_len = call.attention.kv_len = tokens->rows;
      call.attention.padding = padding, call.attention.padding_column = 1;
      call.x = tokens->row(0), call.x_row = tokens->width;
      encoded_.resize(tokens->rows, tokens->width);
      call.out = encoded_.row(0);
      ff::kernels().encoder_layer(call, serial);
      std::swap(*tokens, encoded_);
    }
  }

  // fastfusion.nn.CrossModalAttention: image and words attend to each other, with the same scores.
  void fuse() {
    const Stream &of_visual = streams_[0], &of_text = streams_[1];
    linear(visual_, of_visual.in_proj, &visual_heads_);
    linear(text_, of_text.in_proj, &text_heads_);
    to_visual_.resize(visual_.rows, config.width);
    to_text_.resize(text_.rows, config.width);

    ff::BidirectionalForward call{};
    describe_heads(&call);
    call.q_len = visual_.rows, call.kv_len = text_.rows;
    call.query_value_dim = call.value_dim;
    // What scores are made of and values stand side by side, each with its heads.
    const auto part = [&](const Matrix& heads, int64_t offset) {
      return ff::View{heads.row(0) + offset, 0, call.head_dim, heads.width, 1};
    };
    call.query = part(visual_heads_, 0), call.query_value = part(visual_heads_, config.width);
    call.key = part(text_heads_, 0), call.value = part(text_heads_, config.width);
    call.padding = padding_.data(), call.padding_column = 1;
    call.out_q = {to_visual_.row(0), 0, call.head_dim, config.width, 1};
    call.out_k = {to_text_.row(0), 0, call.head_dim, config.width, 1};
    ff::kernels().bidirectional_forward(call, serial);
    add(to_visual_, of_visual, &visual_);
    add(to_text_, of_text, &text_);
  }

  // The rest of the fusion layer, from what the tokens attended to.
  void add(const Matrix& attended, const Stream& stream, Matrix* tokens) {
    linear(attended, stream.out_proj, &sum_, ff::Activation::kNone, tokens->row(0));
    normalize(stream.norm1, &sum_);
    linear(sum_, stream.linear1, &hidden_, ff::Activation::kRelu);
    linear(hidden_, stream.linear2, tokens, ff::Activation::kNone, sum_.row(0));
    normalize(stream.norm2, tokens);
  }

  // The mean of the tokens that are not padding, 0 where all are.
  static void mean(const Matrix& tokens, const ff::Bool* padding, float* out) {
    std::fill_n(out, tokens.width, 0.0f);
    int64_t count = 0;
    for (int64_t i = 0; i < tokens.rows; ++i) {
      if (padding && padding[i]) continue;
      ++count;
      for (int64_t k = 0; k < tokens.width; ++k) out[k] += tokens.row(i)[k];
    }
    for (int64_t k = 0; k < tokens.width; ++k) out[k] /= float(std::max<int64_t>(count, 1));
  }

  std::vector<Layer> stem_;
  const float *position_, *words_, *word_position_;
  std::vector<ff::EncoderLayer> visual_layers_, text_layers_;
  std::vector<Stream> streams_;  // of the image, of the text
  Layer output_;

  bool out_of_memory_ = false;
  // Memory that is kept from call to call.
  Matrix visual_, text_, patches_, encoded_, visual_heads_, text_heads_, to_visual_, to_text_, sum_,
      hidden_, pooled_, logits_;
  std::vector<ff::Bool> padding_;
};

}  // namespace easy_vqa
