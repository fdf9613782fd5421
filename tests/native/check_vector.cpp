// The vector type of an instruction set, operation by operation against scalar code, and the
// exponentials that are built on it against double. For machines that have the set: it is not
// asked.

#include "checks.h"
#include "cpu/softmax/online_softmax.h"

namespace {

Random random_numbers;

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Numbers of all sizes, and those where something ends.
Lanes any_lanes() {
  const float special[] = {0.0f,    -0.0f, 1e-45f,   -1e-39f,   1.0f,     -2.5f,
                           3.4e38f, kNan,  kEndless, -kEndless, -3.4e38f, 1.17549435e-38f};
  Lanes lanes;
  for (float& x : lanes.x) {
    const uint32_t draw = random_numbers.bits();
    x = draw % 4 == 0 ? special[draw / 4 % 12] : from_bits(random_numbers.bits());
  }
  return lanes;
}

Lanes normal_lanes() {
  Lanes lanes;
  for (float& x : lanes.x) x = random_numbers.normal();
  return lanes;
}

void check_memory() {
  std::vector<float> from(3 * kLanes, kNan), to(3 * kLanes);
  for (int64_t count = 0; count <= kLanes; ++count) {
    for (int64_t i = 0; i < kLanes; ++i) from[size_t(kLanes + i)] = i < count ? 1.0f + i : kNan;
    const Lanes some = Vec::load(&from[kLanes], count), all = Vec::load(&from[kLanes]);
    to.assign(to.size(), -7.0f);
    Vec(all).store(&to[kLanes], count);
    for (int64_t i = 0; i < kLanes; ++i) {
      const float expected = i < count ? 1.0f + i : 0.0f;
      expect(some[i] == expected, "load of %d, lane %d: %g", int(count), int(i), some[i]);
    }
    for (int64_t i = 0; i < 3 * kLanes; ++i) {
      const bool inside = i >= kLanes && i < kLanes + count;
      const float expected = inside ? from[size_t(i)] : -7.0f;
      expect(to[size_t(i)] == expected, "store of %d, at %d", int(count), int(i - kLanes));
    }
  }
}

// The value of a 16-bit pattern with so many bits of mantissa; the exponent's bias as well.
double value_16(uint32_t bits, int mantissa, int bias) {
  const uint32_t exponents = (1u << (15 - mantissa)) - 1;
  const int exponent = int(bits >> mantissa & exponents);
  const uint32_t rest = bits & ((1u << mantissa) - 1);
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  if (uint32_t(exponent) == exponents) return rest ? double(kNan) : sign * double(kEndless);
  const double size = exponent
                          ? std::ldexp(double(rest + (1u << mantissa)), exponent - bias - mantissa)
                          : std::ldexp(double(rest), 1 - bias - mantissa);
  return sign * size;
}

// The pattern nearest to a number, ties to even: magnitudes are in the order of their patterns, and
// infinity stands where the next number would.
uint32_t nearest_16(float x, int mantissa, int bias) {
  const uint32_t sign = std::signbit(x) ? 0x8000u : 0u;
  const uint32_t endless = ((1u << (15 - mantissa)) - 1) << mantissa;
  const double size = std::fabs(double(x)), end = std::ldexp(1.0, int(endless >> mantissa) - bias);
  const auto value = [&](uint32_t bits) {
    return bits == endless ? end : value_16(bits, mantissa, bias);
  };
  if (size >= end) return sign | endless;
  uint32_t low = 0, high = endless;  // value(low) <= size < value(high)
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (value(middle) <= size ? low : high) = middle;
  }
  const double down = size - value(low), up = value(high) - size;
  return sign | (down < up || (down == up && low % 2 == 0) ? low : high);
}

