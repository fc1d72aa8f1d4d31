// What keys receive of the attention of many queries: a small matrix product, its powers, their sums.
//
// A chunk of keys is turned into a panel once and meets all query rows, so that a key is widened and
// moved once for many products. A panel holds groups of 16 keys; line l of a group holds word l of each
// of them: a float, or two bfloat16 where the processor multiplies pairs.
#pragma once

#include "score.h"

namespace loki {
namespace LOKI_ISA {

// Rows of powers that are added up before they meet the sum of all others, which may be far larger.
constexpr int64_t kAddedAtOnce = 64;

template <int kType>
static F32 key_words(const void* row, int64_t word, int64_t dim) {
  if (word + 16 <= dim) return load_row<kType>(row, word);
  return load_row_part<kType>(row, word, static_cast<int>(dim - word));
}

template <int kType>
static void fill_panel(const void* const* rows, int64_t count, int64_t dim, int64_t lines, float* panel) {
  for (int64_t g = 0; g < count; g += 16, panel += 16 * lines) {
    for (int64_t l = 0; l < lines; l += 16) {
      F32 x[16];
      for (int i = 0; i < 16; ++i) x[i] = key_words<kType>(rows[g + i], l, dim);
      transpose(x);
      for (int i = 0; i < 16 && l + i < lines; ++i) store(panel + 16 * (l + i), x[i]);
    }
  }
}

#if defined(__AVX512BF16__)
static void fill_paired_panel(const void* const* rows, int64_t count, int64_t dim, int64_t lines,
                              float* panel) {
  for (int64_t g = 0; g < count; g += 16, panel += 16 * lines) {
    for (int64_t l = 0; l < lines; l += 16) {
      const int64_t left = dim - 2 * l;
      F32 x[16];
      for (int i = 0; i < 16; ++i) {
        const uint16_t* at = static_cast<const uint16_t*>(rows[g + i]) + 2 * l;
        x[i] = words_of(left >= 32 ? load_pairs(at) : load_pairs_part(at, static_cast<int>(left)));
      }
      transpose(x);
      for (int i = 0; i < 16 && l + i < lines; ++i) store(panel + 16 * (l + i), x[i]);
    }
  }
}
#endif

// `count` is a multiple of 16.
static void key_panel(const void* const* rows, int64_t count, int64_t dtype, int64_t dim, bool paired,
                      float* panel) {
#if defined(__AVX512BF16__)
  if (paired) return fill_paired_panel(rows, count, dim, panel_lines(dim, true), panel);
#endif
  const int64_t lines = panel_lines(dim, paired);
  switch (dtype) {
    case LOKI_F32: return fill_panel<LOKI_F32>(rows, count, dim, lines, panel);
    case LOKI_BF16: return fill_panel<LOKI_BF16>(rows, count, dim, lines, panel);
    default: return fill_panel<LOKI_F16>(rows, count, dim, lines, panel);
  }
}

// A line of a panel times the same word of a query.
template <bool kPaired>
static inline F32 add_product(F32 line, F32 word, F32 sum) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired) return dot_pairs(sum, pairs_of(line), pairs_of(word));
#endif
  return fma(line, word, sum);
}

