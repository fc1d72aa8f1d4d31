// Sixteen floats in one register: AVX-512, with VNNI and BF16 where the compiler was told so.
#pragma once

#include <immintrin.h>

namespace loki {
namespace LOKI_ISA {

using F32 = __m512;
using I32 = __m512i;
using Mask = __mmask16;

#if defined(__AVX512BF16__)
constexpr bool kPairDot = true;
#else
constexpr bool kPairDot = false;
#endif
// Accumulators of four heads that stay in registers, beside the row that feeds them.
constexpr int kValueVectors = 4;
constexpr int kTilesAtOnce = 2;
// Query rows, and vectors of keys, whose products stay in registers.
constexpr int kColumnRows = 6, kColumnVectors = 4;

static inline F32 set1(float x) { return _mm512_set1_ps(x); }
static inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
static inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
static inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
static inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
static inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
static inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
// Where one is NaN, the second.
static inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
static inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
static inline F32 round(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
static inline F32 abs(F32 x) { return _mm512_abs_ps(x); }
static inline Mask less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
static inline Mask at_least(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline F32 select(Mask m, F32 yes, F32 no) { return _mm512_mask_blend_ps(m, no, yes); }
static inline Mask first(int n) { return static_cast<Mask>((1u << n) - 1u); }
static inline unsigned bits(Mask m) { return m; }
static inline Mask from_bytes(const uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(b, b);
}
static inline Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
static inline F32 power_of_two(F32 n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
static inline float sum(F32 x) { return _mm512_reduce_add_ps(x); }

// Sums of four registers.
static inline void store_sums(float* out, F32 a, F32 b, F32 c, F32 d) {
  const __m512 t = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 u = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(t, u, 0x44), _mm512_shuffle_ps(t, u, 0xEE));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

// Word j of register i becomes word i of register j.
static inline void transpose(F32* x) {
  __m512 t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  const auto low = [](F32 a, F32 b) { return _mm512_shuffle_ps(a, b, 0x44); };
  const auto high = [](F32 a, F32 b) { return _mm512_shuffle_ps(a, b, 0xEE); };
  for (int i = 0; i < 16; i += 4) {
    u[i] = low(t[i], t[i + 2]);
    u[i + 1] = high(t[i], t[i + 2]);
    u[i + 2] = low(t[i + 1], t[i + 3]);
    u[i + 3] = high(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // quarters of registers
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xDD), d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xDD);
    x[i] = _mm512_shuffle_f32x4(a, b, 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(a, b, 0xDD);
    x[i + 12] = _mm512_shuffle_f32x4(c, d, 0xDD);
  }
}

static inline F32 widen_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

template <int kType>
static inline F32 load_row(const void* row, int64_t i) {
  if constexpr (kType == LOKI_F32) return _mm512_loadu_ps(static_cast<const float*>(row) + i);
  const __m256i half = _mm256_loadu_si256(
      reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(row) + i));
  return kType == LOKI_BF16 ? widen_bf16(half) : _mm512_cvtph_ps(half);
}

// The first n of sixteen; the others are 0 and are not touched in memory.
template <int kType>
static inline F32 load_row_part(const void* row, int64_t i, int n) {
  if constexpr (kType == LOKI_F32)
    return _mm512_maskz_loadu_ps(first(n), static_cast<const float*>(row) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(first(n), static_cast<const uint16_t*>(row) + i);
  return kType == LOKI_BF16 ? widen_bf16(half) : _mm512_cvtph_ps(half);
}

static inline F32 load_scales(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Products of bfloat16 pairs.
#if defined(__AVX512BF16__)
using Pairs = __m512i;
static inline Pairs load_pairs(const void* p) { return _mm512_loadu_si512(p); }
static inline Pairs load_pairs_part(const void* p, int n) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(n >= 32 ? ~0u : (1u << n) - 1u), p);
}
static inline F32 dot_pairs(F32 acc, Pairs a, Pairs b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// Registers of words, whatever the words hold.
static inline F32 words_of(Pairs x) { return _mm512_castsi512_ps(x); }
static inline Pairs pairs_of(F32 x) { return _mm512_castps_si512(x); }
constexpr int kPairWords = 1;
struct PairLine {
  __m512i x;
};
static inline PairLine pair_line(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline F32 dot_line(F32 acc, PairLine line, const int32_t* words) {
  return dot_pairs(acc, line.x, _mm512_set1_epi32(words[0]));
}
#else
constexpr int kPairWords = 2;
struct PairLine {
  F32 even, odd;
};
static inline PairLine pair_line(const uint8_t* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-65536)))};
}
static inline F32 dot_line(F32 acc, PairLine line, const int32_t* words) {
  const float* f = reinterpret_cast<const float*>(words);
  return fma(line.odd, set1(f[1]), fma(line.even, set1(f[0]), acc));
}
#endif

// Products of byte quads; codes are biased where the instruction wants them unsigned.
static inline I32 start_at(int32_t x) { return _mm512_set1_epi32(x); }
static inline F32 to_float(I32 x) { return _mm512_cvtepi32_ps(x); }
#if defined(__AVX512VNNI__)
constexpr int kQuadWords = 1;
constexpr int kByteBias = 128;
struct Quads {
  __m512i x;
};
static inline Quads quads(const uint8_t* p) {
  return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
}
static inline void nibble_quads(const uint8_t* p, Quads* low, Quads* high) {
  const __m512i x = _mm512_loadu_si512(p), m = _mm512_set1_epi8(15);
  low->x = _mm512_and_si512(x, m);
  high->x = _mm512_and_si512(_mm512_srli_epi16(x, 4), m);
}
static inline I32 dot_quads(I32 acc, Quads q, const int32_t* words) {
  return _mm512_dpbusd_epi32(acc, q.x, _mm512_set1_epi32(words[0]));
}
#else
constexpr int kQuadWords = 2;
constexpr int kByteBias = 0;
struct Quads {
  __m512i even, odd;
};
static inline Quads split(__m512i x) {
  return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
}
static inline Quads quads(const uint8_t* p) { return split(_mm512_loadu_si512(p)); }
static inline void nibble_quads(const uint8_t* p, Quads* low, Quads* high) {
  const __m512i x = _mm512_loadu_si512(p), m = _mm512_set1_epi8(15);
  *low = split(_mm512_and_si512(x, m));
  *high = split(_mm512_and_si512(_mm512_srli_epi16(x, 4), m));
}
static inline I32 dot_quads(I32 acc, Quads q, const int32_t* words) {
  const __m512i e = _mm512_madd_epi16(q.even, _mm512_set1_epi32(words[0]));
  const __m512i o = _mm512_madd_epi16(q.odd, _mm512_set1_epi32(words[1]));
  return _mm512_add_epi32(acc, _mm512_add_epi32(e, o));
}
#endif

// Appends the marked values and their indices; may write up to 16 elements behind them.
static inline int64_t compress(Mask m, F32 values, int32_t row, float* out, int32_t* rows) {
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(m, values));
  const __m512i at = _mm512_add_epi32(iota, _mm512_set1_epi32(row));
  _mm512_storeu_si512(rows, _mm512_maskz_compress_epi32(m, at));
  return __builtin_popcount(m);
}

static inline int64_t compress_rows(Mask m, const int32_t* rows, int32_t* out) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, _mm512_loadu_si512(rows)));
  return __builtin_popcount(m);
}