// 16-bit numbers: `load`, `store` and their scalar twins.
template <class Load, class Store, class LoadOne, class StoreOne>
void check_16(const char* name, int mantissa, int bias, const Load& load, const Store& store,
              const LoadOne& load_one, const StoreOne& store_one) {
  for (uint32_t bits = 0; bits < 0x10000; bits += kLanes) {
    uint16_t from[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) from[i] = uint16_t(bits + i);
    const int64_t count = 1 + bits / kLanes % kLanes;
    const Lanes all = load(from, kLanes), some = load(from, count);
    for (int64_t i = 0; i < kLanes; ++i) {
      const float exact = float(value_16(from[i], mantissa, bias));
      expect(same(all[i], exact) && same(load_one(from[i]), exact), "%s %04x", name, from[i]);
      expect(same(some[i], i < count ? exact : 0.0f), "%s %04x of %d", name, from[i], int(count));
    }
  }
  for (int round = 0; round < 4000; ++round) {
    Lanes lanes = any_lanes();
    for (float& x : lanes.x) {
      const uint32_t draw = random_numbers.bits(), near = draw >> 8 & 0x7fff;
      const double value = value_16(near, mantissa, bias);
      // Close to a number and to the middle between two.
      if (draw % 4 == 1) x = from_bits(random_numbers.bits() % 0x100000 * 0x1000u);
      if (draw % 4 == 2) x = float(0.5 * (value + value_16(near + 1, mantissa, bias)));
    }
    const int64_t count = 1 + round % kLanes;
    uint16_t to[kLanes + 1];
    for (uint16_t& x : to) x = 0x7b7b;
    store(lanes, to, count);
    for (int64_t i = 0; i < kLanes + 1; ++i) {
      if (i >= count) {
        expect(to[i] == 0x7b7b, "%s: store of %d wrote lane %d", name, int(count), int(i));
      } else if (std::isnan(lanes[i])) {
        const bool right = std::isnan(value_16(to[i], mantissa, bias)) &&
                           std::isnan(value_16(store_one(lanes[i]), mantissa, bias));
        expect(right, "%s of NaN: %04x", name, to[i]);
      } else {
        const uint32_t exact = nearest_16(lanes[i], mantissa, bias);
#ifdef FF_BFLOAT16
        // The instruction of AVX-512 takes subnormal numbers for zero.
        if (mantissa == 7 && to[i] == (exact & 0x8000u) && std::fabs(lanes[i]) < 1.17549435e-38f)
          continue;
#endif
        expect(to[i] == exact && store_one(lanes[i]) == exact, "%s of %.9g: %04x, not %04x", name,
               lanes[i], to[i], exact);
      }
    }
  }
}

void check_bools() {
  const uint8_t bytes[] = {0, 1, 0, 2, 0, 128, 255};
  for (int64_t count = 1; count <= 32; ++count) {
    std::vector<Bool> truth(static_cast<size_t>(count));
    uint32_t expected = 0;
    for (int64_t i = 0; i < count; ++i) {
      truth[size_t(i)] = {bytes[random_numbers.bits() % 7]};
      expected |= uint32_t(truth[size_t(i)].byte != 0) << i;
    }
    expect(Vec::truths(truth.data(), count) == expected, "truths of %d", int(count));
    if (count > kLanes) continue;
    const Lanes mask = Vec::load_bool(truth.data(), count);
    for (int64_t i = 0; i < kLanes; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &mask.x[i], sizeof bits);
      const bool right = bits == (i < count && truth[size_t(i)] ? 0xffffffffu : 0u);
      expect(right, "load_bool of %d, lane %d: %x", int(count), int(i), bits);
    }
  }
  uint32_t truths[kLanes];
  for (uint32_t& bits : truths) bits = random_numbers.bits();
  for (int64_t count = 1; count <= 32; ++count) {
    std::vector<uint16_t> to(size_t(3 * count), uint16_t{0x7b7b});
    Vec::store_lanes(truths, count, 3, to.data());
    for (int64_t i = 0; i < count; ++i) {
      uint32_t expected = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) expected |= (truths[lane] >> i & 1) << lane;
      expect(Vec::lanes(truths, i) == expected, "lanes at %d", int(i));
      const bool beside = to[size_t(3 * i + 1)] == 0x7b7b && to[size_t(3 * i + 2)] == 0x7b7b;
      expect(to[size_t(3 * i)] == expected && beside, "store_lanes at %d", int(i));
    }
  }
}

void check_arithmetic() {
  for (int round = 0; round < 2000; ++round) {
    const bool any = round % 2;
    const Lanes a = any ? any_lanes() : normal_lanes(), b = any ? any_lanes() : normal_lanes();
    const Lanes c = any ? any_lanes() : normal_lanes();
    const Lanes sum = Vec(a) + b, difference = Vec(a) - b, product = Vec(a) * b;
    const Lanes quotient = Vec(a) / b, added = Vec::fma(a, b, c), taken = Vec::fms(a, b, c);
    const Lanes largest = Vec::max(a, b), large = Vec::larger(a, b);
    const uint16_t lanes = uint16_t(random_numbers.bits() & ((1u << kLanes) - 1));
    const Lanes by_lanes = Vec::select(lanes, a, b);
    const Lanes by_bits = Vec::select(large, a, b);
    for (int64_t i = 0; i < kLanes; ++i) {
      const float x = a[i], y = b[i], z = c[i];
      expect(same(sum[i], x + y), "%.9g + %.9g", x, y);
      expect(same(difference[i], x - y), "%.9g - %.9g", x, y);
      expect(same(product[i], x * y), "%.9g * %.9g", x, y);
      expect(same(quotient[i], x / y), "%.9g / %.9g", x, y);
      expect(is_fma(added[i], x, y, z), "fma(%.9g, %.9g, %.9g)", x, y, z);
      expect(is_fma(taken[i], x, y, -z), "fms(%.9g, %.9g, %.9g)", x, y, z);
      expect(same(largest[i], x > y ? x : y), "max(%.9g, %.9g)", x, y);
      uint32_t bits;
      std::memcpy(&bits, &large.x[i], sizeof bits);
      const bool larger = std::fabs(x) > y;
      expect(bits == (larger ? 0xffffffffu : 0u), "larger(%.9g, %.9g)", x, y);
      expect(same(by_bits[i], larger ? x : y), "select by bits, lane %d", int(i));
      expect(same(by_lanes[i], lanes >> i & 1 ? x : y), "select by lanes, lane %d", int(i));
    }
  }
}

