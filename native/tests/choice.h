// Which rows a call must choose, by plain sorting.
#pragma once

#include "naive.h"

namespace loki_test {

// What ranks the rows of one chooser, by row; hidden rows hold -infinity.
struct Ranking {
  std::vector<double> value, slack;  // known within the slack; summed soft-max weights are float32
  std::vector<double> weight;        // what a mass is a share of
  double weight_slack = 0.0;         // the largest relative error of a weight
  bool exact = true;                 // there is no slack
};

// A logit as loki_score returned it; a fused step may round its factors in another order.
inline Logit scored_logit(double x) { return {x, 6.0 * kUnit * fabs(x)}; }

// From the logits that loki_score returned, which are checked on their own.
inline Ranking rank_rows(const Scene& s, const Results& scored, int64_t b, int64_t chooser) {
  const loki_call& c = s.call;
  const std::vector<int64_t> shown = s.visible_rows(b);
  const int64_t heads = s.alone() ? 1 : c.group, first = chooser * heads;
  Ranking r;
  r.value.assign(static_cast<size_t>(c.seq), -INFINITY);
  r.slack.assign(static_cast<size_t>(c.seq), 0.0);
  r.weight.assign(static_cast<size_t>(c.seq), 0.0);
  if (c.lead_kind == LOKI_LEAD_RECENCY) {
    for (const int64_t t : shown) r.value[static_cast<size_t>(t)] = static_cast<double>(t);
    return r;
  }
  const auto logit = [&](int64_t h, int64_t t) {
    return static_cast<double>(*scored.scores.as<float>(((b * s.heads() + first + h) * c.seq + t) * 4));
  };
  r.exact = c.reduce != LOKI_REDUCE_SOFTMAX_SUM || heads == 1;
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<Logit> logits;
    for (const int64_t t : shown) {
      double& value = r.value[static_cast<size_t>(t)];
      value = std::max(value, logit(h, t));
      logits.push_back(scored_logit(logit(h, t)));
    }
    if (r.exact) continue;
    const Weights w = soft_max(logits, c.sink_logits == nullptr ? nullptr : c.sink_logits + first + h);
    for (size_t i = 0; i < shown.size(); ++i) {
      const auto t = static_cast<size_t>(shown[i]);
      r.weight[t] += w.value[i];
      r.slack[t] += w.value[i] * (w.relative_error[i] + static_cast<double>(heads) * kUnit) + kVanished;
      r.weight_slack = std::max(r.weight_slack, w.relative_error[i]);
    }
  }
  if (!r.exact) {
    for (const int64_t t : shown) r.value[static_cast<size_t>(t)] = r.weight[static_cast<size_t>(t)];
    return r;
  }
  std::vector<Logit> best;
  for (const int64_t t : shown) best.push_back(scored_logit(r.value[static_cast<size_t>(t)]));
  const Weights w = soft_max(best, nullptr);
  for (size_t i = 0; i < shown.size(); ++i) {
    r.weight[static_cast<size_t>(shown[i])] = w.value[i];
    r.weight_slack = std::max(r.weight_slack, w.relative_error[i]);
  }
  return r;
}

// The first sinks and the last recents of the visible rows, ascending.
inline std::vector<int64_t> forced_rows(const Scene& s, int64_t b) {
  const std::vector<int64_t> shown = s.visible_rows(b);
  std::vector<int64_t> forced;
  const auto n = static_cast<int64_t>(shown.size());
  for (int64_t i = 0; i < n; ++i)
    if (i < s.call.sinks || i >= n - s.call.recents) forced.push_back(shown[static_cast<size_t>(i)]);
  return forced;
}

// How many rows, forced ones first, add up to `needed`; `all` if they never do.
inline int64_t rows_for(const std::vector<double>& weight, const std::vector<int64_t>& forced, double needed,
                        int64_t all) {
  std::vector<double> order, rest = weight;
  for (const int64_t t : forced) {
    order.push_back(weight[static_cast<size_t>(t)]);
    rest[static_cast<size_t>(t)] = -1.0;
  }
  std::sort(rest.begin(), rest.end(), [](double x, double y) { return x > y; });
  for (const double w : rest)
    if (w >= 0.0) order.push_back(w);
  double sum = 0.0;
  for (size_t i = 0; i < order.size(); ++i) {
    sum += order[i];
    if (sum >= needed) return static_cast<int64_t>(i) + 1;
  }
  return all;
}

