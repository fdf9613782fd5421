// The CUDA attention kernels in the emulator, as a mutation test: every legal order of blocks and
// warps gives the same bits, and leaving out any barrier or wait is noticed in some order. Whether
// the bits are right is for the tests of the ops to say. `check_cuda_attention` prints a line for
// each kernel: its name, "orders agree" or not, and the calls that nobody misses. With an argument
// it prints in its stead how each device has 20 queries over so many keys.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/api.h"
#include "emulate/options.h"

namespace {

using ff::Bool;
using ff::Type;
using ff::View;
using ff::cuda::emulation::Kind;
using Bits = std::vector<uint16_t>;

// Numbers of about one, of an element size of two or four bytes.
std::vector<char> numbers(std::mt19937& random, int64_t count, Type type) {
  std::normal_distribution<float> normal;
  std::vector<char> data(size_t(count) * 4);
  for (int64_t i = 0; i < count; ++i) {
    const float x = normal(random);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (type == Type::kFloat32) std::memcpy(&data[size_t(4 * i)], &bits, 4);
    // In half precision the exponent's bias is 15, not 127; tiny numbers become 0.
    const int exponent = int(bits >> 23 & 255) - 112;
    const uint32_t half = exponent <= 0 ? 0 : uint32_t(exponent) << 10 | (bits >> 13 & 1023);
    const uint32_t short_bits = type == Type::kFloat16 ? (bits >> 16 & 0x8000) | half : bits >> 16;
    if (type != Type::kFloat32) std::memcpy(&data[size_t(2 * i)], &short_bits, 2);
  }
  return data;
}

struct Shape {
  const char* name;
  Type type;
  int64_t heads, q_len, kv_len, dim;
  bool both, padded;
};

// A call's outputs as bits, or the launch's error.
std::string run(const Shape& shape, Bits* results) {
  std::mt19937 random(1);
  const int64_t h = shape.heads, m = shape.q_len, n = shape.kv_len, d = shape.dim;
  auto query = numbers(random, h * m * d, shape.type), key = numbers(random, h * n * d, shape.type);
  auto value = numbers(random, h * n * d, shape.type);
  auto query_value = numbers(random, h * m * d, shape.type);
  const std::vector<Bool> padding(
      static_cast<size_t>(n));  // hides nothing, but has to be looked at
  ff::BidirectionalForward p{};
  p.batch = 1, p.heads = p.kv_heads = h, p.q_len = m, p.kv_len = n;
  p.head_dim = p.value_dim = p.query_value_dim = d;
  p.type = shape.type, p.scale = 0.125f;
  const View rows{nullptr, h * m * d, m * d, d, 1}, columns{nullptr, h * n * d, n * d, d, 1};
  p.query = rows, p.query_value = rows, p.key = columns, p.value = columns;
  p.query.data = query.data(), p.query_value.data = query_value.data();
  p.key.data = key.data(), p.value.data = value.data();
  if (shape.padded) {
    p.padding = padding.data();
    p.padding_batch = n, p.padding_column = 1;
  }
  const size_t size = size_t(h * (m + n) * d) * 2;
  results->assign(2 * size, 0xffff);
  p.out_q = {results->data(), h * m * d, m * d, d, 1};
  p.out_k = {results->data() + size, h * n * d, n * d, d, 1};
  ff::AttentionForward one{};
  static_cast<ff::Attention&>(one) = p;
  one.out = p.out_q;
  using namespace ff::cuda;
  const int capability = current_capability();
  const int64_t bytes =
      shape.both ? bidirectional_workspace(p, capability) : attention_workspace(one, capability);
  std::vector<char> workspace(size_t(bytes), char(0xff));
  const char* error = shape.both ? bidirectional_forward(p, workspace.data(), nullptr)
                                 : attention_forward(one, workspace.data(), nullptr);
  return error ? error : "";
}

void set_order(int i, bool record) {
  ff::cuda::emulation::Options options;
  using ff::cuda::emulation::Schedule;
  options.schedule = i & 1 ? Schedule::kGreedyWarp : Schedule::kRoundRobin;
  options.warps_descending = i & 2;
  options.blocks_descending = i & 4;
  options.record = record;
  ff::cuda::emulation::set_options(options);
}

// Whether some order gives an error or other bits.
bool differs(const Shape& shape, const Bits& expected) {
  for (int i = 8; i-- > 0;) {
    Bits results;
    set_order(i, false);
    if (!run(shape, &results).empty() || results != expected) return true;
  }
  return false;
}

void check(const Shape& shape) {
  using namespace ff::cuda::emulation;
  Bits expected;
  set_order(0, true);
  const std::string error = run(shape, &expected);
  const std::vector<Site> sites = take_call_sites();
  std::printf("%s: %s", shape.name,
              !error.empty()             ? error.c_str()
              : differs(shape, expected) ? "orders differ"
                                         : "orders agree");
  int removed = 0;
  for (const Site& site : sites) {
    if (site.kind != Kind::kBarrier && site.kind != Kind::kWait) continue;
    (site.kind == Kind::kWait ? skip_wait : skip_barrier)(site.file.c_str(), site.line);
    ++removed;
    if (!differs(shape, expected))
      std::printf(", missed %s at %s:%d", name(site.kind), site.file.c_str(), site.line);
    skip_nothing();
  }
  std::printf(", %d mutations\n", removed);
}

void print_paths(int64_t keys) {
  ff::AttentionForward p{};
  p.batch = p.heads = p.kv_heads = 1, p.q_len = 20, p.kv_len = keys;
  p.head_dim = p.value_dim = 64, p.type = Type::kFloat16, p.scale = 0.125f;
  for (int capability : {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121})
    std::printf("%d %s\n", capability, ff::cuda::attention_path(p, capability));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    print_paths(std::atoi(argv[1]));
    return 0;
  }
  const Shape shapes[] = {
      {"short", Type::kFloat16, 1, 20, 36, 64, false, false},
      {"slices", Type::kFloat16, 1, 20, 150, 64, false, false},
      {"slices_577", Type::kFloat16, 1, 20, 577, 64, false, true},
      {"chunks", Type::kFloat16, 1, 3, 700, 64, false, false},
      {"tiles", Type::kFloat16, 1, 70, 260, 64, false, true},
      {"tiles_256", Type::kFloat16, 1, 70, 100, 256, false, true},
      {"both", Type::kFloat16, 1, 36, 20, 64, true, false},
      {"float32", Type::kFloat32, 1, 20, 150, 64, false, true},
      {"float32_long", Type::kFloat32, 1, 70, 150, 64, false, true},
  };
  for (const Shape& shape : shapes) check(shape);
  return 0;
}
