// Sixteen floats in four registers: NEON, with its byte dot product where the compiler was told so.
#pragma once

#include <arm_neon.h>

namespace loki {
namespace LOKI_ISA {

struct F32 {
  float32x4_t v[4];
};
struct I32 {
  int32x4_t v[4];
};
struct Mask {
  uint32x4_t v[4];
};

constexpr bool kPairDot = false;
constexpr int kTilesAtOnce = 1;
constexpr int kValueVectors = 1;
// Query rows, and vectors of keys, whose products stay in registers.
constexpr int kColumnRows = 6, kColumnVectors = 1;

#define LOKI_FOUR(TYPE, EXPRESSION)                    \
  TYPE out;                                            \
  for (int i = 0; i < 4; ++i) out.v[i] = (EXPRESSION); \
  return out;

static inline F32 set1(float x) { LOKI_FOUR(F32, vdupq_n_f32(x)) }
static inline F32 load(const float* p) { LOKI_FOUR(F32, vld1q_f32(p + 4 * i)) }
static inline void store(float* p, F32 x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
static inline F32 add(F32 x, F32 y) { LOKI_FOUR(F32, vaddq_f32(x.v[i], y.v[i])) }
static inline F32 sub(F32 x, F32 y) { LOKI_FOUR(F32, vsubq_f32(x.v[i], y.v[i])) }
static inline F32 mul(F32 x, F32 y) { LOKI_FOUR(F32, vmulq_f32(x.v[i], y.v[i])) }
static inline F32 div(F32 x, F32 y) { LOKI_FOUR(F32, vdivq_f32(x.v[i], y.v[i])) }
static inline F32 fma(F32 x, F32 y, F32 z) { LOKI_FOUR(F32, vfmaq_f32(z.v[i], x.v[i], y.v[i])) }
// Where one is NaN, the second; the processor's own maximum would be NaN.
static inline F32 max(F32 x, F32 y) { LOKI_FOUR(F32, vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])) }
static inline F32 min(F32 x, F32 y) { LOKI_FOUR(F32, vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])) }
static inline F32 round(F32 x) { LOKI_FOUR(F32, vrndnq_f32(x.v[i])) }
static inline F32 abs(F32 x) { LOKI_FOUR(F32, vabsq_f32(x.v[i])) }
static inline Mask less(F32 x, F32 y) { LOKI_FOUR(Mask, vcltq_f32(x.v[i], y.v[i])) }
static inline Mask at_least(F32 x, F32 y) { LOKI_FOUR(Mask, vcgeq_f32(x.v[i], y.v[i])) }
static inline F32 select(Mask m, F32 yes, F32 no) { LOKI_FOUR(F32, vbslq_f32(m.v[i], yes.v[i], no.v[i])) }
static inline Mask first(int n) {
  const int32_t lanes[4] = {0, 1, 2, 3};
  LOKI_FOUR(Mask, vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(n - 4 * i)))
}
static inline unsigned bits(Mask m) {
  const uint32_t lanes[4] = {1, 2, 4, 8};
  const uint32x4_t place = vld1q_u32(lanes);
  const uint32x4_t low = vorrq_u32(vandq_u32(m.v[0], place), vandq_u32(m.v[1], vshlq_n_u32(place, 4)));
  const uint32x4_t high =
      vorrq_u32(vandq_u32(m.v[2], vshlq_n_u32(place, 8)), vandq_u32(m.v[3], vshlq_n_u32(place, 12)));
  return vaddvq_u32(vorrq_u32(low, high));
}
static inline Mask from_bytes(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  const int8x16_t marks = vreinterpretq_s8_u8(vtstq_u8(x, x));
  const int16x8_t low = vmovl_s8(vget_low_s8(marks)), high = vmovl_s8(vget_high_s8(marks));
  return {{vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(low))),
           vreinterpretq_u32_s32(vmovl_s16(vget_high_s16(low))),
           vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(high))),
           vreinterpretq_u32_s32(vmovl_s16(vget_high_s16(high)))}};
}
static inline Mask both(Mask x, Mask y) { LOKI_FOUR(Mask, vandq_u32(x.v[i], y.v[i])) }

// For whole numbers in -126..127; others, and NaN, give some number.
static inline F32 power_of_two(F32 n) {
  LOKI_FOUR(F32, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23)))
}

static inline float32x4_t quarters(F32 x) {
  return vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]));
}
static inline void store_sums(float* out, F32 a, F32 b, F32 c, F32 d) {
  const float32x4_t ab = vpaddq_f32(quarters(a), quarters(b)), cd = vpaddq_f32(quarters(c), quarters(d));
  vst1q_f32(out, vpaddq_f32(ab, cd));
}
static inline float sum(F32 x) { return vaddvq_f32(quarters(x)); }

