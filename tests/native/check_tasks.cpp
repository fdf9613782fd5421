// Into how many tasks a backward call is cut where the gradient of its mask is summed, printed for
// the four kinds of broadcasts; and that the sums are the same whoever runs them.

#include <cstdio>
#include <vector>

#include "cpu/api.h"

namespace {

constexpr int64_t kBatch = 3, kHeads = 4, kLength = 64, kDim = 16;

int64_t tasks_of_call = 1;  // one runs without asking
bool backwards = false;

void count_tasks(int64_t tasks, void (*body)(int64_t, int64_t, const void*), const void* context) {
  tasks_of_call = tasks;
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t task = backwards ? tasks - 1 - i : i;
    body(task, task + 1, context);
  }
}

struct Tensor {
  std::vector<float> data = std::vector<float>(kBatch * kHeads * kLength * kDim);
  ff::View view() {
    constexpr int64_t kHead = kLength * kDim;
    return {data.data(), kHeads * kHead, kHead, kDim, 1};
  }
  ff::MutableView out() {
    const ff::View v = view();
    return {data.data(), v.batch, v.head, v.row, v.column};
  }
};

// The sums of a mask's gradient, which repeats along what has stride 0.
std::vector<double> gradient(int64_t batch, int64_t head) {
  Tensor query, key, value, grad, grad_query, grad_key, grad_value;
  uint32_t seed = 1;
  for (Tensor* t : {&query, &key, &value, &grad})
    for (float& x : t->data) x = float((seed = seed * 1664525u + 1013904223u) >> 16) / 65536.0f;
  const std::vector<float> mask(size_t(kBatch * kHeads * kLength * kLength));
  std::vector<double> sums(mask.size(), 0.0);
  bool out_of_memory = false;
  tasks_of_call = 1;
  ff::AttentionBackward p{};
  p.batch = kBatch, p.heads = p.kv_heads = kHeads, p.q_len = p.kv_len = kLength;
  p.head_dim = p.value_dim = kDim, p.type = ff::Type::kFloat32, p.scale = 0.25f;
  p.query = query.view(), p.key = key.view(), p.value = value.view(), p.grad_out = grad.view();
  p.mask = {mask.data(), batch, head, kLength, 1}, p.mask_type = ff::Type::kFloat32;
  p.grad_query = grad_query.out(), p.grad_key = grad_key.out(), p.grad_value = grad_value.out();
  p.grad_mask.sums = sums.data(), p.grad_mask.batch = batch, p.grad_mask.head = head;
  p.grad_mask.row = kLength, p.grad_mask.column = 1;
  p.out_of_memory = &out_of_memory;
  ff::kernels().attention_backward(p, count_tasks);
  return sums;
}

}  // namespace

int main() {
  constexpr int64_t kEntry = kLength * kLength;
  for (const int64_t batch : {kHeads * kEntry, int64_t{0}})
    for (const int64_t head : {kEntry, int64_t{0}}) {
      backwards = false;
      const auto sums = gradient(batch, head);
      backwards = true;
      const bool same = sums == gradient(batch, head);
      std::printf("%d%s ", int(tasks_of_call), same ? "" : "!");
    }
  return 0;
}
