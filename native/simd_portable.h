// Sixteen floats in an array: what any compiler understands, and vectorises as it can.
#pragma once

namespace loki {
namespace LOKI_ISA {

struct F32 {
  float v[16];
};
struct I32 {
  int32_t v[16];
};
using Mask = unsigned;

constexpr bool kPairDot = false;
constexpr int kTilesAtOnce = 1;
constexpr int kValueVectors = 1;
// Query rows, and vectors of keys, whose products are made together.
constexpr int kColumnRows = 4, kColumnVectors = 1;

#define LOKI_LANES(EXPRESSION)                   \
  F32 out;                                       \
  for (int i = 0; i < 16; ++i) out.v[i] = (EXPRESSION); \
  return out;
#define LOKI_MARKS(CONDITION)                    \
  Mask out = 0;                                  \
  for (int i = 0; i < 16; ++i) out |= static_cast<Mask>(CONDITION) << i; \
  return out;

static inline F32 set1(float x) { LOKI_LANES(x) }
static inline F32 load(const float* p) { LOKI_LANES(p[i]) }
static inline void store(float* p, const F32& x) { memcpy(p, x.v, sizeof x.v); }
static inline F32 add(const F32& a, const F32& b) { LOKI_LANES(a.v[i] + b.v[i]) }
static inline F32 sub(const F32& a, const F32& b) { LOKI_LANES(a.v[i] - b.v[i]) }
static inline F32 mul(const F32& a, const F32& b) { LOKI_LANES(a.v[i] * b.v[i]) }
static inline F32 div(const F32& a, const F32& b) { LOKI_LANES(a.v[i] / b.v[i]) }
static inline F32 fma(const F32& a, const F32& b, const F32& c) { LOKI_LANES(a.v[i] * b.v[i] + c.v[i]) }
// Where one is NaN, the second.
static inline F32 max(const F32& a, const F32& b) { LOKI_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
static inline F32 min(const F32& a, const F32& b) { LOKI_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
// To the nearest whole number, for numbers below 2 ** 22.
static inline F32 round(const F32& x) { LOKI_LANES((x.v[i] + 12582912.0f) - 12582912.0f) }
static inline F32 abs(const F32& x) { LOKI_LANES(from_bits(to_bits(x.v[i]) & 0x7fffffffu)) }
static inline Mask less(const F32& a, const F32& b) { LOKI_MARKS(a.v[i] < b.v[i]) }
static inline Mask at_least(const F32& a, const F32& b) { LOKI_MARKS(a.v[i] >= b.v[i]) }
static inline F32 select(Mask m, const F32& yes, const F32& no) { LOKI_LANES((m >> i) & 1u ? yes.v[i] : no.v[i]) }
static inline Mask first(int n) { return (1u << n) - 1u; }
static inline unsigned bits(Mask m) { return m; }
static inline Mask from_bytes(const uint8_t* p) { LOKI_MARKS(p[i] != 0) }
static inline Mask both(Mask a, Mask b) { return a & b; }
// For whole numbers in -126..127; others, and NaN, give some number.
static inline F32 power_of_two(const F32& n) {
  LOKI_LANES(from_bits(static_cast<uint32_t>(n.v[i] >= -126.0f && n.v[i] <= 127.0f ? static_cast<int32_t>(n.v[i]) + 127 : 127) << 23))
}
static inline float sum(const F32& x) {
  float part[8], quarter[4];
  for (int i = 0; i < 8; ++i) part[i] = x.v[i] + x.v[i + 8];
  for (int i = 0; i < 4; ++i) quarter[i] = part[i] + part[i + 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
static inline void store_sums(float* out, const F32& a, const F32& b, const F32& c, const F32& d) {
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
}

// Word j of register i becomes word i of register j.
static inline void transpose(F32* x) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < i; ++j) {
      const float other = x[i].v[j];
      x[i].v[j] = x[j].v[i];
      x[j].v[i] = other;
    }
}

template <int kType>
static inline F32 load_row(const void* row, int64_t from) {
  LOKI_LANES(load_number(row, kType, from + i))
}
template <int kType>
static inline F32 load_row_part(const void* row, int64_t from, int n) {
  LOKI_LANES(i < n ? load_number(row, kType, from + i) : 0.0f)
}
static inline F32 load_scales(const uint16_t* p) { LOKI_LANES(f16_to_float(p[i])) }

constexpr int kPairWords = 2;
struct PairLine {
  F32 even, odd;
};
static inline PairLine pair_line(const uint8_t* p) {
  PairLine line;
  for (int i = 0; i < 16; ++i) {
    uint16_t h[2];
    memcpy(h, p + 4 * i, sizeof h);
    line.even.v[i] = bf16_to_float(h[0]);
    line.odd.v[i] = bf16_to_float(h[1]);
  }
  return line;
}
static inline F32 dot_line(const F32& acc, const PairLine& line, const int32_t* words) {
  float q[2];
  memcpy(q, words, sizeof q);
  LOKI_LANES(line.odd.v[i] * q[1] + (line.even.v[i] * q[0] + acc.v[i]))
}

constexpr int kQuadWords = 1;
constexpr int kByteBias = 0;
struct Quads {
  int8_t v[64];
};
static inline Quads quads(const uint8_t* p) {
  Quads q;
  memcpy(q.v, p, sizeof q.v);
  return q;
}
static inline void nibble_quads(const uint8_t* p, Quads* low, Quads* high) {
  for (int i = 0; i < 64; ++i) {
    low->v[i] = static_cast<int8_t>(p[i] & 15);
    high->v[i] = static_cast<int8_t>(p[i] >> 4);
  }
}
static inline I32 start_at(int32_t x) {
  I32 out;
  for (int i = 0; i < 16; ++i) out.v[i] = x;
  return out;
}
static inline F32 to_float(const I32& x) { LOKI_LANES(static_cast<float>(x.v[i])) }
static inline I32 dot_quads(I32 acc, const Quads& q, const int32_t* words) {
  int8_t w[4];
  memcpy(w, words, sizeof w);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc.v[i] += q.v[4 * i + j] * w[j];
  return acc;
}

static inline uint64_t sum_words(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  uint64_t sums[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i + 32 <= bytes; i += 32)
    for (int j = 0; j < 4; ++j) {
      uint64_t word;
      memcpy(&word, p + i + 8 * j, sizeof word);
      sums[j] += word;
    }
  return sums[0] + sums[1] + sums[2] + sums[3];
}

#undef LOKI_LANES
#undef LOKI_MARKS

}  // namespace LOKI_ISA
}  // namespace loki
