// Kernels with a fault each, and their right twins, for the emulator of csrc/emulate. Compiled for
// two FF_ARCH that are linked together; `check_emulator 80 name broken` runs a kernel in every
// order and prints what came of it: right, wrong, or the launch's error.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cuda/device.h"
#include "emulate/options.h"
#include "emulated_kernels.h"

namespace ff::cuda {
namespace {

using Numbers = std::vector<float>;
using emulation::Schedule;

template <auto kKernel>
std::string run(Numbers* out, int shared = 16384) {
  Numbers in(kBlocks * 8 * kTile);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i + 1);
  unsigned counter = 0;
  const char* error = launch<kKernel>(Launch{kBlocks, kThreads, shared, nullptr},
                                      Params{in.data(), out->data(), &counter});
  return error ? error : "";
}

// What thread t of block b is to write.
using Expected = int (*)(int b, int t);

int zero(int, int) { return 0; }
int one(int, int) { return 1; }
int two(int, int) { return 2; }
int same(int, int t) { return t; }
int mirrored(int, int t) { return kThreads - 1 - t; }
int mirrored_in_warp(int, int t) { return t ^ 31; }
int six_mirrored(int, int t) { return 6 * mirrored(0, t); }
int first_copied(int, int t) { return 4 * t + 1; }
int twice_copied(int, int t) { return 2 * first_copied(0, t); }
int sum_in_first_block(int b, int t) { return b ? t : kBlocks * t; }
int sum_of_tiles(int b, int t) {
  int sum = 0;
  for (int tile = 0; tile < 6; ++tile) sum += (b * 8 + tile) * kTile + kTile - 4 * t;
  return sum;
}

template <auto kKernel>
std::string check(Expected expected, int shared = 16384) {
  Numbers out(kBlocks * kThreads, NAN);
  const std::string error = run<kKernel>(&out, shared);
  if (!error.empty()) return error;
  for (int i = 0; i < kBlocks * kThreads; ++i)
    if (out[size_t(i)] != float(expected(i / kThreads, i % kThreads))) return "wrong";
  return "right";
}

// C = A B, twice: with B[n][k] and plain loads, and with B[k][n] and transposed ones.
template <class T, bool kTransposed>
FF_KERNEL(kThreads)
product(Params p) {
  Shared shared;
  T* a = shared.take<T>(16 * 32);  // [row][k]
  T* b = shared.take<T>(8 * 32);   // [column][k] or [k][column]
  const int lane = lane_index();
  for (int i = thread_index(); i < 16 * 32; i += kThreads) a[i] = from_float<T>(p.in[i] - 256);
  for (int i = thread_index(); i < 8 * 32; i += kThreads) b[i] = from_float<T>(p.in[i] - 128);
  barrier();
  uint32_t x[4], y[4];
  float c[4] = {1, 2, 3, 4};
  if (kTransposed) {
    load_matrix4_transposed(y, b + lane * 8);
  } else {
    load_matrix4(y, b + lane % 8 * 32 + lane / 8 * 8);
  }
  for (int k = 0; k < 32; k += 16) {
    load_matrix4(x, a + lane % 16 * 32 + k + lane / 16 * 8);
    mma<T>(c, x, y[k / 8], y[k / 8 + 1]);
  }
  for (int i = 0; i < 4; ++i)
    if (warp_index() == 1)
      p.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i] - float(i + 1);
}

template <class T, bool kTransposed>
std::string check_product() {
  Numbers out(kBlocks * kThreads, NAN);
  const std::string error = run<product<T, kTransposed>>(&out);
  if (!error.empty()) return error;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0;  // of whole numbers below 2^24
      for (int k = 0; k < 32; ++k)
        sum += float(row * 32 + k - 255) *
               float((kTransposed ? k * 8 + column : column * 32 + k) - 127);
      if (out[size_t(row * 8 + column)] != sum) return "wrong";
    }
  }
  return "right";
}

// Every 16-bit number through a product with 1, through to_float and back, and packed.
template <class T>
FF_KERNEL(kThreads)
numbers(Params p) {
  int wrong = 0;
  for (int first = 0; first < 1 << 16; first += 16) {
    const int row = lane_index() / 4;
    uint32_t a[4] = {};
    float c[4] = {};
    if (lane_index() % 4 == 0) a[0] = uint32_t(first + row), a[1] = uint32_t(first + row + 8);
    const uint32_t one = pack<T>(1, 1);
    mma<T>(c, a, one, one);
    for (int i = 0; i < 4; ++i) {
      const T value{uint16_t(first + row + i / 2 * 8)};
      const float wide = to_float(value);
      const uint32_t both = pack<T>(wide, -wide);
      if (std::isnan(wide)) {
        wrong += !std::isnan(c[i]) || !std::isnan(low<T>(both)) || !std::isnan(high<T>(both));
      } else {
        wrong += c[i] != wide || from_float<T>(wide).bits != value.bits || low<T>(both) != wide ||
                 high<T>(both) != -wide;
      }
    }
  }
  write(p, float(wrong));
}

template <class T>
std::string check_rounding(float one_up, float largest) {
  const auto round = [](float x) { return to_float(from_float<T>(x)); };
  const float middle = 1 + (one_up - 1) / 2;
  bool right = round(middle) == 1 && round(std::nextafter(middle, 2.0f)) == one_up;
  right = right && round(one_up + (one_up - 1) / 2) == 2 * one_up - 1;
  right = right && round(largest) == largest && std::isinf(round(std::nextafter(INFINITY, 0.0f)));
  right = right && std::isnan(round(NAN)) && std::signbit(round(-0.0f)) && round(INFINITY) > 1e38f;
  if constexpr (std::is_same_v<T, Half>)
    right = right && round(65519.996f) == 65504 && std::isinf(round(65520)) &&
            round(0x1.8p-24f) == 0x1p-23f && round(0x1p-25f) == 0 && round(0x1.1p-25f) == 0x1p-24f;
  return right ? "right" : "wrong";
}

