// The best rows of a row of settled scores: exact, deterministic, ties to the lower row.
//
// A sample gives a threshold a little below the wanted one; the few rows that reach it are
// compacted, and the threshold is found among them by halving the range of numbers: 32 halvings are
// exact, and a count over registers costs less than any sorting. Reads every score once.
#pragma once

#include "simd.h"

namespace loki {
namespace LOKI_ISA {

constexpr int64_t kSample = 1024;

// Bits in the order of the numbers.
static inline uint32_t order_of(float x) {
  const uint32_t u = to_bits(x);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

static inline float from_order(uint32_t u) {
  return from_bits(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

static inline int64_t count_from(const float* numbers, int64_t n, float threshold) {
  const F32 t = set1(threshold);
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += 16)
    found += __builtin_popcount(bits(both(at_least(load(numbers + i), t), some(n - i))));
  return found;
}

// The largest number that at least `wanted` of n reach, or the first one met that from `wanted` to
// `wanted + slack` reach. `reached` is how many do.
static float threshold_for(const float* numbers, int64_t n, int64_t wanted, int64_t slack,
                           int64_t* reached) {
  uint32_t low = order_of(-kInfinity), high = order_of(kInfinity);  // all reach low
  *reached = n;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    const int64_t found = count_from(numbers, n, from_order(middle));
    if (found < wanted) {
      high = middle - 1;
      continue;
    }
    low = middle;
    *reached = found;
    if (found <= wanted + slack) break;
  }
  return from_order(low);
}

// A number that about `wanted` of the scores reach, rather more; all reach -infinity.
static float sampled_threshold(const float* scores, int64_t count, int64_t wanted, float* sample) {
  if (count <= 2 * kSample) return -kInfinity;
  const int64_t step = count / kSample;
  for (int64_t i = 0; i < kSample; ++i) sample[i] = scores[i * step + (i * 7) % step];
  const double share = static_cast<double>(wanted) / static_cast<double>(count);
  const double mean = share * static_cast<double>(kSample);
  const int64_t rank = static_cast<int64_t>(mean + 3.5 * __builtin_sqrt(mean * (1.0 - share)) + 3.0);
  int64_t reached;
  return rank >= kSample ? -kInfinity
                         : threshold_for(sample, kSample, rank, kSample / 256, &reached);
}

static int64_t compact(const float* scores, int64_t count, float threshold, float* found,
                       int32_t* rows) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const Mask m = both(at_least(load(scores + i), set1(threshold)), some(count - i));
    kept += compress(m, load(scores + i), static_cast<int32_t>(i), found + kept, rows + kept);
  }
  return kept;
}

// The rows whose number reaches the threshold; `rows` may be read up to 16 elements behind the last.
static int64_t compact_rows(const float* found, const int32_t* rows, int64_t count, float threshold,
                            int32_t* out) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const Mask m = both(at_least(load(found + i), set1(threshold)), some(count - i));
    kept += compress_rows(m, rows + i, out + kept);
  }
  return kept;
}

static void choose(const float* scores, int64_t count, int64_t wanted, float* scratch,
                   int64_t* out) {
  if (wanted >= count) {
    for (int64_t i = 0; i < count; ++i) out[i] = i;
    return;
  }
  if (wanted <= 0) return;
  float* found = scratch;
  int32_t* rows = reinterpret_cast<int32_t*>(scratch + count + 64);
  float* copy = scratch + 2 * (count + 64);
  int64_t kept = compact(scores, count, sampled_threshold(scores, count, wanted, copy), found, rows);
  if (kept < wanted) kept = compact(scores, count, -kInfinity, found, rows);
  int64_t reached;
  const float last = threshold_for(found, kept, wanted, 0, &reached);
  if (reached == wanted) {
    int32_t* chosen = reinterpret_cast<int32_t*>(copy);
    const int64_t n = compact_rows(found, rows, kept, last, chosen);
    for (int64_t i = 0; i < n; ++i) out[i] = chosen[i];
    return;
  }
  // More rows hold the last number than are wanted: the lowest of them are taken.
  int64_t above = 0;
  for (int64_t i = 0; i < kept; ++i) above += found[i] > last;
  int64_t ties = wanted - above, written = 0;
  for (int64_t i = 0; written < wanted; ++i) {
    // Written in any case, and kept only if chosen: no branch to guess.
    const bool tied = found[i] == last && ties > 0;
    out[written] = rows[i];
    written += found[i] > last || tied;
    ties -= tied;
  }
}

}  // namespace LOKI_ISA
}  // namespace loki