inline int64_t limited(const loki_call& c, int64_t wanted, int64_t visible) {
  if (c.cap > 0) wanted = std::min(wanted, c.cap);
  wanted = std::max(wanted, c.floor);
  return visible <= c.dense_below ? visible : std::min(wanted, visible);
}

// The fewest and the most rows that may be read.
inline std::pair<int64_t, int64_t> wanted_rows(const Scene& s, const Ranking& r, int64_t b) {
  const loki_call& c = s.call;
  const auto visible = static_cast<int64_t>(s.visible_rows(b).size());
  int64_t low = c.count, high = c.count;
  if (c.wanted != nullptr) {
    low = high = c.wanted[b];
  } else if (c.count == 0) {
    double total = 0.0;
    for (const double w : r.weight) total += w;
    const std::vector<int64_t> forced = forced_rows(s, b);
    const double needed = c.mass * total, slack = 3.0 * r.weight_slack;
    low = limited(c, rows_for(r.weight, forced, needed * (1.0 - slack), visible), visible);
    high = limited(c, rows_for(r.weight, forced, needed * (1.0 + slack), visible), visible);
  }
  const int64_t most = std::min(visible, c.indices_width);
  return {std::min(low, most), std::min(high, most)};
}

// The rows in a slot of `indices`: ascending, once each, and -1 behind them.
inline std::vector<int64_t> rows_in(const Buffer& indices, const Buffer& counts, int64_t slot, int64_t width) {
  const int64_t count = *counts.as<int64_t>(slot * 8);
  const int64_t* at = indices.as<int64_t>(slot * width * 8);
  if (count < 0 || count > width)
    fail("counts[%lld] is %lld", static_cast<long long>(slot), static_cast<long long>(count));
  for (int64_t i = 0; i < width; ++i) {
    const bool sound = i >= count ? at[i] == -1 : at[i] >= 0 && (i == 0 || at[i] > at[i - 1]);
    if (!sound)
      fail("indices[%lld][%lld] is %lld, count %lld", static_cast<long long>(slot), static_cast<long long>(i),
           static_cast<long long>(at[i]), static_cast<long long>(count));
  }
  return std::vector<int64_t>(at, at + count);
}

// The `count` best rows: forced ones first, then by value, ties to the lower row.
inline std::vector<int64_t> best_rows(const std::vector<double>& value, const std::vector<int64_t>& shown,
                                      const std::vector<int64_t>& forced, int64_t count) {
  std::vector<int64_t> order = forced, rest;
  std::set_difference(shown.begin(), shown.end(), forced.begin(), forced.end(), std::back_inserter(rest));
  std::stable_sort(rest.begin(), rest.end(), [&](int64_t x, int64_t y) {
    return value[static_cast<size_t>(x)] > value[static_cast<size_t>(y)];
  });
  order.insert(order.end(), rest.begin(), rest.end());
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

// Forced rows are in; of the others, none that is left out clearly surpasses one that is chosen.
inline void check_band(const Ranking& r, const std::vector<int64_t>& got, const std::vector<int64_t>& shown,
                       const std::vector<int64_t>& forced) {
  double least = INFINITY;
  for (const int64_t t : got)
    if (!std::binary_search(forced.begin(), forced.end(), t))
      least = std::min(least, r.value[static_cast<size_t>(t)] + r.slack[static_cast<size_t>(t)]);
  for (const int64_t t : shown) {
    if (std::binary_search(got.begin(), got.end(), t)) continue;
    const double value = r.value[static_cast<size_t>(t)] - r.slack[static_cast<size_t>(t)];
    if (value > least || std::binary_search(forced.begin(), forced.end(), t))
      fail("row %lld is left out, at least %.9g; a chosen one has at most %.9g", static_cast<long long>(t),
           value, least);
  }
}

// Rows of one chunk with the same logits in every head have the same value: the lower is chosen first.
inline void check_ties(const Scene& s, const Results& scored, int64_t b, int64_t chooser,
                       const std::vector<int64_t>& got, const std::vector<int64_t>& forced) {
  const int64_t heads = s.call.group;
  const auto bits = [&](int64_t h, int64_t t) {
    return *scored.scores.as<uint32_t>(((b * s.heads() + chooser * heads + h) * s.call.seq + t) * 4);
  };
  std::vector<int64_t> order;
  for (const int64_t t : s.visible_rows(b))
    if (!std::binary_search(forced.begin(), forced.end(), t)) order.push_back(t);
  const auto before = [&](int64_t x, int64_t y) {
    if (x / 512 != y / 512) return x < y ? -1 : 1;
    for (int64_t h = 0; h < heads; ++h)
      if (bits(h, x) != bits(h, y)) return bits(h, x) < bits(h, y) ? -1 : 1;
    return 0;
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return before(x, y) < 0; });
  for (size_t i = 1; i < order.size(); ++i)
    if (before(order[i - 1], order[i]) == 0 && std::binary_search(got.begin(), got.end(), order[i]) &&
        !std::binary_search(got.begin(), got.end(), order[i - 1]))
      fail("row %lld is chosen, its equal %lld is not", static_cast<long long>(order[i]),
           static_cast<long long>(order[i - 1]));
}