template <class T>
std::string check_type(float one_up, float largest) {
  std::string all = check_product<T, false>() + " " + check_product<T, true>() + " " +
                    check<numbers<T>>(zero) + " " + check_rounding<T>(one_up, largest);
  return all == "right right right right" ? "right" : all;
}

void set_order(int i, bool record) {
  emulation::Options options;
  options.schedule = i & 1 ? Schedule::kGreedyWarp : Schedule::kRoundRobin;
  options.warps_descending = i & 2;
  options.blocks_descending = i & 4;
  options.record = record;
  emulation::set_options(options);
}

// Leaves out each barrier and wait of the pipeline in turn, and says whether any order notices.
std::string mutations() {
  set_order(0, true);
  check<pipeline<false>>(sum_of_tiles);
  std::string found;
  for (const emulation::Site& site : emulation::take_call_sites()) {
    found += std::string(emulation::name(site.kind)) + " ";
    if (site.kind != emulation::Kind::kBarrier && site.kind != emulation::Kind::kWait) continue;
    auto* skip =
        site.kind == emulation::Kind::kWait ? emulation::skip_wait : emulation::skip_barrier;
    skip(site.file.c_str(), site.line);
    bool caught = false;
    for (int i = 0; i < 8 && !caught; ++i) {
      set_order(i, false);
      caught = check<pipeline<false>>(sum_of_tiles) != "right";
    }
    emulation::skip_nothing();
    found += caught ? "(caught) " : "(missed) ";
  }
  return found;
}

std::string from_two_threads() {
  std::string results[2];
  std::vector<std::thread> threads;
  for (std::string& result : results) {
    threads.emplace_back([&result] {
      result = "right";
      for (int i = 0; i < 50 && result == "right"; ++i) {
        result = check<read_after_write<false>>(mirrored);
        const std::string error = check<early_return<true>>(same);
        if (error.find("has returned") == std::string::npos) result = error;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results[0] == "right" ? results[1] : results[0];
}

struct Case {
  const char* name;
  std::string (*right)(Expected, int);
  std::string (*broken)(Expected, int);
  Expected expected;
  int shared = 16384;
};

#define FF_CASE(kernel) #kernel, check<kernel<false>>, check<kernel<true>>
const Case kCases[] = {
    {FF_CASE(read_after_write), mirrored},
    {FF_CASE(write_after_read), six_mirrored},
    {FF_CASE(neighbour_lane), mirrored_in_warp},
    {FF_CASE(missing_wait), first_copied},
    {FF_CASE(weak_wait), twice_copied},
    {FF_CASE(pipeline), sum_of_tiles},
    {FF_CASE(late_copy), two},
    {FF_CASE(read_past_array), same},
    {FF_CASE(write_past_array), same},
    {FF_CASE(write_before_array), same},
    {FF_CASE(read_past_local), same},
    {FF_CASE(misaligned_row), same},
    {FF_CASE(row_outside), same},
    {FF_CASE(misaligned_source), one},
    {FF_CASE(early_return), same},
    {FF_CASE(early_return_in_warp), same},
    {FF_CASE(divergence), same},
    {FF_CASE(divergent_barrier), same},
    {FF_CASE(different_barriers), same},
    {FF_CASE(too_much_shared), same, 2 * kSharedAlignment},
    {FF_CASE(different_arrays), same},
    {FF_CASE(last_block), sum_in_first_block},
    {FF_CASE(shuffles), one},
};

std::string run_case(const std::string& name, bool broken) {
  for (const Case& test : kCases)
    if (name == test.name) return (broken ? test.broken : test.right)(test.expected, test.shared);
  if (name == "launch_beyond_limit")
    return check<read_after_write<false>>(mirrored, shared_limit(FF_ARCH) + int(broken));
  if (name == "half") return check_type<Half>(0x1.004p0f, 65504);
  if constexpr (has_mma<BFloat16>())
    if (name == "bfloat16") return check_type<BFloat16>(0x1.02p0f, 0x1.fep127f);
  if (name == "from_two_threads") return from_two_threads();
  return "no such case";
}

}  // namespace

#define FF_ENTRY FF_JOIN(check_emulator_, FF_ARCH)
void FF_ENTRY(const std::string& name, bool broken) {
  if (name == "mutations") {
    std::printf("%s\n", mutations().c_str());
    return;
  }
  for (int i = 0; i < 8; ++i) {
    set_order(i, false);
    std::printf("%s warps %s blocks %s: %s\n", i & 1 ? "greedy" : "in turns", i & 2 ? "down" : "up",
                i & 4 ? "down" : "up", run_case(name, broken).c_str());
    std::fflush(stdout);
  }
}

}  // namespace ff::cuda

#if FF_ARCH == 80
namespace ff::cuda {
void check_emulator_75(const std::string& name, bool broken);
}

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const bool broken = std::atoi(arguments[3]);
  std::strcmp(arguments[1], "75") ? ff::cuda::check_emulator_80(arguments[2], broken)
                                  : ff::cuda::check_emulator_75(arguments[2], broken);
  return 0;
}
#endif
