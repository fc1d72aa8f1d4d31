// Sixteen floats in two registers: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace loki {
namespace LOKI_ISA {

struct F32 {
  __m256 a, b;
};
struct I32 {
  __m256i a, b;
};
struct Mask {
  __m256 a, b;
};

constexpr bool kPairDot = false;
constexpr int kTilesAtOnce = 1;
constexpr int kValueVectors = 1;
// Query rows, and vectors of keys, whose products stay in registers.
constexpr int kColumnRows = 6, kColumnVectors = 1;

static inline F32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
static inline F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F32 div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline F32 fma(F32 x, F32 y, F32 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
// Where one is NaN, the second.
static inline F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline F32 round(F32 x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
static inline F32 abs(F32 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static inline Mask less(F32 x, F32 y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
static inline Mask at_least(F32 x, F32 y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)};
}
static inline F32 select(Mask m, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
static inline Mask first(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane))};
}
static inline unsigned bits(Mask m) {
  return static_cast<unsigned>(_mm256_movemask_ps(m.a)) |
         static_cast<unsigned>(_mm256_movemask_ps(m.b)) << 8;
}
static inline Mask from_bytes(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i none = _mm256_setzero_si256(), all = _mm256_set1_epi32(-1);
  const __m256i low = _mm256_cvtepu8_epi32(x), high = _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8));
  return {_mm256_castsi256_ps(_mm256_xor_si256(_mm256_cmpeq_epi32(low, none), all)),
          _mm256_castsi256_ps(_mm256_xor_si256(_mm256_cmpeq_epi32(high, none), all))};
}
static inline Mask both(Mask x, Mask y) { return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }

static inline __m256 power_of_two_half(__m256 n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
// For whole numbers in -126..127; others, and NaN, give some number.
static inline F32 power_of_two(F32 n) { return {power_of_two_half(n.a), power_of_two_half(n.b)}; }

static inline void transpose_half(const __m256* x, __m256* out) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
// Word j of register i becomes word i of register j.
static inline void transpose(F32* x) {
  for (int half = 0; half < 16; half += 8) {  // words 0..7 of all registers, then 8..15
    __m256 in[16], out[16];
    for (int i = 0; i < 16; ++i) in[i] = half ? x[i].b : x[i].a;
    transpose_half(in, out);
    transpose_half(in + 8, out + 8);
    for (int i = 0; i < 16; ++i) (half ? x[i].b : x[i].a) = out[i];
  }
  for (int i = 0; i < 8; ++i) {
    const F32 low = {x[i].a, x[i + 8].a}, high = {x[i].b, x[i + 8].b};
    x[i] = low;
    x[i + 8] = high;
  }
}

static inline __m256 halves(F32 x) { return _mm256_add_ps(x.a, x.b); }
static inline void store_sums(float* out, F32 a, F32 b, F32 c, F32 d) {
  const __m256 ab = _mm256_hadd_ps(halves(a), halves(b)), cd = _mm256_hadd_ps(halves(c), halves(d));
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
static inline float sum(F32 x) {
  float out[4];
  store_sums(out, x, x, x, x);
  return out[0];
}

static inline __m256 widen_bf16(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

template <int kType>
static inline F32 load_row(const void* row, int64_t i) {
  if constexpr (kType == LOKI_F32) return load(static_cast<const float*>(row) + i);
  const __m128i* p = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(row) + i);
  const __m128i low = _mm_loadu_si128(p), high = _mm_loadu_si128(p + 1);
  if constexpr (kType == LOKI_BF16) return {widen_bf16(low), widen_bf16(high)};
  return {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
}

// The first n of sixteen; the others are 0 and are not touched in memory.
template <int kType>
static inline F32 load_row_part(const void* row, int64_t i, int n) {
  alignas(32) char part[64] = {0};
  constexpr int64_t kBytes = number_bytes(kType);
  memcpy(part, static_cast<const char*>(row) + i * kBytes, static_cast<size_t>(n * kBytes));
  return load_row<kType>(part, 0);
}

static inline F32 load_scales(const uint16_t* p) { return load_row<LOKI_F16>(p, 0); }

constexpr int kPairWords = 2;
struct PairLine {
  F32 even, odd;
};
static inline PairLine pair_line(const uint8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  const __m256i x = _mm256_loadu_si256(q), y = _mm256_loadu_si256(q + 1);
  const __m256i upper = _mm256_set1_epi32(-65536);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(x, upper)), _mm256_castsi256_ps(_mm256_and_si256(y, upper))}};
}
static inline F32 dot_line(F32 acc, PairLine line, const int32_t* words) {
  float q[2];
  memcpy(q, words, sizeof q);
  return fma(line.odd, set1(q[1]), fma(line.even, set1(q[0]), acc));
}

static inline I32 start_at(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

constexpr int kQuadWords = 2;
constexpr int kByteBias = 0;
// Bytes 0 and 2 of each lane, and bytes 1 and 3, as 16-bit numbers.
struct Quads {
  I32 even, odd;
};
static inline Quads split(__m256i x, __m256i y) {
  return {{_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8)},
          {_mm256_srai_epi16(x, 8), _mm256_srai_epi16(y, 8)}};
}
static inline Quads quads(const uint8_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return split(_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1));
}
static inline void nibble_quads(const uint8_t* p, Quads* low, Quads* high) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  const __m256i x = _mm256_loadu_si256(q), y = _mm256_loadu_si256(q + 1), m = _mm256_set1_epi8(15);
  *low = split(_mm256_and_si256(x, m), _mm256_and_si256(y, m));
  *high = split(_mm256_and_si256(_mm256_srli_epi16(x, 4), m), _mm256_and_si256(_mm256_srli_epi16(y, 4), m));
}
static inline __m256i dot_half(__m256i acc, __m256i even, __m256i odd, const int32_t* words) {
  const __m256i e = _mm256_madd_epi16(even, _mm256_set1_epi32(words[0]));
  const __m256i o = _mm256_madd_epi16(odd, _mm256_set1_epi32(words[1]));
  return _mm256_add_epi32(acc, _mm256_add_epi32(e, o));
}
static inline I32 dot_quads(I32 acc, const Quads& q, const int32_t* words) {
  return {dot_half(acc.a, q.even.a, q.odd.a, words), dot_half(acc.b, q.even.b, q.odd.b, words)};
}

static inline uint64_t sum_words(const void* data, int64_t bytes) {
  const __m256i* p = static_cast<const __m256i*>(data);
  __m256i s[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int64_t i = 0; i + 128 <= bytes; i += 128, p += 4)
    for (int j = 0; j < 4; ++j) s[j] = _mm256_add_epi64(s[j], _mm256_loadu_si256(p + j));
  uint64_t words[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words),
                      _mm256_add_epi64(_mm256_add_epi64(s[0], s[1]), _mm256_add_epi64(s[2], s[3])));
  return words[0] + words[1] + words[2] + words[3];
}

}  // namespace LOKI_ISA
}  // namespace loki