// Checks one chooser of loki_step; returns the rows it read.
inline std::vector<int64_t> check_choice(const Scene& s, const Results& scored, const Results& got, int64_t b,
                                         int64_t chooser) {
  const Ranking r = rank_rows(s, scored, b, chooser);
  const std::vector<int64_t> shown = s.visible_rows(b), forced = forced_rows(s, b);
  const std::vector<int64_t> rows =
      rows_in(got.indices, got.counts, b * s.choosers() + chooser, s.call.indices_width);
  const auto count = static_cast<int64_t>(rows.size());
  const auto [low, high] = wanted_rows(s, r, b);
  if (count < low || count > high)
    fail("%lld rows read, should be %lld..%lld", static_cast<long long>(count), static_cast<long long>(low),
         static_cast<long long>(high));
  if (!std::includes(shown.begin(), shown.end(), rows.begin(), rows.end())) fail("a hidden row is read");
  const std::vector<int64_t> best = best_rows(r.value, shown, forced, count);
  if (r.exact || rows.size() <= forced.size()) {
    if (rows != best)
      fail("not the best %lld rows of chooser %lld", static_cast<long long>(count),
           static_cast<long long>(chooser));
  } else {
    check_band(r, rows, shown, forced);
    check_ties(s, scored, b, chooser, rows, forced);
  }
  return rows;
}

// loki_choose ------------------------------------------------------------------------------------

struct Choosing {
  loki_choose_call call{};
  Buffer scores, visible, forced, indices, counts;
  std::vector<int64_t> wanted;
};

inline double draw_score(Random& random, int taste) {
  if (taste == 0) return random.normal();
  if (taste == 1) return static_cast<double>(random.between(-2, 2)) * (random.chance(0.5) ? 1.0 : -1.0);
  if (taste == 2) return 1.5;
  const double odd[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0, 3.4028234663852886e38, 1e-45, 1.0};
  return odd[random.between(0, 7)];
}

inline Buffer draw_marks(Random& random, const loki_choose_call& c, double density, int64_t* batch_stride,
                         int64_t* head_stride) {
  const int64_t row = c.seq + random.between(0, 3);
  const bool each_head = random.chance(0.5), each_batch = random.chance(0.5);
  *head_stride = each_head ? row : 0;
  *batch_stride = each_batch ? row * (each_head ? c.choosers : 1) : 0;
  const int64_t rows = (each_head ? c.choosers : 1) * (each_batch ? c.batch : 1);
  Buffer marks((rows - 1) * row + c.seq);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t t = 0; t < c.seq; ++t)
      *marks.as<uint8_t>(i * row + t) =
          static_cast<uint8_t>(random.chance(density) ? random.between(1, 255) : 0);
  return marks;
}

