// What a call must return, in double precision, straight from the contract in loki_attn.h; and how far
// a result in float32 may lie from it.
//
// The budgets are worst cases of first principles, for any order of the sums. With u = 2^-24:
//   - a dot product of n products errs by at most (n + 2) u sum|q k|, whatever is fused or paired;
//   - a logit x errs by that much times |scaling|, and 3 u |x| for its factors; a soft-cap c adds 16 u c;
//   - exp(x - peak) errs relatively by twice u |x - peak| (chunk and whole have a peak each) and 10 u;
//   - a sum of 512 weights, or of 512 weighted values, errs by 512 u of the sum of its magnitudes;
//   - weights below e^-87 of the largest may vanish; bfloat16 products may take denormals for 0.
// A weight is a quotient of exponentials, so errors d of the exponents grow it by exp(d + D) at most,
// D being the log of the weighted mean of exp(d). The output is the rounding of something so near.
#pragma once

#include <algorithm>

#include "scene.h"

namespace loki_test {

constexpr double kUnit = 0x1p-24;
constexpr double kVanished = 2.4e-38;  // above e^-87 and the smallest normal number

// Largest error seen, as a share of what is allowed.
inline double compare(const char* what, double got, double wanted, double allowed, int64_t i) {
  if (got == wanted) return 0.0;
  const double error = fabs(got - wanted);
  if (error <= allowed) return error / allowed;
  fail("%s[%lld] is %.9g, should be %.9g within %.3g", what, static_cast<long long>(i), got, wanted, allowed);
}

inline double dot_error(int64_t n, double magnitude, double inputs) {
  const double terms = static_cast<double>(n);
  return (terms + 2.0) * kUnit * magnitude + 0x1p-126 * (inputs + 2.0 * terms);
}

// A dot product of any two vectors; without error where every partial sum of it is a float32.
class Dot {
 public:
  void add(double x, double y) {
    sum_ += x * y;
    magnitude_ += fabs(x * y);
    inputs_ += fabs(x) + fabs(y);
    grain_ = fmin(grain_, grain(x * y));
    ++terms_;
  }
  double value() const { return sum_; }
  double error() const {
    const bool exact = magnitude_ <= 0x1p24 * grain_ && grain_ >= 0x1p-126;
    return exact ? 0.0 : dot_error(terms_, magnitude_, inputs_);
  }

 private:
  double sum_ = 0.0, magnitude_ = 0.0, inputs_ = 0.0, grain_ = INFINITY;
  int64_t terms_ = 0;
};

// A logit from a dot product and the error of that.
struct Logit {
  double value, error;
  void scale(double by) {
    value *= by;
    error = error * fabs(by) + 3.0 * kUnit * fabs(value) + 0x1p-148;
  }
  void cap(double at) {
    if (at == 0.0) return;
    value = at * tanh(value / at);
    error += 16.0 * kUnit * at;
  }
};

// Soft-max ---------------------------------------------------------------------------------------

struct Weights {
  std::vector<double> value, relative_error;  // relative to the total, sink logit included
  double log_sum_exp = -INFINITY, log_error = 0.0;
};

inline Weights soft_max(const std::vector<Logit>& logits, const float* sink) {
  Weights w;
  double peak = sink == nullptr ? -INFINITY : static_cast<double>(*sink);
  for (const Logit& x : logits) peak = std::max(peak, x.value);
  if (peak == -INFINITY) return w;
  double total = sink == nullptr ? 0.0 : exp(static_cast<double>(*sink) - peak), grown = total;
  std::vector<double> error;
  for (const Logit& x : logits) {
    error.push_back(x.error + kUnit * (2.0 * fabs(x.value - peak) + 10.0));
    total += exp(x.value - peak);
    grown += exp(x.value - peak + error.back());
  }
  const double chunks = static_cast<double>(logits.size()) / 512.0;
  w.log_sum_exp = peak + log(total);
  w.log_error = log(grown / total) + (520.0 + chunks) * kUnit + kUnit * fabs(w.log_sum_exp);
  for (size_t i = 0; i < logits.size(); ++i) {
    w.value.push_back(exp(logits[i].value - peak) / total);
    w.relative_error.push_back(expm1(error[i] + log(grown / total)) + (1040.0 + chunks) * kUnit);
  }
  return w;
}

// Attention --------------------------------------------------------------------------------------

// Rows of one KV head as doubles; hidden ones may be anything.
inline std::vector<double> plain_rows(const Scene& s, const loki_rows& rows, const Rows& store, int64_t b,
                                      int64_t kv_head, int64_t dim) {
  std::vector<double> out;
  out.reserve(static_cast<size_t>(s.length(b) * dim));
  for (int64_t t = 0; t < s.length(b); ++t) {
    const char* row = store.at(s.pages, b, kv_head, t);
    for (int64_t i = 0; i < dim; ++i) out.push_back(number(row, rows.dtype, i));
  }
  return out;
}

inline std::vector<double> query_of(const Scene& s, int64_t b, int64_t head) {
  const char* at = s.query.as<char>(b * s.call.query_batch_stride + head * s.call.query_head_stride);
  std::vector<double> q;
  for (int64_t i = 0; i < s.call.keys.dim; ++i) q.push_back(number(at, s.call.query_dtype, i));
  return q;
}

inline Logit exact_logit(const double* q, const double* k, int64_t dim, double scaling, double cap) {
  double sum = 0.0, magnitude = 0.0, inputs = 0.0;
  for (int64_t i = 0; i < dim; ++i) {
    sum += q[i] * k[i];
    magnitude += fabs(q[i] * k[i]);
    inputs += fabs(q[i]) + fabs(k[i]);
  }
  Logit logit{sum, dot_error(dim, magnitude, inputs)};
  logit.scale(scaling);
  logit.cap(cap);
  return logit;
}

// Where a call writes.
struct Results {
  Buffer out, log_sum_exp, column_sums, indices, counts, scores;

