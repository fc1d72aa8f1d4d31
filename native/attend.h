// Exact attention of the query heads of one KV head to a list of rows, in float32.
//
// Reads count * (key dim + value dim) elements, once per block of four query heads; from the second
// block on they come from the processor's cache.
#pragma once

#include "rows.h"

namespace loki {
namespace LOKI_ISA {

// Adds weight * value of every row, for kHeads heads and 16 * kVectors elements from `from` on.
template <int kType, int kHeads, int kVectors>
static void add_values(const void* const* rows, int64_t count, int64_t from, int64_t ahead_bytes,
                       const float* weights, float* const* sums) {
  F32 acc[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) acc[h][v] = zero();
  for (int64_t r = 0; r < count; ++r, weights += kHeads) {
    if (ahead_bytes && r + kAhead < count) prefetch(rows[r + kAhead], ahead_bytes);
    F32 x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load_row<kType>(rows[r], from + 16 * v);
    for (int h = 0; h < kHeads; ++h) {
      const F32 w = set1(weights[h]);
      for (int v = 0; v < kVectors; ++v) acc[h][v] = fma(x[v], w, acc[h][v]);
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int v = 0; v < kVectors; ++v) store(sums[h] + from + 16 * v, acc[h][v]);
}

template <int kType, int kHeads>
static void add_values_rest(const void* const* rows, int64_t count, int64_t from, int rest,
                            const float* weights, float* const* sums) {
  F32 acc[kHeads];
  for (int h = 0; h < kHeads; ++h) acc[h] = zero();
  for (int64_t r = 0; r < count; ++r, weights += kHeads) {
    const F32 x = load_row_part<kType>(rows[r], from, rest);
    for (int h = 0; h < kHeads; ++h) acc[h] = fma(x, set1(weights[h]), acc[h]);
  }
  for (int h = 0; h < kHeads; ++h) store(sums[h] + from, acc[h]);
}

template <int kType, int kHeads>
static void all_values(const void* const* rows, int64_t count, int64_t dim, const float* weights,
                       float* const* sums) {
  constexpr int kMost = 4 * kValueVectors / kHeads < 8 ? 4 * kValueVectors / kHeads : 8;
  int64_t at = 0, ahead = dim * number_bytes(kType);
  for (; at + 16 * kMost <= dim; at += 16 * kMost, ahead = 0)
    add_values<kType, kHeads, kMost>(rows, count, at, ahead, weights, sums);
  for (; at + 16 <= dim; at += 16, ahead = 0)
    add_values<kType, kHeads, 1>(rows, count, at, ahead, weights, sums);
  if (at < dim)
    add_values_rest<kType, kHeads>(rows, count, at, static_cast<int>(dim - at), weights, sums);
}

template <int kType>
static void block_values(const void* const* rows, int64_t count, int64_t dim, int heads,
                         const float* weights, float* const* sums) {
  switch (heads) {
    case 4: return all_values<kType, 4>(rows, count, dim, weights, sums);
    case 2: return all_values<kType, 2>(rows, count, dim, weights, sums);
    default: return all_values<kType, 1>(rows, count, dim, weights, sums);
  }
}

// In place on logits [row][head of `heads`]: scale, cap, and powers of 2 relative to each peak.
static void block_soft_max(float* logits, int64_t count, int heads, float scaling, float cap,
                           float* peaks, float* totals) {
  const int64_t used = count * heads, end = round_up(count, 16) * heads;
  const float factor = static_cast<float>(static_cast<double>(scaling) * kLog2);
  F32 best = set1(-kInfinity);
  for (int64_t i = 0; i < end; i += 16) {
    F32 x = load(logits + i);
    if (cap == 0.0f) x = mul(x, set1(factor));
    else x = mul(set1(cap * kLog2E), hyperbolic_tangent(mul(x, set1(scaling / cap))));
    x = select(some(used - i), x, set1(-kInfinity));
    store(logits + i, x);
    best = max(best, x);
  }
  float lanes[16], from[16];
  store(lanes, best);
  for (int h = 0; h < heads; ++h) {
    float peak = lanes[h];
    for (int i = h; i < 16; i += heads)
      peak = lanes[i] > peak || lanes[i] != lanes[i] ? lanes[i] : peak;
    peaks[h] = peak;
    for (int i = h; i < 16; i += heads) from[i] = peak == -kInfinity ? 0.0f : peak;
  }
  const F32 base = load(from);
  F32 sums = zero();
  for (int64_t i = 0; i < end; i += 16) {
    const F32 e = binary_power(sub(load(logits + i), base));
    store(logits + i, e);
    sums = add(sums, e);
  }
  store(lanes, sums);
  for (int h = 0; h < heads; ++h) {
    totals[h] = 0.0f;
    for (int i = h; i < 16; i += heads) totals[h] += lanes[i];
  }
}

static void attend(const RowList& list, int64_t key_dtype, int64_t value_dtype, int64_t value_dim,
                   const RowsQuery& query, float scaling, float cap, float* scratch, Partial* out,
                   float* weights) {
  const int64_t padded = round_up(list.count, 16), sums_stride = round_up(value_dim, 16);
  for (int64_t head = 0; head < query.heads;) {
    const int width = block_heads(query.heads - head);
    const int real = query.heads - head < width ? static_cast<int>(query.heads - head) : width;
    block_logits(list.keys, padded, key_dtype, query.dim, query.paired,
                 query.rows + head * row_floats(query.dim), width, scratch);
    for (int64_t r = 0; r < kAhead && r < list.count; ++r)
      prefetch(list.values[r], value_dim * number_bytes(value_dtype));
    float peaks[4], totals[4], spare[1024];
    block_soft_max(scratch, list.count, width, scaling, cap, peaks, totals);
    float* sums[4];
    for (int h = 0; h < width; ++h) {
      // The zero head that fills a block of four has sums that nobody wants.
      sums[h] = h < real ? out->sums + (head + h) * sums_stride : spare;
      if (h < real) {
        out->peak[head + h] = peaks[h];
        out->total[head + h] = totals[h];
      }
    }
    switch (value_dtype) {
      case LOKI_F32: block_values<LOKI_F32>(list.values, list.count, value_dim, width, scratch, sums); break;
      case LOKI_BF16: block_values<LOKI_BF16>(list.values, list.count, value_dim, width, scratch, sums); break;
      default: block_values<LOKI_F16>(list.values, list.count, value_dim, width, scratch, sums); break;
    }
    if (weights != nullptr)
      for (int h = 0; h < real; ++h)
        for (int64_t r = 0; r < list.count; ++r)
          weights[(head + h) * kChunk + r] = scratch[r * width + h];
    head += width;
  }
}

static float power_at(float x) {
  float lanes[16];
  store(lanes, binary_power(set1(x)));
  return lanes[0];
}

static void merge(const float* peaks, const float* totals, const float* sums, int64_t chunks,
                  int64_t chunk_heads, int64_t sums_stride, int64_t value_dim, const float* sink,
                  int64_t dtype, void* out, float* log_sum_exp, float* peak_out,
                  float* total_out) {
  const float sink_peak = sink == nullptr ? -kInfinity : static_cast<float>(*sink * kLog2);
  float peak = sink_peak;
  for (int64_t c = 0; c < chunks; ++c) {
    const float p = peaks[c * chunk_heads];
    peak = p > peak || p != p ? p : peak;
  }
  const float from = peak == -kInfinity ? 0.0f : peak;
  double total = sink == nullptr ? 0.0 : power_at(sink_peak - from);
  for (int64_t c = 0; c < chunks; ++c) {
    if (peaks[c * chunk_heads] == -kInfinity) continue;
    total += static_cast<double>(totals[c * chunk_heads]) *
             static_cast<double>(power_at(peaks[c * chunk_heads] - from));
  }
  const float inverse = total == 0.0 ? 0.0f : static_cast<float>(1.0 / total);
  for (int64_t d = 0; d < value_dim; d += 16) {
    F32 acc = zero();
    for (int64_t c = 0; c < chunks; ++c) {
      if (peaks[c * chunk_heads] == -kInfinity) continue;
      const float factor = power_at(peaks[c * chunk_heads] - from);
      acc = fma(load(sums + c * sums_stride + d), set1(factor), acc);
    }
    float lanes[16];
    store(lanes, mul(acc, set1(inverse)));
    for (int64_t i = 0; i < 16 && d + i < value_dim; ++i)
      store_number(out, dtype, d + i, lanes[i]);
  }
  *peak_out = from;
  *total_out = static_cast<float>(total);
  if (log_sum_exp != nullptr)
    *log_sum_exp = total == 0.0 ? -kInfinity
                                : static_cast<float>(static_cast<double>(from) / kLog2 + __builtin_log(total));
}

}  // namespace LOKI_ISA
}  // namespace loki