// Whole registers at a time. A sum may not depend on where its row stands.
void check_across_lanes() {
  for (int round = 0; round < 200; ++round) {
    Lanes rows[kLanes];
    Vec turned[kLanes], turned_rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) turned[i] = rows[i] = normal_lanes();
    for (int64_t i = 0; i < kLanes; ++i) turned_rows[i] = rows[(i + round) % kLanes];
    const Lanes totals = Vec::totals(turned), maxima = Vec::maxima(turned);
    const Lanes elsewhere = Vec::totals(turned_rows);
    Vec::transpose(turned);
    for (int64_t i = 0; i < kLanes; ++i) {
      double sum = 0.0, size = 0.0;
      float largest = -kEndless;
      for (int64_t j = 0; j < kLanes; ++j) {
        sum += rows[i][j], size += std::fabs(rows[i][j]);
        largest = rows[i][j] > largest ? rows[i][j] : largest;
        expect(same(Lanes(turned[j])[i], rows[i][j]), "transpose, row %d, lane %d", int(i), int(j));
      }
      const double most = 4 * 6e-8 * size;
      expect(std::fabs(totals[i] - sum) <= most, "totals, row %d: %g", int(i), totals[i] - sum);
      expect(std::fabs(Vec(rows[i]).total() - sum) <= most, "total");
      expect(same(elsewhere[i], totals[(i + round) % kLanes]), "totals depend on the row's place");
      expect(maxima[i] == largest, "maxima, row %d", int(i));
    }
  }
}

void check_powers() {
  for (double x = -300.0; x < 127.0; x += 0.0371) {
    const Vec at = Vec::set(float(x));
    const Lanes bounded = Vec::for_scale(at), nearest = Vec::round(at),
                fraction = Vec::fraction(at);
    const Lanes scaled = Vec::scale(Vec::set(1.375f), Vec::for_scale(at));
    const float exponent = std::floor(float(x)), exact = std::ldexp(1.375f, int(exponent));
    expect(bounded[0] == float(x) || (x < -190.0 && bounded[0] < -190.0f), "for_scale(%g)", x);
    expect(nearest[0] == std::nearbyint(float(x)), "round(%g)", x);
    const double exact_fraction = double(float(x)) - double(exponent);
    if (x >= -127.0) expect(std::fabs(fraction[0] - exact_fraction) <= 6e-8, "fraction(%g)", x);
    expect(scaled[0] == exact || (exponent < -126.0f && scaled[0] == 0.0f), "scale(%g)", x);
  }
  const Lanes nothing = Vec::scale(Vec::set(1.0f), Vec::set(-kEndless));
  const Lanes fraction = Vec::fraction(Vec::set(-kEndless));
  expect(nothing[0] == 0.0f, "scale(-inf): %g", nothing[0]);
  expect(fraction[0] >= 0.0f && fraction[0] <= 1.0f, "fraction(-inf): %g", fraction[0]);
}

// By other bases than 2 the exponent is multiplied by a rounded logarithm.
template <class Function>
void check_exponential(const char* name, double base, double most, const Function& function) {
  double worst = 0.0;
  for (double x = -80.0; x < 0.3; x += 0.00137) {
    const double exact = std::pow(base, double(float(x)));
    const double error = std::fabs(Lanes(function(Vec::set(float(x))))[0] / exact - 1.0);
    worst = std::fmax(worst, error - (base == 2.0 ? 0.0 : 1.4e-8 * std::fabs(x)));
  }
  expect(worst <= most, "%s: relative error %.2g, at most %.2g", name, worst, most);
  for (const float x : {-kEndless, -3.4e38f, -1e5f, -200.0f})
    expect(Lanes(function(Vec::set(x)))[0] == 0.0f, "%s(%g) is not 0", name, x);
  expect(std::isnan(Lanes(function(Vec::set(kNan)))[0]), "%s(NaN) is a number", name);
  expect(std::fabs(Lanes(function(Vec::zero()))[0] - 1.0) <= (most < 1e-5 ? 0.0 : most),
         "%s(0) is not 1", name);
}