// Products of some query rows with 16 * kVectors keys.
template <int kRows, int kVectors, bool kPaired>
static void products(const float* panel, int64_t lines, const float* query, int64_t stride, float* out) {
  F32 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = zero();
  for (int64_t l = 0; l < lines; ++l) {
    F32 x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(panel + 16 * (v * lines + l));
    for (int r = 0; r < kRows; ++r) {
      const F32 q = set1(query[r * stride + l]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = add_product<kPaired>(x[v], q, acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * kChunk + 16 * v, acc[r][v]);
}

template <int kVectors, bool kPaired>
static void row_products(int64_t rows, const float* panel, int64_t lines, const float* query,
                         int64_t stride, float* out) {
  static_assert(kColumnRows <= 6, "the cases below");
  switch (rows) {
    case 1: return products<1, kVectors, kPaired>(panel, lines, query, stride, out);
    case 2: return products<2, kVectors, kPaired>(panel, lines, query, stride, out);
    case 3: return products<3, kVectors, kPaired>(panel, lines, query, stride, out);
    case 4: return products<4, kVectors, kPaired>(panel, lines, query, stride, out);
    case 5: return products<5, kVectors, kPaired>(panel, lines, query, stride, out);
    default: return products<6, kVectors, kPaired>(panel, lines, query, stride, out);
  }
}

// A strip of keys stays in the first-level cache while all query rows pass over it.
template <bool kPaired>
static void chunk_products(const ColumnRows& q, const float* panel, int64_t count, float* out) {
  constexpr int kStrip = 16 * kColumnVectors;
  const int64_t padded = round_up(count, 16);
  for (int64_t t = 0; t < padded; t += kStrip, panel += kStrip * q.lines) {
    for (int64_t r = 0; r < q.count; r += kColumnRows) {
      const int64_t rows = q.count - r < kColumnRows ? q.count - r : kColumnRows;
      int64_t most = 0;
      for (int64_t i = r; i < r + rows; ++i) most = q.seen[i] > most ? q.seen[i] : most;
      if (most <= t) continue;
      const float* query = q.rows + r * q.stride;
      float* to = out + r * kChunk + t;
      if (t + kStrip <= padded) {
        row_products<kColumnVectors, kPaired>(rows, panel, q.lines, query, q.stride, to);
      } else {
        for (int64_t i = 0; t + i < padded; i += 16)
          row_products<1, kPaired>(rows, panel + i * q.lines, q.lines, query, q.stride, to + i);
      }
    }
  }
}

// In place: scale, cap, bias; powers of 2 relative to the peak; 0 where nothing is seen.
static void row_powers(const ColumnRows& q, int64_t r, int64_t count, float* row, float* peak,
                       float* total) {
  const int64_t seen = q.seen[r];
  const uint8_t* visible = q.visible == nullptr ? nullptr : q.visible[r];
  const F32 factor = set1(static_cast<float>(static_cast<double>(q.scaling) * kLog2));
  const F32 nothing = set1(-kInfinity);
  F32 best = nothing;
  for (int64_t i = 0; i < seen; i += 16) {
    F32 x = load(row + i);
    if (q.cap == 0.0f) x = mul(x, factor);
    else x = mul(set1(q.cap * kLog2E), hyperbolic_tangent(mul(x, set1(q.scaling / q.cap))));
    if (q.bias != nullptr) x = fma(load(q.bias + i), set1(kLog2E), x);
    if (visible != nullptr || i + 16 > seen) x = select(shown(i, seen, visible), x, nothing);
    store(row + i, x);
    best = max(best, x);
  }
  *peak = largest_of(best);
  const F32 from = set1(*peak == -kInfinity ? 0.0f : *peak);
  F32 sums = zero();
  for (int64_t i = 0; i < seen; i += 16) {
    const F32 e = binary_power(sub(load(row + i), from));
    store(row + i, e);
    sums = add(sums, e);
  }
  *total = sum_of(sums);
  for (int64_t i = round_up(seen, 16); i < count; i += 16) store(row + i, zero());
}

static void column_powers(const ColumnRows& q, const float* panel, int64_t count, float* out,
                          float* peaks, float* totals) {
#if defined(__AVX512BF16__)
  if (q.paired) chunk_products<true>(q, panel, count, out);
  else chunk_products<false>(q, panel, count, out);
#else
  chunk_products<false>(q, panel, count, out);
#endif
  for (int64_t r = 0; r < q.count; ++r) {
    if (q.seen[r] > 0) {
      row_powers(q, r, count, out + r * kChunk, peaks + r, totals + r);
    } else {
      peaks[r] = -kInfinity;
      totals[r] = 0.0f;
    }
  }
}

// Sixteen query rows at a time.
static void column_factors(float* peaks, const float* totals, int64_t chunks, int64_t stride,
                           const float* sinks) {
  const F32 nothing = set1(-kInfinity), sink = load(sinks);
  F32 peak = sink;
  // A peak that is NaN is passed over: its total makes the whole query NaN.
  for (int64_t c = 0; c < chunks; ++c) peak = max(load(peaks + c * stride), peak);
  peak = select(both(at_least(nothing, peak), at_least(peak, nothing)), zero(), peak);
  F32 total = binary_power(sub(sink, peak));
  for (int64_t c = 0; c < chunks; ++c) {
    const F32 factor = binary_power(sub(load(peaks + c * stride), peak));
    store(peaks + c * stride, factor);
    total = fma(load(totals + c * stride), factor, total);
  }
  const Mask none = both(at_least(zero(), total), at_least(total, zero()));
  const F32 inverse = select(none, zero(), div(set1(1.0f), total));
  for (int64_t c = 0; c < chunks; ++c)
    store(peaks + c * stride, mul(load(peaks + c * stride), inverse));
}

static void column_add(const float* powers, const float* factors, int64_t rows, int64_t count,
                       bool largest, float* sums) {
  alignas(64) float part[kChunk];
  const int64_t padded = round_up(count, 16);
  for (int64_t from = 0; from < rows; from += kAddedAtOnce) {
    const int64_t to = from + kAddedAtOnce < rows ? from + kAddedAtOnce : rows;
    for (int64_t i = 0; i < padded; i += 16) store(part + i, zero());
    int64_t r = from;
    for (; r + 4 <= to && !largest; r += 4) {
      const float* p = powers + r * kChunk;
      const F32 a = set1(factors[r]), b = set1(factors[r + 1]);
      const F32 c = set1(factors[r + 2]), d = set1(factors[r + 3]);
      for (int64_t i = 0; i < padded; i += 16) {
        F32 s = fma(load(p + i), a, load(part + i));
        s = fma(load(p + kChunk + i), b, s);
        s = fma(load(p + 2 * kChunk + i), c, s);
        store(part + i, fma(load(p + 3 * kChunk + i), d, s));
      }
    }
    for (; r < to; ++r) {
      const F32 f = set1(factors[r]);
      for (int64_t i = 0; i < padded; i += 16) {
        const F32 x = mul(load(powers + r * kChunk + i), f), s = load(part + i);
        store(part + i, largest ? select(at_least(x, x), max(s, x), x) : add(s, x));
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      if (!largest) sums[i] += part[i];
      else if (part[i] > sums[i] || part[i] != part[i]) sums[i] = part[i];
    }
  }
}

// How many bits differ between a query's code and those of `count` rows.
static void differing_bits(const char* codes, int64_t stride, int64_t count, int64_t words,
                           const uint32_t* query, float* out) {
  int64_t t = stride == 4 * words ? wide_differing_bits(codes, count, words, query, out) : 0;
  for (; t < count; ++t) {
    const char* row = codes + t * stride;
    int bits = 0;
    int64_t w = 0;
    for (; w + 2 <= words; w += 2) {
      uint64_t a, b;
      memcpy(&a, row + 4 * w, sizeof a);
      memcpy(&b, query + w, sizeof b);
      bits += __builtin_popcountll(a ^ b);
    }
    if (w < words) {
      uint32_t a;
      memcpy(&a, row + 4 * w, sizeof a);
      bits += __builtin_popcount(a ^ query[w]);
    }
    out[t] = static_cast<float>(bits);
  }
}

}  // namespace LOKI_ISA
}  // namespace loki
