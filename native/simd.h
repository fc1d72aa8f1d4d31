// The one SIMD wrapper: sixteen floats, whatever the processor calls them, and what follows from it.
//
// Everything lives in a namespace of the instruction set: the same source is compiled once for each,
// and no function of one may ever be taken for that of another.
#pragma once

#include <stdint.h>
#include <string.h>

#include "internal.h"
#include "numbers.h"

#if defined(LOKI_SIMD_AVX512)
#include "simd_avx512.h"
#elif defined(LOKI_SIMD_AVX2)
#include "simd_avx2.h"
#elif defined(LOKI_SIMD_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

namespace loki {
namespace LOKI_ISA {

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 3.402823466e38f;

static inline F32 zero() { return set1(0.0f); }

static inline Mask some(int64_t n) { return first(n >= 16 ? 16 : n < 0 ? 0 : static_cast<int>(n)); }

constexpr float kLog2E = 1.44269504088896341f;

// 2 ** r for r in -1/2..1/2, times 2 ** n for whole n.
static inline F32 binary_power_of(F32 n, F32 r) {
  F32 p = set1(1.5353361951e-4f);
  p = fma(p, r, set1(1.3398875017e-3f));
  p = fma(p, r, set1(9.6184369177e-3f));
  p = fma(p, r, set1(5.5503323674e-2f));
  p = fma(p, r, set1(2.4022647738e-1f));
  p = fma(p, r, set1(6.9314718246e-1f));
  p = fma(p, r, set1(1.0f));
#if defined(LOKI_SIMD_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  return mul(p, power_of_two(n));
#endif
}

// 2 ** x for x up to 127, within one unit of the last place; below 2 ** -126 it is 0. NaN stays.
static inline F32 binary_power(F32 x) {
  const F32 n = round(x);
  return select(less(x, set1(-126.0f)), zero(), binary_power_of(n, sub(x, n)));
}

// e ** x for x up to 88, alike.
static inline F32 exponential(F32 x) {
  const F32 n = round(mul(x, set1(kLog2E)));
  F32 r = fma(x, set1(kLog2E), sub(zero(), n));
  r = fma(x, set1(1.92596299e-8f), r);  // what the constant lacks
  return select(less(x, set1(-87.33f)), zero(), binary_power_of(n, r));
}

static inline F32 hyperbolic_tangent(F32 x) {
  const F32 a = abs(x), square = mul(x, x);
  F32 p = set1(-5.70498872745e-3f);
  p = fma(p, square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  const F32 small = fma(mul(p, square), x, x);
  const F32 e = exponential(add(min(set1(15.0f), a), min(set1(15.0f), a)));
  const F32 large = sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
  const F32 signed_large = select(less(x, zero()), sub(zero(), large), large);
  return select(less(a, set1(0.625f)), small, signed_large);
}

#if !defined(LOKI_SIMD_AVX512)
// Without an instruction for it. Appends the marked values and their indices.
static inline int64_t compress(Mask m, F32 values, int32_t row, float* out, int32_t* rows) {
  float lanes[16];
  store(lanes, values);
  int64_t n = 0;
  for (unsigned left = bits(m); left; left &= left - 1u, ++n) {
    const int i = __builtin_ctz(left);
    out[n] = lanes[i];
    rows[n] = row + i;
  }
  return n;
}

static inline int64_t compress_rows(Mask m, const int32_t* rows, int32_t* out) {
  int64_t n = 0;
  for (unsigned left = bits(m); left; left &= left - 1u) out[n++] = rows[__builtin_ctz(left)];
  return n;
}

// Codes are counted row by row.
static inline int64_t wide_differing_bits(const char*, int64_t, int64_t, const uint32_t*, float*) { return 0; }
#endif

static inline float largest_of(F32 x) {
  float lanes[16];
  store(lanes, x);
  float best = lanes[0];
  for (int i = 1; i < 16; ++i) best = lanes[i] > best || lanes[i] != lanes[i] ? lanes[i] : best;
  return best;
}

static inline float sum_of(F32 x) { return sum(x); }

}  // namespace LOKI_ISA
}  // namespace loki
