// Estimated logits of cached rows, from tiles of leading coordinates or from plain rows.
//
// Tiles read rank * code bytes + 2 per row; a line of 64 bytes meets every query head of the group
// before the next one is loaded, and needs no horizontal sums: lane i is row i of the tile.
#pragma once

#include "simd.h"

namespace loki {
namespace LOKI_ISA {

// Words that one query head puts against one line, by kind of plane.
static int64_t words_per_line(int64_t kind) {
  switch (kind) {
    case LOKI_INT8: return kQuadWords;
    case LOKI_INT4: return 2 * kQuadWords;
    case LOKI_BF16: return kPairWords;
    default: return 1;
  }
}

static int64_t lead_words(int64_t kind, int64_t lines) { return lines * words_per_line(kind); }

// Four signed bytes as the words that `dot_quads` takes.
static void put_quad(const int32_t code[4], int32_t* words) {
  if (kQuadWords == 1) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= (static_cast<uint32_t>(code[i]) & 0xffu) << (8 * i);
    words[0] = static_cast<int32_t>(word);
  } else {
    for (int odd = 0; odd < 2; ++odd) {
      const uint32_t low = static_cast<uint32_t>(code[odd]) & 0xffffu;
      const uint32_t high = static_cast<uint32_t>(code[odd + 2]) & 0xffffu;
      words[odd] = static_cast<int32_t>(low | (high << 16));
    }
  }
}

static void put_pair(float first, float second, int32_t* words) {
  const uint16_t a = float_to_bf16(first), b = float_to_bf16(second);
  if (kPairWords == 1) {
    words[0] = static_cast<int32_t>(static_cast<uint32_t>(a) | (static_cast<uint32_t>(b) << 16));
  } else {
    words[0] = static_cast<int32_t>(static_cast<uint32_t>(a) << 16);
    words[1] = static_cast<int32_t>(static_cast<uint32_t>(b) << 16);
  }
}

// Rounds one head's query to bytes, codes * step being the query; both are part of the op's contract.
static float round_query(const float* query, int64_t rank, int64_t width, int32_t* codes) {
  float peak = 0.0f;
  bool sound = true;
  for (int64_t i = 0; i < rank; ++i) {
    const float a = query[i] < 0 ? -query[i] : query[i];
    sound = sound && a <= kLargest;
    peak = a > peak ? a : peak;
  }
  float step = peak / 127.0f;
  if (!(step >= 1.17549435e-38f)) step = 1.0f;
  for (int64_t i = 0; i < width; ++i)
    codes[i] = i < rank && sound ? static_cast<int32_t>(__builtin_rintf(query[i] / step)) : 0;
  return sound ? step : __builtin_nanf("");
}

// words: [line][head][words_per_line], so that a line's words stand together.
static void prepare_lead(const float* const* heads, float scaling, LeadQuery* query) {
  const int64_t per_line = words_per_line(query->kind);
  for (int64_t h = 0; h < query->heads; ++h) {
    query->start[h] = 0;
    query->factor[h] = scaling;
    if (!query->tiled) {
      float* row = query->rows + h * row_floats(query->rank);
      memcpy(row, heads[h], sizeof(float) * static_cast<size_t>(query->rank));
      for (int64_t i = query->rank; i < row_floats(query->rank); ++i) row[i] = 0.0f;
      continue;
    }
    int32_t* words = query->words + h * per_line;
    const int64_t stride = query->heads * per_line;
    if (query->kind == LOKI_F32 || query->kind == LOKI_BF16) {
      const int64_t width = query->kind == LOKI_F32 ? 1 : 2;
      for (int64_t line = 0; line < query->lines; ++line) {
        float x[2] = {0.0f, 0.0f};
        for (int64_t i = 0; i < width && line * width + i < query->rank; ++i)
          x[i] = heads[h][line * width + i];
        if (width == 1) memcpy(words + line * stride, x, sizeof(float));
        else put_pair(x[0], x[1], words + line * stride);
      }
      continue;
    }
    const int64_t width = query->kind == LOKI_INT8 ? 4 : 8;
    const int32_t bias = query->kind == LOKI_INT8 ? kByteBias : 8;
    int32_t codes[2048];  // the door admits no larger rank
    query->factor[h] = scaling * round_query(heads[h], query->rank, query->lines * width, codes);
    for (int64_t line = 0; line < query->lines; ++line) {
      for (int64_t quad = 0; quad < width / 4; ++quad) {
        const int32_t* code = codes + line * width + quad * 4;
        put_quad(code, words + line * stride + quad * kQuadWords);
        for (int i = 0; i < 4; ++i) query->start[h] -= bias * code[i];
      }
    }
  }
  // Heads that only fill up a block of four are zero.
  if (!query->tiled) {
    const int64_t padded = round_up(query->heads, 4) * row_floats(query->rank);
    for (int64_t i = query->heads * row_floats(query->rank); i < padded; ++i) query->rows[i] = 0.0f;
  }
}

// What one kind of line does: its sums, and how a line meets the words of one head.
template <int kKind>
struct LineOf {
  using Sum = F32;
  using Line = F32;
  static Sum start(int32_t) { return zero(); }
  static Line at(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
  static Sum add_to(Sum sum, const Line& line, const int32_t* words) {
    float q;
    memcpy(&q, words, sizeof q);
    return fma(line, set1(q), sum);
  }
  static F32 value(const Sum& sum) { return sum; }
};

template <>
struct LineOf<LOKI_BF16> {
  using Sum = F32;
  using Line = PairLine;
  static Sum start(int32_t) { return zero(); }
  static Line at(const uint8_t* p) { return pair_line(p); }
  static Sum add_to(const Sum& sum, const Line& line, const int32_t* words) {
    return dot_line(sum, line, words);
  }
  static F32 value(const Sum& sum) { return sum; }
};

template <>
struct LineOf<LOKI_INT8> {
  using Sum = I32;
  using Line = Quads;
  static Sum start(int32_t x) { return start_at(x); }
  static Line at(const uint8_t* p) { return quads(p); }
  static Sum add_to(const Sum& sum, const Line& line, const int32_t* words) {
    return dot_quads(sum, line, words);
  }
  static F32 value(const Sum& sum) { return to_float(sum); }
};

template <>
struct LineOf<LOKI_INT4> {
  using Sum = I32;
  struct Line {
    Quads low, high;
  };
  static Sum start(int32_t x) { return start_at(x); }
  static Line at(const uint8_t* p) {
    Line line;
    nibble_quads(p, &line.low, &line.high);
    return line;
  }
  static Sum add_to(const Sum& sum, const Line& line, const int32_t* words) {
    return dot_quads(dot_quads(sum, line.low, words), line.high, words + kQuadWords);
  }
  static F32 value(const Sum& sum) { return to_float(sum); }
};

// Bytes ahead in the plane that are asked for, into the second-level cache.
constexpr int64_t kTilesAhead = 4096;

// kTiles tiles for kHeads heads; a word that is loaded for one tile serves the others.
template <int kKind, int kHeads, int kTiles>
static inline void tile_group(const uint8_t* const* tiles, const uint16_t* const* scales,
                              const LeadQuery& query, const int32_t* words, int64_t head,
                              float* logits, int64_t stride) {
  using L = LineOf<kKind>;
  const int64_t per_line = words_per_line(kKind), step = query.heads * per_line, lines = query.lines;
  typename L::Sum sums[kTiles][kHeads];
  for (int t = 0; t < kTiles; ++t)
    for (int h = 0; h < kHeads; ++h) sums[t][h] = L::start(query.start[head + h]);
#pragma GCC unroll 4
  for (int64_t line = 0; line < lines; ++line) {
    typename L::Line x[kTiles];
    for (int t = 0; t < kTiles; ++t) {
      x[t] = L::at(tiles[t] + line * kLineBytes);
      __builtin_prefetch(tiles[t] + line * kLineBytes + kTilesAhead, 0, 2);
    }
    for (int h = 0; h < kHeads; ++h)
      for (int t = 0; t < kTiles; ++t)
        sums[t][h] = L::add_to(sums[t][h], x[t], words + line * step + h * per_line);
  }
  for (int t = 0; t < kTiles; ++t) {
    F32 scale = set1(1.0f);
    if constexpr (kKind == LOKI_INT8 || kKind == LOKI_INT4) scale = load_scales(scales[t]);
    for (int h = 0; h < kHeads; ++h) {
      F32 x = mul(L::value(sums[t][h]), set1(query.factor[head + h]));
      if constexpr (kKind == LOKI_INT8 || kKind == LOKI_INT4) x = mul(x, scale);
      store(logits + (head + h) * stride + t * 16, x);
    }
  }
}

template <int kKind, int kHeads>
static void tile_block(const uint8_t* const* tiles, const uint16_t* const* scales,
                       int64_t tile_count, const LeadQuery& query, int64_t head, float* logits,
                       int64_t stride) {
  const int32_t* words = query.words + head * words_per_line(kKind);
  int64_t t = 0;
  for (; t + kTilesAtOnce <= tile_count; t += kTilesAtOnce)
    tile_group<kKind, kHeads, kTilesAtOnce>(tiles + t, scales + t, query, words, head,
                                            logits + t * 16, stride);
  for (; t < tile_count; ++t)
    tile_group<kKind, kHeads, 1>(tiles + t, scales + t, query, words, head, logits + t * 16, stride);
}

template <int kKind>
static void tile_heads(const uint8_t* const* tiles, const uint16_t* const* scales,
                       int64_t tile_count, const LeadQuery& query, float* logits, int64_t stride) {
  int64_t head = 0;
  for (; head + 4 <= query.heads; head += 4)
    tile_block<kKind, 4>(tiles, scales, tile_count, query, head, logits, stride);
  switch (query.heads - head) {
    case 3: tile_block<kKind, 3>(tiles, scales, tile_count, query, head, logits, stride); break;
    case 2: tile_block<kKind, 2>(tiles, scales, tile_count, query, head, logits, stride); break;
    case 1: tile_block<kKind, 1>(tiles, scales, tile_count, query, head, logits, stride); break;
    default: break;
  }
}

static void tile_logits(const uint8_t* const* tiles, const uint16_t* const* scales,
                        int64_t tile_count, const LeadQuery& query, float* logits,
                        int64_t stride) {
  switch (query.kind) {
    case LOKI_INT8: return tile_heads<LOKI_INT8>(tiles, scales, tile_count, query, logits, stride);
    case LOKI_INT4: return tile_heads<LOKI_INT4>(tiles, scales, tile_count, query, logits, stride);
    case LOKI_BF16: return tile_heads<LOKI_BF16>(tiles, scales, tile_count, query, logits, stride);
    default: return tile_heads<LOKI_F32>(tiles, scales, tile_count, query, logits, stride);
  }
}

// What follows scoring ----------------------------------------------------------------------------

static void soft_cap(float* logits, int64_t count, float cap, float factor) {
  for (int64_t i = 0; i < count; i += 16)
    store(logits + i, mul(set1(cap * factor), hyperbolic_tangent(div(load(logits + i), set1(cap)))));
}

static inline Mask shown(int64_t i, int64_t count, const uint8_t* visible) {
  const Mask inside = some(count - i);
  if (visible == nullptr) return inside;
  if (count - i >= 16) return both(inside, from_bytes(visible + i));
  uint8_t tail[16] = {0};
  memcpy(tail, visible + i, static_cast<size_t>(count - i));
  return both(inside, from_bytes(tail));
}

static void exponentials(float* logits, int64_t count, const uint8_t* visible, float* peak,
                         float* total, const char* ahead, int64_t ahead_step) {
  const F32 nothing = set1(-kInfinity);
  // Whole registers of visible rows need no mask.
  const int64_t plain = visible == nullptr ? count / 16 * 16 : 0;
  F32 best = nothing;
  for (int64_t i = 0; i < plain; i += 16) best = max(best, load(logits + i));
  for (int64_t i = plain; i < count; i += 16)
    best = max(best, select(shown(i, count, visible), load(logits + i), nothing));
  *peak = largest_of(best);
  const F32 from = set1(*peak == -kInfinity ? 0.0f : *peak);
  F32 sums = zero();
  for (int64_t i = 0; i < plain; i += 16) {
    // Meanwhile memory brings what is scored next.
    for (int64_t b = 0; b < ahead_step; b += 64) __builtin_prefetch(ahead + b, 0, 2);
    ahead += ahead_step;
    const F32 e = binary_power(sub(load(logits + i), from));
    store(logits + i, e);
    sums = add(sums, e);
  }
  for (int64_t i = plain; i < count; i += 16) {
    const F32 e = select(shown(i, count, visible), binary_power(sub(load(logits + i), from)), zero());
    store(logits + i, e);
    sums = add(sums, e);
  }
  *total = sum_of(sums);
}

static void weigh(const float* weights, int64_t stride, int64_t heads, int64_t count,
                  const float* factor, float* scores) {
  for (int64_t i = 0; i < count; i += 16) {
    F32 s = zero();
    for (int64_t h = 0; h < heads; ++h)
      s = fma(load(weights + h * stride + i), set1(factor[h]), s);
    store(scores + i, s);
  }
}

static void largest(const float* logits, int64_t stride, int64_t heads, int64_t count,
                    float* scores) {
  for (int64_t i = 0; i < count; i += 16) {
    F32 s = load(logits + i);
    for (int64_t h = 1; h < heads; ++h) {
      const F32 x = load(logits + h * stride + i);
      s = select(at_least(x, x), max(x, s), x);  // one NaN makes NaN
    }
    store(scores + i, s);
  }
}

static void settle(const float* scores, int64_t count, const uint8_t* visible, float* out) {
  const F32 low = set1(-kLargest), high = set1(kLargest), hidden = set1(-kInfinity);
  for (int64_t i = 0; i < count; i += 16) {
    const F32 s = min(max(load(scores + i), low), high);
    store(out + i, select(shown(i, count, visible), s, hidden));
  }
}

}  // namespace LOKI_ISA
}  // namespace loki