  explicit Results(const Scene& s) {
    const loki_call& c = s.call;
    const int64_t heads = c.batch * s.heads();
    out = Buffer(heads * c.values.dim * bytes_of(c.query_dtype));
    log_sum_exp = Buffer(heads * 4);
    column_sums = Buffer(c.batch * c.kv_heads * c.seq * 4);
    indices = Buffer(c.batch * s.choosers() * c.indices_width * 8);
    counts = Buffer(c.batch * s.choosers() * 8);
    scores = Buffer(heads * c.seq * 4);
  }
  // The name of an array whose bytes differ; null if none does.
  const char* differs(const Results& o) const {
    return !(out == o.out)                   ? "out"
           : !(log_sum_exp == o.log_sum_exp) ? "log_sum_exp"
           : !(column_sums == o.column_sums) ? "column_sums"
           : !(indices == o.indices)         ? "indices"
           : !(counts == o.counts)           ? "counts"
           : !(scores == o.scores)           ? "scores"
                                             : nullptr;
  }
  loki_call into(const loki_call& call) const {
    loki_call c = call;
    c.out = out.as<char>();
    c.log_sum_exp = log_sum_exp.as<float>();
    c.column_sums = nullptr;
    c.indices = indices.as<int64_t>();
    c.counts = counts.as<int64_t>();
    c.scores = scores.as<float>();
    return c;
  }
};

// Keys and values of one KV head.
struct Head {
  std::vector<double> keys, values;
  Head(const Scene& s, int64_t b, int64_t kv_head)
      : keys(plain_rows(s, s.call.keys, s.keys, b, kv_head, s.call.keys.dim)),
        values(plain_rows(s, s.call.values, s.values, b, kv_head, s.call.values.dim)) {}
};

// Compares one head's output and log-sum-exp with attention to `rows`; returns the share of the budget.
inline double check_attention(const Scene& s, const Results& got, const Head& head, int64_t b, int64_t h,
                              const std::vector<int64_t>& rows, Weights* weights) {
  const loki_call& c = s.call;
  const std::vector<double> q = query_of(s, b, h);
  std::vector<Logit> logits;
  for (const int64_t t : rows)
    logits.push_back(
        exact_logit(q.data(), head.keys.data() + t * c.keys.dim, c.keys.dim, c.scaling, c.softcap));
  *weights = soft_max(logits, c.sink_logits == nullptr ? nullptr : c.sink_logits + h);
  const int64_t place = b * s.heads() + h, dim = c.values.dim;
  std::vector<double> out(static_cast<size_t>(dim), 0.0), allowed(static_cast<size_t>(dim), 0.0);
  for (size_t i = 0; i < rows.size(); ++i) {
    const double w = weights->value[i], error = w * weights->relative_error[i] + kVanished;
    const double* v = head.values.data() + rows[i] * dim;
    for (int64_t d = 0; d < dim; ++d) {
      out[static_cast<size_t>(d)] += w * v[d];
      allowed[static_cast<size_t>(d)] += error * fabs(v[d]);
    }
  }
  double worst = 0.0;
  for (int64_t d = 0; d < dim; ++d) {
    const double x = out[static_cast<size_t>(d)],
                 y = number(got.out.as<char>(), c.query_dtype, place * dim + d);
    // One row alone has the weight 1.
    const double near =
        rows.size() == 1 && c.sink_logits == nullptr
            ? 0.0
            : allowed[static_cast<size_t>(d)] + kUnit * fabs(x) + static_cast<double>(rows.size()) * 0x1p-149;
    const double low = rounded(x - near, c.query_dtype), high = rounded(x + near, c.query_dtype);
    if (!(y >= low && y <= high))
      fail("out[%lld] is %.9g, should be %.9g..%.9g", static_cast<long long>(place * dim + d), y, low, high);
    if (c.query_dtype == LOKI_F32 && near > 0.0) worst = std::max(worst, fabs(y - x) / near);
  }
  return std::max(worst, compare("log_sum_exp", number(got.log_sum_exp.as<char>(), LOKI_F32, place),
                                 weights->log_sum_exp, weights->log_error, place));
}

inline double check_column_sums(const Scene& s, const Results& got, int64_t b, int64_t kv_head,
                                const std::vector<int64_t>& rows, const std::vector<Weights>& heads) {
  std::vector<double> sums(static_cast<size_t>(s.call.seq), 0.0), allowed(sums.size(), 0.0);
  for (const Weights& w : heads)
    for (size_t i = 0; i < rows.size(); ++i) {
      const double extra = (static_cast<double>(heads.size()) + 2.0) * kUnit;
      sums[static_cast<size_t>(rows[i])] += w.value[i];
      allowed[static_cast<size_t>(rows[i])] += w.value[i] * (w.relative_error[i] + extra) + kVanished;
    }
  double worst = 0.0;
  for (int64_t t = 0; t < s.call.seq; ++t) {
    const int64_t place = (b * s.call.kv_heads + kv_head) * s.call.seq + t;
    worst = std::max(worst, compare("column_sums", number(got.column_sums.as<char>(), LOKI_F32, place),
                                    sums[static_cast<size_t>(t)], allowed[static_cast<size_t>(t)], place));
  }
  return worst;
}

// Scores -----------------------------------------------------------------------------------------

// A query as the lead plane meets it: coordinate = code * step, give or take what a projection in
// float32 may change, roundings included.
struct LeadQuery {
  std::vector<double> code, slack;
  double step = 1.0, relative = 0.0;  // of the step
  bool exact = true;                  // no projection: every bit is known
};

inline LeadQuery round_to_codes(const std::vector<double>& x, const std::vector<double>& error) {
  LeadQuery q;
  double peak = 0.0, loose = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    peak = std::max(peak, fabs(x[i]));
    loose = std::max(loose, error[i]);
  }
  q.exact = loose == 0.0;
  const float step = single(peak) / 127.0f;
  q.step = step >= 0x1p-126f ? static_cast<double>(step) : 1.0;
  q.relative = q.exact ? 0.0 : loose / peak + 2.0 * kUnit;
  for (size_t i = 0; i < x.size(); ++i) {
    const double ratio = q.exact ? static_cast<double>(single(x[i]) / single(q.step)) : x[i] / q.step;
    const double near = error[i] / q.step + fabs(ratio) * 2.0 * q.relative;
    const double code = nearbyint(ratio);
    q.code.push_back(code);
    q.slack.push_back(std::max(nearbyint(ratio + near) - code, code - nearbyint(ratio - near)));
  }
  return q;
}

