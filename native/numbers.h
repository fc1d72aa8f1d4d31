// Half-precision numbers as bits, in plain C++.
#pragma once

#include <stdint.h>
#include <string.h>

#include "loki_attn.h"

namespace loki {

static inline float from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

static inline uint32_t to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}

static inline float bf16_to_float(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
static inline uint16_t float_to_bf16(float f) {
  const uint32_t u = to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return from_bits(sign | ((magnitude << 13) + 0x38000000u));
  const float f = static_cast<float>(magnitude) * 5.9604644775390625e-08f;  // 2 ** -24
  return sign ? -f : f;
}

// Rounds to nearest, ties to even; too large becomes infinite.
static inline uint16_t float_to_f16(float f) {
  const uint32_t u = to_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (a < 0x38800000u) {  // subnormal: the sum rounds at its last place
    const float shifted = from_bits(a) + 0.5f;
    return static_cast<uint16_t>(sign | (to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

static inline float load_number(const void* row, int64_t dtype, int64_t i) {
  if (dtype == LOKI_F32) return static_cast<const float*>(row)[i];
  const uint16_t h = static_cast<const uint16_t*>(row)[i];
  return dtype == LOKI_BF16 ? bf16_to_float(h) : f16_to_float(h);
}

static inline void store_number(void* row, int64_t dtype, int64_t i, float x) {
  if (dtype == LOKI_F32) {
    static_cast<float*>(row)[i] = x;
  } else {
    static_cast<uint16_t*>(row)[i] = dtype == LOKI_BF16 ? float_to_bf16(x) : float_to_f16(x);
  }
}

static constexpr int64_t number_bytes(int64_t dtype) { return dtype == LOKI_F32 ? 4 : 2; }

}  // namespace loki
