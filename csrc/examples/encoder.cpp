// Answers questions about images on a CPU, without Python and without torch: the model of
// fastfusion/applications/vqa/model.py from its checkpoint, whose weights are read where they lie
// in the file.
//
//   encoder MODEL.safetensors INPUTS.safetensors [RUNS]
//
// The inputs are tensors `images` U8 (images, 3, 64, 64), `questions` I64 (texts, length), word
// numbers padded with 0, and `image_index` and `text_index` I64 (questions): which text is asked
// about which image. Prints a line for each question, number, class, answer and the logits of all
// classes, and how long a question takes from pixels and words to logits: the median of RUNS, 200
// unless given, 0 for no timing. Exit code 1 and one line where a file is not right.
//
// README: `make example` builds it static, with kernels.cpp for its kernels. With all kernels of
// the package, from the root of the repository:
//   g++ -std=c++20 -O2 -Icsrc csrc/examples/encoder.cpp -Lfastfusion -lfastfusion_cpu
//     -Wl,-rpath,fastfusion -o encoder
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "cpu/api.h"
#include "easy_vqa.h"
#include "safetensors.h"

namespace {

using easy_vqa::kColours;
using easy_vqa::kPixels;
using safetensors::File;

struct Inputs {
  const uint8_t* images;
  const int64_t *texts, *image_index, *text_index;
  int64_t length, count;

  Inputs(const File& file, const easy_vqa::Config& config) {
    images = file.numbers<uint8_t>("images", {-1, kColours, kPixels, kPixels});
    texts = file.numbers<int64_t>("questions", {-1, -1});
    image_index = file.numbers<int64_t>("image_index", {-1});
    count = file.tensor("image_index").shape[0];
    text_index = file.numbers<int64_t>("text_index", {count});
    const auto& shape = file.tensor("questions").shape;
    length = shape[1];
    if (length < 1 || length > config.max_words)
      file.fail("questions have " + std::to_string(length) + " words, expected 1 to " +
                std::to_string(config.max_words));
    check(file, "questions", texts, shape[0] * length, config.words);
    check(file, "image_index", image_index, count, file.tensor("images").shape[0]);
    check(file, "text_index", text_index, count, shape[0]);
  }

  static void check(const File& file, const char* name, const int64_t* numbers, int64_t count,
                    int64_t end) {
    for (int64_t i = 0; i < count; ++i)
      if (numbers[i] < 0 || numbers[i] >= end)
        file.fail(std::string(name) + " has the number " + std::to_string(numbers[i]) +
                  ", expected 0 to " + std::to_string(end - 1));
  }

  const std::vector<float>& ask(easy_vqa::Model* model, int64_t question) const {
    return model->answer(images + image_index[question] * kColours * kPixels * kPixels,
                         texts + text_index[question] * length, length);
  }
};

// Median microseconds of a question.
double time_questions(const Inputs& inputs, easy_vqa::Model* model, int64_t runs) {
  std::vector<double> times(static_cast<size_t>(runs));
  for (int64_t i = 0; i < runs; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    inputs.ask(model, i % inputs.count);
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - begin;
    times[size_t(i)] = time.count();
  }
  std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
  return times[size_t(runs / 2)];
}

void run(const char* checkpoint, const char* questions, int64_t runs) {
  const File weights(checkpoint), file(questions);
  easy_vqa::Model model(weights);
  const Inputs inputs(file, model.config);
  for (int64_t i = 0; i < inputs.count; ++i) {
    const std::vector<float>& logits = inputs.ask(&model, i);
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    std::printf("%lld %d %s", static_cast<long long>(i), int(best),
                model.config.names[size_t(best)].c_str());
    for (const float logit : logits) std::printf(" %.9g", double(logit));
    std::printf("\n");
  }
  if (runs > 0 && inputs.count > 0)
    std::printf("a question: %.1f us (median of %lld, one thread, %s)\n",
                time_questions(inputs, &model, runs), static_cast<long long>(runs),
                ff::kernels().isa);
}

}  // namespace

int main(int argc, char** argv) {
  char* end = nullptr;
  const long runs = argc == 4 ? std::strtol(argv[3], &end, 10) : 200;
  if (argc < 3 || argc > 4 || (end && (*end || end == argv[3])) || runs < 0 || runs > 1000000) {
    std::fprintf(stderr, "usage: encoder MODEL.safetensors INPUTS.safetensors [RUNS]\n");
    return 2;
  }
  try {
    run(argv[1], argv[2], runs);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "encoder: %s\n", error.what());
    return 1;
  }
  return 0;
}
