// The smallest set of rows that reaches a share of the estimated attention.
#include <string.h>

#include <algorithm>
#include <functional>

#include "numbers.h"
#include "step.h"

namespace loki {
namespace {

constexpr int kBuckets = 2048;
constexpr int64_t kFew = 64;

// How many of the n largest weights add up to `needed`; n + 1 if they never do. Overwrites weights.
int64_t count_to(float* weights, int64_t n, double needed) {
  static thread_local double sums[kBuckets];
  static thread_local int64_t sizes[kBuckets];
  int64_t above = 0;
  while (n > kFew) {
    uint32_t low = 0xffffffffu, high = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = to_bits(weights[i]);
      low = std::min(low, key);
      high = std::max(high, key);
    }
    if (low == high) break;
    int shift = 0;
    while (((high - low) >> shift) >= static_cast<uint32_t>(kBuckets)) ++shift;
    std::fill(sums, sums + kBuckets, 0.0);
    std::fill(sizes, sizes + kBuckets, 0);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bucket = (to_bits(weights[i]) - low) >> shift;
      sums[bucket] += static_cast<double>(weights[i]);
      ++sizes[bucket];
    }
    int bucket = kBuckets - 1;
    while (bucket > 0 && sums[bucket] < needed) {
      needed -= sums[bucket];
      above += sizes[bucket--];
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i)
      if (static_cast<int>((to_bits(weights[i]) - low) >> shift) == bucket) weights[kept++] = weights[i];
    n = kept;
  }
  std::sort(weights, weights + n, std::greater<float>());
  for (int64_t i = 0; i < n; ++i) {
    needed -= static_cast<double>(weights[i]);
    if (needed <= 0.0) return above + i + 1;
  }
  return above + n + 1;
}

}  // namespace

int64_t mass_count(const float* weights, int64_t count, const uint8_t* forced, double mass,
                   float* scratch) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += static_cast<double>(weights[i]);
  if (!(total == total)) return 1;  // NaN: nothing is known of any row
  if (total == 0.0) return count;  // no number of rows reaches a share of nothing
  double needed = mass * (1.0 - 1e-9) * total;
  int64_t before = 0, rest = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (forced == nullptr || !forced[i]) {
      if (weights[i] > 0.0f) scratch[rest++] = weights[i];
      continue;
    }
    if (needed <= 0.0) continue;
    needed -= static_cast<double>(weights[i]);
    ++before;
  }
  if (needed <= 0.0) return std::max<int64_t>(before, 1);
  return std::min(before + count_to(scratch, rest, needed), count);
}

}  // namespace loki
