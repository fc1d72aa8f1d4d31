// Logits of plain rows: the exact ones of the attention, and estimates from a prefix of each row.
//
// A block holds one, two or four query heads, and as many rows as make four sums, which are then
// added up together. Logits of a block stand as [row][head].
#pragma once

#include "simd.h"

namespace loki {
namespace LOKI_ISA {

// Rows ahead that are asked for: they lie anywhere, no hardware foresees them. Into the second-level
// cache, because far more requests can be under way there than in the first.
constexpr int64_t kAhead = 16;

static inline void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);
}

template <int kType, int kHeads>
static void float_block(const void* const* rows, int64_t count, int64_t dim, const float* query,
                        float* out) {
  constexpr int kRows = 4 / kHeads;
  const int64_t stride = row_floats(dim), whole = dim / 16 * 16;
  const int rest = static_cast<int>(dim - whole);
  const int64_t bytes = dim * number_bytes(kType);
  for (int64_t r = 0; r < count; r += kRows, out += 4) {
    F32 acc[kRows][kHeads];
    for (int i = 0; i < kRows; ++i)
      for (int h = 0; h < kHeads; ++h) acc[i][h] = zero();
    for (int i = 0; i < kRows; ++i)
      if (r + i + kAhead < count) prefetch(rows[r + i + kAhead], bytes);
    for (int64_t d = 0; d < whole; d += 16) {
      for (int i = 0; i < kRows; ++i) {
        const F32 x = load_row<kType>(rows[r + i], d);
        for (int h = 0; h < kHeads; ++h)
          acc[i][h] = fma(x, load(query + h * stride + d), acc[i][h]);
      }
    }
    if (rest) {
      for (int i = 0; i < kRows; ++i) {
        const F32 x = load_row_part<kType>(rows[r + i], whole, rest);
        for (int h = 0; h < kHeads; ++h)
          acc[i][h] = fma(x, load(query + h * stride + whole), acc[i][h]);
      }
    }
    const F32* a = &acc[0][0];
    store_sums(out, a[0], a[1], a[2], a[3]);
  }
}

#if defined(__AVX512BF16__)
template <int kHeads, int kVectors>
static void paired_block(const void* const* rows, int64_t count, int64_t dim, const float* query,
                         float* out) {
  constexpr int kRows = 4 / kHeads;
  const int64_t stride = row_floats(dim) * 4, bytes = dim * 2;  // of a query row, of a key row
  const int vectors = kVectors ? kVectors : static_cast<int>(dim / 32);
  const int rest = kVectors ? 0 : static_cast<int>(dim % 32);
  const char* q = reinterpret_cast<const char*>(query);
  for (int64_t r = 0; r < count; r += kRows, out += 4) {
    F32 acc[kRows][kHeads];
    for (int i = 0; i < kRows; ++i)
      for (int h = 0; h < kHeads; ++h) acc[i][h] = zero();
    for (int i = 0; i < kRows; ++i)
      if (r + i + kAhead < count) prefetch(rows[r + i + kAhead], bytes);
    for (int v = 0; v < vectors; ++v) {
      for (int i = 0; i < kRows; ++i) {
        const Pairs x = load_pairs(static_cast<const char*>(rows[r + i]) + v * 64);
        for (int h = 0; h < kHeads; ++h)
          acc[i][h] = dot_pairs(acc[i][h], x, load_pairs(q + h * stride + v * 64));
      }
    }
    if (rest) {
      for (int i = 0; i < kRows; ++i) {
        const Pairs x = load_pairs_part(static_cast<const char*>(rows[r + i]) + vectors * 64, rest);
        for (int h = 0; h < kHeads; ++h)
          acc[i][h] = dot_pairs(acc[i][h], x, load_pairs(q + h * stride + vectors * 64));
      }
    }
    const F32* a = &acc[0][0];
    store_sums(out, a[0], a[1], a[2], a[3]);
  }
}

template <int kHeads>
static void paired_rows(const void* const* rows, int64_t count, int64_t dim, const float* query,
                        float* out) {
  switch (dim) {
    case 64: return paired_block<kHeads, 2>(rows, count, dim, query, out);
    case 96: return paired_block<kHeads, 3>(rows, count, dim, query, out);
    case 128: return paired_block<kHeads, 4>(rows, count, dim, query, out);
    case 256: return paired_block<kHeads, 8>(rows, count, dim, query, out);
    default: return paired_block<kHeads, 0>(rows, count, dim, query, out);
  }
}
#endif

// Query heads of the next block: the fewer, the more rows are summed together.
static int block_heads(int64_t left) { return left >= 3 ? 4 : static_cast<int>(left); }

// One block of `heads` heads; `count` is a multiple of 4.
static void block_logits(const void* const* rows, int64_t count, int64_t dtype, int64_t dim,
                         bool paired, const float* query, int heads, float* out) {
#if defined(__AVX512BF16__)
  if (paired) {
    switch (heads) {
      case 4: return paired_rows<4>(rows, count, dim, query, out);
      case 2: return paired_rows<2>(rows, count, dim, query, out);
      default: return paired_rows<1>(rows, count, dim, query, out);
    }
  }
#else
  (void)paired;
#endif
#define LOKI_FLOAT_BLOCK(TYPE)                                             \
  switch (heads) {                                                         \
    case 4: return float_block<TYPE, 4>(rows, count, dim, query, out);     \
    case 2: return float_block<TYPE, 2>(rows, count, dim, query, out);     \
    default: return float_block<TYPE, 1>(rows, count, dim, query, out);    \
  }
  switch (dtype) {
    case LOKI_F32: LOKI_FLOAT_BLOCK(LOKI_F32)
    case LOKI_BF16: LOKI_FLOAT_BLOCK(LOKI_BF16)
    default: LOKI_FLOAT_BLOCK(LOKI_F16)
  }
#undef LOKI_FLOAT_BLOCK
}

static void row_logits(const void* const* rows, int64_t count, int64_t dtype,
                       const LeadQuery& query, float* logits, int64_t stride, float* scratch) {
  const int64_t padded = round_up(count, 16);
  for (int64_t head = 0; head < query.heads;) {
    const int width = block_heads(query.heads - head);
    block_logits(rows, padded, dtype, query.rank, false,
                 query.rows + head * row_floats(query.rank), width, scratch);
    for (int h = 0; h < width && head + h < query.heads; ++h) {
      const float factor = query.factor[head + h];
      float* out = logits + (head + h) * stride;
      for (int64_t r = 0; r < padded; ++r) out[r] = scratch[r * width + h] * factor;
    }
    head += width;
  }
}

static void prepare_rows(const void* const* heads, int64_t dtype, int64_t key_dtype,
                         RowsQuery* query) {
  query->paired = kPairDot && dtype == LOKI_BF16 && key_dtype == LOKI_BF16;
  const int64_t stride = row_floats(query->dim);
  for (int64_t h = 0; h < round_up(query->heads, 4); ++h) {
    float* row = query->rows + h * stride;
    memset(row, 0, sizeof(float) * static_cast<size_t>(stride));
    if (h >= query->heads) continue;
    if (query->paired) {
      memcpy(row, heads[h], 2 * static_cast<size_t>(query->dim));
    } else {
      for (int64_t i = 0; i < query->dim; ++i) row[i] = load_number(heads[h], dtype, i);
    }
  }
}

}  // namespace LOKI_ISA
}  // namespace loki