inline LeadQuery lead_query_of(const Scene& s, int64_t b, int64_t head) {
  const loki_call& c = s.call;
  const char* at = s.lead_query.as<char>(b * c.lead_query_batch_stride + head * c.lead_query_head_stride);
  const auto rank = static_cast<size_t>(c.lead_rank);
  std::vector<double> x(rank, 0.0), error(rank, 0.0);
  for (size_t j = 0; j < rank; ++j) {
    if (c.query_map == nullptr) {
      x[j] = number(at, c.lead_query_dtype, static_cast<int64_t>(j));
      continue;
    }
    Dot dot;
    for (int64_t i = 0; i < c.keys.dim; ++i)
      dot.add(number(at, c.lead_query_dtype, i),
              static_cast<double>(
                  c.query_map[(head / c.group * c.keys.dim + i) * c.lead_rank + static_cast<int64_t>(j)]));
    x[j] = dot.value();
    error[j] = dot.error();
  }
  if (s.tiled() && holds_codes(c.lead.dtype)) return round_to_codes(x, error);
  LeadQuery q;
  q.exact = false;
  for (size_t j = 0; j < rank; ++j) {
    const bool narrow = s.tiled() && c.lead.dtype == LOKI_BF16;
    const double code = narrow ? rounded(x[j], LOKI_BF16) : x[j];
    q.code.push_back(code);
    q.slack.push_back(!narrow ? error[j]
                              : std::max(rounded(x[j] + error[j], LOKI_BF16) - code,
                                         code - rounded(x[j] - error[j], LOKI_BF16)));
  }
  return q;
}