inline void draw_choosing(Random& random, Choosing* x) {
  loki_choose_call& c = x->call;
  c.batch = random.between(1, 3);
  c.choosers = random.between(1, 9);
  c.seq = draw_seq(random);
  c.mass = random.chance(0.3) ? (random.chance(0.2) ? 1.0 : random.share()) : 0.0;
  c.scores_head_stride = 4 * (c.seq + random.between(0, 4));
  c.scores_batch_stride = c.choosers * c.scores_head_stride + 4 * random.between(0, 4);
  x->scores =
      Buffer((c.batch - 1) * c.scores_batch_stride + (c.choosers - 1) * c.scores_head_stride + 4 * c.seq);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.choosers; ++h) {
      const int taste = static_cast<int>(random.between(0, 3));
      char* row = x->scores.as<char>(b * c.scores_batch_stride + h * c.scores_head_stride);
      for (int64_t t = 0; t < c.seq; ++t)
        put_number(row, LOKI_F32, t,
                   c.mass > 0.0 ? exp(-5.0 * fabs(random.normal())) : draw_score(random, taste));
    }
  if (c.mass == 0.0 && random.chance(0.5)) {
    x->visible = draw_marks(random, c, random.share(), &c.visible_batch_stride, &c.visible_head_stride);
    c.visible = x->visible.as<uint8_t>();
  }
  if (random.chance(0.6)) {
    x->forced = draw_marks(random, c, random.share() * 0.3, &c.forced_batch_stride, &c.forced_head_stride);
    c.forced = x->forced.as<uint8_t>();
  }
  for (int64_t i = 0; i < c.batch * c.choosers; ++i)
    x->wanted.push_back(random.between(0, random.chance(0.5) ? c.seq + 10 : c.seq / 10 + 1));
  c.wanted = x->wanted.data();
  c.indices_width = random.between(1, c.seq + 5);
  c.scores = x->scores.as<float>();
}

inline void check_chosen_row(const Choosing& x, int64_t b, int64_t h) {
  const loki_choose_call& c = x.call;
  const char* row = x.scores.as<char>(b * c.scores_batch_stride + h * c.scores_head_stride);
  std::vector<double> value;
  std::vector<int64_t> shown, forced;
  for (int64_t t = 0; t < c.seq; ++t) {
    const double score = number(row, LOKI_F32, t), most = format_of(LOKI_F32).most;
    value.push_back(isnan(score) ? -most : std::max(-most, std::min(most, score)));
    if (c.visible != nullptr && !c.visible[b * c.visible_batch_stride + h * c.visible_head_stride + t])
      continue;
    shown.push_back(t);
    if (c.forced != nullptr && c.forced[b * c.forced_batch_stride + h * c.forced_head_stride + t])
      forced.push_back(t);
  }
  const int64_t slot = b * c.choosers + h;
  if (c.mass > 0.0) {
    double total = 0.0;
    for (const double w : value) total += w;
    const int64_t got = *x.counts.as<int64_t>(slot * 8);
    const int64_t low = rows_for(value, forced, c.mass * total * (1.0 - 2e-9), c.seq);
    const int64_t high = rows_for(value, forced, c.mass * total * (1.0 + 1e-12), c.seq);
    if (got < low || got > high)
      fail("a mass takes %lld rows, should be %lld..%lld", static_cast<long long>(got),
           static_cast<long long>(low), static_cast<long long>(high));
    return;
  }
  const int64_t count =
      std::min({x.wanted[static_cast<size_t>(slot)], static_cast<int64_t>(shown.size()), c.indices_width});
  if (rows_in(x.indices, x.counts, slot, c.indices_width) != best_rows(value, shown, forced, count))
    fail("not the best %lld rows of %lld", static_cast<long long>(count), static_cast<long long>(c.seq));
}

inline std::string describe(const Choosing& x) {
  const loki_choose_call& c = x.call;
  char text[200];
  snprintf(text, sizeof text, "batch %lld choosers %lld seq %lld mass %g visible %d forced %d width %lld",
           static_cast<long long>(c.batch), static_cast<long long>(c.choosers), static_cast<long long>(c.seq),
           c.mass, c.visible != nullptr, c.forced != nullptr, static_cast<long long>(c.indices_width));
  return text;
}

}  // namespace loki_test