static inline float32x4_t low_pairs(float32x4_t a, float32x4_t b) {
  return vcombine_f32(vget_low_f32(a), vget_low_f32(b));
}
static inline float32x4_t high_pairs(float32x4_t a, float32x4_t b) {
  return vcombine_f32(vget_high_f32(a), vget_high_f32(b));
}
// Word j of register i becomes word i of register j.
static inline void transpose(F32* x) {
  F32 out[16];
  for (int r = 0; r < 4; ++r) {
    for (int c = 0; c < 4; ++c) {
      const float32x4_t a = x[4 * r].v[c], b = x[4 * r + 1].v[c], d = x[4 * r + 2].v[c], e = x[4 * r + 3].v[c];
      const float32x4_t ab0 = vtrn1q_f32(a, b), ab1 = vtrn2q_f32(a, b);
      const float32x4_t de0 = vtrn1q_f32(d, e), de1 = vtrn2q_f32(d, e);
      out[4 * c].v[r] = low_pairs(ab0, de0);
      out[4 * c + 1].v[r] = low_pairs(ab1, de1);
      out[4 * c + 2].v[r] = high_pairs(ab0, de0);
      out[4 * c + 3].v[r] = high_pairs(ab1, de1);
    }
  }
  for (int i = 0; i < 16; ++i) x[i] = out[i];
}

static inline float32x4_t widen_bf16(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
static inline float32x4_t widen_f16(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }

template <int kType>
static inline F32 load_row(const void* row, int64_t i) {
  if constexpr (kType == LOKI_F32) return load(static_cast<const float*>(row) + i);
  const uint16_t* p = static_cast<const uint16_t*>(row) + i;
  const uint16x8_t x = vld1q_u16(p), y = vld1q_u16(p + 8);
  if constexpr (kType == LOKI_BF16)
    return {{widen_bf16(vget_low_u16(x)), widen_bf16(vget_high_u16(x)), widen_bf16(vget_low_u16(y)),
             widen_bf16(vget_high_u16(y))}};
  return {{widen_f16(vget_low_u16(x)), widen_f16(vget_high_u16(x)), widen_f16(vget_low_u16(y)),
           widen_f16(vget_high_u16(y))}};
}

// The first n of sixteen; the others are 0 and are not touched in memory.
template <int kType>
static inline F32 load_row_part(const void* row, int64_t i, int n) {
  alignas(16) char part[64] = {0};
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
  PairLine line;
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t x = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
    line.even.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
    line.odd.v[i] = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u)));
  }
  return line;
}
static inline F32 dot_line(F32 acc, PairLine line, const int32_t* words) {
  float q[2];
  memcpy(q, words, sizeof q);
  return fma(line.odd, set1(q[1]), fma(line.even, set1(q[0]), acc));
}

static inline I32 start_at(int32_t x) { LOKI_FOUR(I32, vdupq_n_s32(x)) }
static inline F32 to_float(I32 x) { LOKI_FOUR(F32, vcvtq_f32_s32(x.v[i])) }

constexpr int kQuadWords = 1;
constexpr int kByteBias = 0;
struct Quads {
  int8x16_t v[4];
};
static inline Quads quads(const uint8_t* p) { LOKI_FOUR(Quads, vreinterpretq_s8_u8(vld1q_u8(p + 16 * i))) }
static inline void nibble_quads(const uint8_t* p, Quads* low, Quads* high) {
  for (int i = 0; i < 4; ++i) {
    const uint8x16_t x = vld1q_u8(p + 16 * i);
    low->v[i] = vreinterpretq_s8_u8(vandq_u8(x, vdupq_n_u8(15)));
    high->v[i] = vreinterpretq_s8_u8(vshrq_n_u8(x, 4));
  }
}
#if defined(__ARM_FEATURE_DOTPROD)
static inline int32x4_t dot_bytes(int32x4_t acc, int8x16_t x, int8x16_t q) { return vdotq_s32(acc, x, q); }
#else
static inline int32x4_t dot_bytes(int32x4_t acc, int8x16_t x, int8x16_t q) {
  const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(q)), high = vmull_high_s8(x, q);
  // Two products fit into 16 bits, because no code of a query is below -127.
  return vpadalq_s16(acc, vpaddq_s16(low, high));
}
#endif
static inline I32 dot_quads(I32 acc, Quads x, const int32_t* words) {
  const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(words[0]));
  LOKI_FOUR(I32, dot_bytes(acc.v[i], x.v[i], q))
}

static inline uint64_t sum_words(const void* data, int64_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  uint64x2_t s[4] = {vdupq_n_u64(0), vdupq_n_u64(0), vdupq_n_u64(0), vdupq_n_u64(0)};
  for (int64_t i = 0; i + 64 <= bytes; i += 64)
    for (int j = 0; j < 4; ++j) s[j] = vaddq_u64(s[j], vreinterpretq_u64_u8(vld1q_u8(p + i + 16 * j)));
  return vaddvq_u64(vaddq_u64(vaddq_u64(s[0], s[1]), vaddq_u64(s[2], s[3])));
}

#undef LOKI_FOUR

}  // namespace LOKI_ISA
}  // namespace loki