// Lead coordinates of one KV head's rows, and the factors of their codes.
inline std::vector<double> lead_rows(const Scene& s, int64_t b, int64_t kv_head) {
  const loki_call& c = s.call;
  if (!s.tiled()) return plain_rows(s, c.lead, s.lead_is_keys ? s.keys : s.lead, b, kv_head, c.lead_rank);
  std::vector<double> rows;
  for (int64_t t = 0; t < s.length(b); ++t)
    for (int64_t i = 0; i < c.lead_rank; ++i)
      rows.push_back(tile_number(s.lead.at(s.pages, b, kv_head, t), c.lead.dtype, t % 16, i));
  return rows;
}

// Codes against codes: the product is exact, and so is every rounding after it.
inline double code_logit(const loki_call& c, const LeadQuery& q, double dot, double scale) {
  const float factor = single(q.step) * single(c.scaling);
  return static_cast<double>(single(dot) * factor * single(scale));
}

inline double check_scores(const Scene& s, const Results& got, int64_t b, int64_t kv_head) {
  const loki_call& c = s.call;
  const std::vector<double> rows = lead_rows(s, b, kv_head);
  const bool codes = s.tiled() && holds_codes(c.lead.dtype);
  double worst = 0.0;
  for (int64_t head = kv_head * c.group; head < (kv_head + 1) * c.group; ++head) {
    const LeadQuery q = lead_query_of(s, b, head);
    for (const int64_t t : s.visible_rows(b)) {
      const double* row = rows.data() + t * c.lead_rank;
      const double scale = codes ? number(s.scales.at(s.pages, b, kv_head, t), LOKI_F16, 0) : 1.0;
      double dot = 0.0, magnitude = 0.0, inputs = 0.0, slack = 0.0;
      for (int64_t i = 0; i < c.lead_rank; ++i) {
        const auto j = static_cast<size_t>(i);
        dot += q.code[j] * row[i];
        magnitude += fabs(q.code[j] * row[i]);
        inputs += fabs(q.code[j]) + fabs(row[i]);
        slack += q.slack[j] * fabs(row[i]);
      }
      Logit logit{dot, slack + (codes ? 0.0 : dot_error(c.lead_rank, magnitude + slack, inputs))};
      if (codes) {
        logit.error += fabs(dot) * q.relative;
        logit.scale(q.step * scale * c.scaling);
        if (q.exact) logit = {code_logit(c, q, dot, scale), 0.0};
      } else {
        logit.scale(c.scaling);
      }
      logit.cap(c.softcap);
      const int64_t place = (b * s.heads() + head) * c.seq + t;
      worst = std::max(worst, compare("scores", number(got.scores.as<char>(), LOKI_F32, place), logit.value,
                                      logit.error, place));
    }
  }
  return worst;
}

}  // namespace loki_test
