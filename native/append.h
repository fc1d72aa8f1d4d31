// New keys in leading coordinates, quantised into one column of a tile.
#pragma once

#include "simd.h"

namespace loki {
namespace LOKI_ISA {

template <int kVectors>
static void project_block(const float* row, int64_t dim, const float* map, int64_t rank, int last,
                          float* out) {
  F32 acc[kVectors];
  for (int v = 0; v < kVectors; ++v) acc[v] = zero();
  for (int64_t i = 0; i < dim; ++i, map += rank) {
    const F32 x = set1(row[i]);
    for (int v = 0; v < kVectors; ++v) {
      const F32 m = v + 1 < kVectors || last == 16 ? load(map + 16 * v)
                                                   : load_row_part<LOKI_F32>(map + 16 * v, 0, last);
      acc[v] = fma(x, m, acc[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    float lanes[16];
    store(lanes, acc[v]);
    const int used = v + 1 < kVectors ? 16 : last;
    memcpy(out + 16 * v, lanes, sizeof(float) * static_cast<size_t>(used));
  }
}

static void project(const void* row, int64_t dtype, int64_t dim, const float* map, int64_t rank,
                    float* out) {
  float wide[1024];  // the door admits no larger head_dim
  for (int64_t i = 0; i < dim; ++i) wide[i] = load_number(row, dtype, i);
  int64_t at = 0;
  for (; at + 32 <= rank; at += 32) project_block<2>(wide, dim, map + at, rank, 16, out + at);
  for (; at < rank; at += 16) {
    const int last = rank - at < 16 ? static_cast<int>(rank - at) : 16;
    project_block<1>(wide, dim, map + at, rank, last, out + at);
  }
}

static void encode(const float* lead, int64_t kind, int64_t rank, int64_t lines, uint8_t* tile,
                   int64_t column, uint16_t* scale) {
  uint8_t* at = tile + column * 4;
  if (kind == LOKI_F32 || kind == LOKI_BF16) {
    const int64_t width = kind == LOKI_F32 ? 1 : 2;
    for (int64_t line = 0; line < lines; ++line, at += kLineBytes)
      for (int64_t i = 0; i < width; ++i) {
        const float x = line * width + i < rank ? lead[line * width + i] : 0.0f;
        store_number(at, kind, i, x);
      }
    return;
  }
  const float limit = kind == LOKI_INT8 ? 127.0f : 7.0f;
  float peak = 0.0f;
  for (int64_t i = 0; i < rank; ++i) {
    const float a = lead[i] < 0 ? -lead[i] : lead[i];
    peak = a > peak || a != a ? a : peak;
  }
  float step = peak / limit;
  step = step < 6.103515625e-05f ? 6.103515625e-05f : step > 65504.0f ? 65504.0f : step;
  *scale = float_to_f16(step);
  step = f16_to_float(*scale);
  const int64_t width = kind == LOKI_INT8 ? 4 : 8;
  for (int64_t line = 0; line < lines; ++line, at += kLineBytes) {
    int32_t codes[8];
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = line * width + i;
      float x = c < rank ? lead[c] / step : 0.0f;
      x = x > limit ? limit : x < -limit ? -limit : x == x ? x : 0.0f;
      codes[i] = static_cast<int32_t>(__builtin_rintf(x));
    }
    for (int64_t i = 0; i < 4; ++i)
      at[i] = kind == LOKI_INT8
                  ? static_cast<uint8_t>(codes[i])
                  : static_cast<uint8_t>((codes[i] + 8) | ((codes[i + 4] + 8) << 4));
  }
}

}  // namespace LOKI_ISA
}  // namespace loki