// Codes of four words, eight at a time; how many rows were done. The instruction came later than those
// that this file is compiled for.
__attribute__((target("avx512vpopcntdq"))) static inline int64_t count_four_words(
    const char* codes, int64_t count, const uint32_t* query, float* out) {
  const __m512i q = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(query)));
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  int64_t t = 0;
  for (; t + 8 <= count; t += 8, codes += 128) {
    const __m512i a = _mm512_popcnt_epi64(_mm512_xor_si512(q, _mm512_loadu_si512(codes)));
    const __m512i b = _mm512_popcnt_epi64(_mm512_xor_si512(q, _mm512_loadu_si512(codes + 64)));
    const __m512i sums = _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    _mm256_storeu_ps(out + t, _mm512_cvtepi64_ps(_mm512_permutexvar_epi64(order, sums)));
  }
  return t;
}
static inline int64_t wide_differing_bits(const char* codes, int64_t count, int64_t words,
                                          const uint32_t* query, float* out) {
  static const bool counts = __builtin_cpu_supports("avx512vpopcntdq");
  return counts && words == 4 ? count_four_words(codes, count, query, out) : 0;
}

static inline uint64_t sum_words(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    a = _mm512_add_epi64(a, _mm512_loadu_si512(p + i));
    b = _mm512_add_epi64(b, _mm512_loadu_si512(p + i + 64));
    c = _mm512_add_epi64(c, _mm512_loadu_si512(p + i + 128));
    d = _mm512_add_epi64(d, _mm512_loadu_si512(p + i + 192));
  }
  uint64_t words[8], sum = 0;  // wraps around, which signed numbers may not
  _mm512_storeu_si512(words, _mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d)));
  for (const uint64_t word : words) sum += word;
  return sum;
}

}  // namespace LOKI_ISA
}  // namespace loki