void check_exponentials() {
  using ff::Precision;
  const double e = std::exp(1.0);
  // float32 rounds at 6e-8, the steps of the polynomial before as well.
  check_exponential("exp2", 2.0, 1.2e-7, [](Vec x) { return ff::exp2<Precision::kFloat32>(x); });
  check_exponential("exp", e, 1.3e-7, [](Vec x) { return ff::exp<Precision::kFloat32>(x); });
  check_exponential("exp2 for bfloat16", 2.0, 1e-4,
                    [](Vec x) { return ff::exp2<Precision::kBFloat16>(x); });
  check_exponential("exp for bfloat16", e, 1e-4,
                    [](Vec x) { return ff::exp<Precision::kBFloat16>(x); });
  const Lanes none = ff::finite(Vec::set(-kEndless)), some = ff::finite(Vec::set(-3e38f));
  expect(none[0] == 0.0f && some[0] == -3e38f, "finite");
  expect(ff::inverse(0.0f) == 0.0f && ff::inverse(4.0f) == 0.25f, "inverse");
}

// Any scale is a factor and a unit that neither overflow nor vanish.
void check_scaling() {
  const float scales[] = {0.0f,  1e-45f, -1e-40f, 1e-20f, 0.125f,
                          -0.7f, 1.0f,   100.0f,  -1e9f,  3.4e38f};
  for (const float scale : scales) {
    const ff::Scaling s = ff::scaling_of<ff::Float32Math>(scale, ff::Base::kE);
    expect(double(s.factor) * double(s.unit) == double(scale), "scaling of %g", scale);
    expect(std::fabs(s.factor) <= 1.0f, "scaling of %g: factor %g", scale, s.factor);
    expect(s.unit >= 1.17549435e-38f && s.unit < kEndless, "scaling of %g: unit", scale);
  }
}

// Products of 8-bit integers: exact, to the ends of their ranges; and numbers stored as bytes.
void check_int8() {
  using ff::Int8Math;
  for (int round = 0; round < 50; ++round) {
    int8_t left[4], right[4 * kLanes];
    for (int8_t& x : left) x = int8_t(int(random_numbers.bits() % 255) - 127);
    for (int8_t& w : right) w = int8_t(random_numbers.bits());
    if (round == 0) std::memset(left, -127, sizeof left), std::memset(right, 255, sizeof right);
    Vec sum = Vec::zero();
    const auto x = Int8Math::broadcast(left);
    for (int i = 0; i < 3; ++i) sum = Int8Math::add_product(x, Int8Math::load(right), sum);
    const Lanes found = Int8Math::to_float(sum, 5);
    for (int64_t i = 0; i < kLanes; ++i) {
      int exact = -5;
      for (int64_t k = 0; k < 4; ++k) exact += 3 * left[k] * int(uint8_t(right[4 * i + k]));
      expect(found[i] == float(exact), "product of integers: %g, not %d", found[i], exact);
    }
  }
  Lanes numbers;
  for (int64_t i = 0; i < kLanes; ++i) numbers[i] = float(i % 2 ? -127 + i : 127 - i);
  for (int64_t count = 1; count <= kLanes; ++count) {
    int8_t bytes[kLanes + 1];
    std::memset(bytes, 99, sizeof bytes);
    Int8Math::store(bytes, numbers, count);
    for (int64_t i = 0; i <= kLanes; ++i)
      expect(bytes[i] == (i < count ? int8_t(numbers[i]) : 99), "byte %d of %d", int(i),
             int(count));
  }
}

}  // namespace

int main() {
  check_memory();
  check_16(
      "bfloat16", 7, 127, Vec::load_bfloat16,
      [](Vec v, uint16_t* to, int64_t count) { v.store_bfloat16(to, count); },
      ff::bfloat16_to_float, ff::float_to_bfloat16);
  check_16(
      "float16", 10, 15, Vec::load_half,
      [](Vec v, uint16_t* to, int64_t count) { v.store_half(to, count); }, ff::half_to_float,
      ff::float_to_half);
  check_bools();
  check_arithmetic();
  check_across_lanes();
  check_powers();
  check_exponentials();
  check_scaling();
  check_int8();
  return finish("vector");
}
