// The most that products of 8-bit integers can do (VPDPBUSD): see peak.h for the other types.

#include "cpu/api.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ff {

#if defined(__x86_64__)

namespace {

__attribute__((target("avx512f,avx512vnni"))) double products(int64_t rounds) {
  constexpr int kChains = 24;
  alignas(64) char numbers[64] = {};
  asm volatile("" : : "r"(numbers) : "memory");  // or the compiler would see that all is zero
  const __m512i x = _mm512_load_si512(numbers);
  __m512i sum[kChains];
  for (auto& chain : sum) chain = _mm512_setzero_si512();
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], x, x);
  }
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_epi32(sum[0], sum[i]);
  alignas(64) int32_t total[16];
  _mm512_store_si512(total, sum[0]);
  return 2.0 * 64 * kChains * double(rounds) + double(total[0]);
}

}  // namespace

double int8_peak_operations(int64_t rounds) {
  return __builtin_cpu_supports("avx512vnni") ? products(rounds) : 0.0;
}

#else

double int8_peak_operations(int64_t) { return 0.0; }

#endif

}  // namespace ff
