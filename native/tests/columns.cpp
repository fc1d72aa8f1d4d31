// Columns of attention and bits that differ, against the textbook in double: arrays of exact size, so
// that a sanitizer sees whoever leaves them, and NaN wherever nothing may be read.
//
//   columns [seed] [rounds]
#include <stdio.h>
#include <stdlib.h>

#include "draw.h"

namespace loki_test {
namespace {

struct Columns {
  loki_column_call call{};
  Buffer keys, query, visible, sinks, bias, out;

  int64_t heads() const { return call.kv_heads * call.group; }
  bool shown(int64_t b, int64_t h, int64_t i, int64_t t) const {
    if (call.visible == nullptr) return t <= call.seq - call.q_len + i;
    return call.visible[b * call.visible_batch_stride + h * call.visible_head_stride +
                        i * call.visible_row_stride + t] != 0;
  }
  // Whether any query that counts sees a row.
  bool read(int64_t b, int64_t h, int64_t t) const {
    for (int64_t i = call.q_len - call.window; i < call.q_len; ++i)
      if (shown(b, h, i, t)) return true;
    return false;
  }
};

void draw_mask(Random& random, Columns* s) {
  loki_column_call& c = s->call;
  const bool alike = random.chance(0.5), headless = random.chance(0.5);
  c.visible_row_stride = c.seq + random.between(0, 3);
  const int64_t heads = headless ? 1 : c.kv_heads, batch = alike ? 1 : c.batch;
  c.visible_head_stride = headless ? 0 : c.q_len * c.visible_row_stride;
  c.visible_batch_stride = alike ? 0 : heads * c.q_len * c.visible_row_stride;
  s->visible = Buffer((batch * heads * c.q_len - 1) * c.visible_row_stride + c.seq, 0);
  const double share = random.chance(0.2) ? 0.01 : 0.6;
  for (int64_t i = 0; i < s->visible.size(); ++i)
    *s->visible.as<uint8_t>(i) = random.chance(share) ? static_cast<uint8_t>(random.between(1, 255)) : 0;
  c.visible = s->visible.as<uint8_t>();
}

// Rows [batch, heads, rows, dim] with gaps; those that `wanted` does not name stay NaN.
template <typename Wanted>
Buffer draw_numbers(Random& random, int64_t batch, int64_t heads, int64_t rows, int64_t dim, int64_t dtype,
                    int64_t* batch_stride, int64_t* head_stride, int64_t* row_stride, Wanted wanted) {
  const int64_t bytes = bytes_of(dtype);
  *row_stride = bytes * (dim + random.between(0, 5));
  *head_stride = rows * *row_stride + bytes * random.between(0, 5);
  *batch_stride = heads * *head_stride;
  Buffer all((batch - 1) * *batch_stride + (heads - 1) * *head_stride + (rows - 1) * *row_stride + dim * bytes);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < rows; ++t)
        for (int64_t d = 0; d < dim && wanted(b, h, t); ++d)
          put_number(all.as<char>(b * *batch_stride + h * *head_stride + t * *row_stride), dtype, d, random.normal());
  return all;
}

void draw_columns(Random& random, Columns* s) {
  loki_column_call& c = s->call;
  c.batch = random.between(1, 2);
  c.kv_heads = random.between(1, 2);
  c.group = random.between(1, 4);
  c.seq = random.chance(0.3) ? 512 * random.between(1, 2) + random.between(-2, 2) : random.between(1, 200);
  const bool masked = random.chance(0.5);
  c.q_len = random.between(1, masked || c.seq > 40 ? 40 : c.seq);
  c.window = random.chance(0.5) ? c.q_len : random.between(1, c.q_len);
  if (masked) draw_mask(random, s);
  c.keys.dim = random.chance(0.5) ? 64 : random.between(1, 100);
  c.keys.dtype = random.between(LOKI_F32, LOKI_F16);
  c.query_dtype = random.chance(0.7) ? c.keys.dtype : random.between(LOKI_F32, LOKI_F16);
  s->keys = draw_numbers(random, c.batch, c.kv_heads, c.seq, c.keys.dim, c.keys.dtype, &c.keys.batch_stride,
                         &c.keys.head_stride, &c.keys.row_stride,
                         [&](int64_t b, int64_t h, int64_t t) { return s->read(b, h, t); });
  s->query = draw_numbers(random, c.batch, s->heads(), c.q_len, c.keys.dim, c.query_dtype,
                          &c.query_batch_stride, &c.query_head_stride, &c.query_row_stride,
                          [&](int64_t, int64_t, int64_t i) { return i >= c.q_len - c.window; });
  c.keys.data = s->keys.as<char>();
  c.query = s->query.as<char>();
  c.scaling = 1.0 / sqrt(static_cast<double>(c.keys.dim));
  c.softcap = random.chance(0.3) ? 1.0 + 10.0 * random.share() : 0.0;
  c.largest = random.chance(0.3);
  if (random.chance(0.4)) {
    int64_t row_stride;
    s->bias = draw_numbers(random, c.batch, c.kv_heads, 1, c.seq, LOKI_F32, &c.bias_batch_stride,
                           &c.bias_head_stride, &row_stride, [](int64_t, int64_t, int64_t) { return true; });
    c.bias = s->bias.as<float>();
  }
  if (random.chance(0.4)) {
    s->sinks = Buffer(4 * s->heads());
    for (int64_t h = 0; h < s->heads(); ++h) put_number(s->sinks.as<char>(), LOKI_F32, h, random.normal());
    c.sink_logits = s->sinks.as<float>();
  }
  s->out = Buffer(4 * c.batch * s->heads() * c.seq);
  c.out = s->out.as<float>();
}

// The weights of one query, added to `sums` or kept where larger.
void naive_query(const Columns& s, int64_t b, int64_t head, int64_t i, std::vector<double>* sums) {
  const loki_column_call& c = s.call;
  const int64_t kv = head / c.group;
  const char* q = static_cast<const char*>(c.query) + b * c.query_batch_stride + head * c.query_head_stride +
                  i * c.query_row_stride;
  std::vector<double> logits(static_cast<size_t>(c.seq), -INFINITY);
  double peak = c.sink_logits == nullptr ? -INFINITY : static_cast<double>(c.sink_logits[head]);
  for (int64_t t = 0; t < c.seq; ++t) {
    if (!s.shown(b, kv, i, t)) continue;
    const char* k = static_cast<const char*>(c.keys.data) + b * c.keys.batch_stride +
                    kv * c.keys.head_stride + t * c.keys.row_stride;
    double x = 0.0;
    for (int64_t d = 0; d < c.keys.dim; ++d) x += number(q, c.query_dtype, d) * number(k, c.keys.dtype, d);
    x *= c.scaling;
    if (c.softcap != 0.0) x = c.softcap * tanh(x / c.softcap);
    if (c.bias != nullptr)
      x += number(reinterpret_cast<const char*>(c.bias) + b * c.bias_batch_stride + kv * c.bias_head_stride,
                  LOKI_F32, t);
    logits[static_cast<size_t>(t)] = x;
    peak = x > peak ? x : peak;
  }
  if (peak == -INFINITY) return;
  double total = c.sink_logits == nullptr ? 0.0 : exp(static_cast<double>(c.sink_logits[head]) - peak);
  for (const double x : logits) total += exp(x - peak);
  for (size_t t = 0; t < logits.size(); ++t) {
    const double weight = exp(logits[t] - peak) / total;
    (*sums)[t] = c.largest ? (weight > (*sums)[t] ? weight : (*sums)[t]) : (*sums)[t] + weight;
  }
}

void check_columns(const Columns& s) {
  const loki_column_call& c = s.call;
  if (const int bad = loki_column_sums(&c)) fail("column_sums returned %d", bad);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < s.heads(); ++h) {
      std::vector<double> sums(static_cast<size_t>(c.seq), 0.0);
      for (int64_t i = c.q_len - c.window; i < c.q_len; ++i) naive_query(s, b, h, i, &sums);
      for (int64_t t = 0; t < c.seq; ++t) {
        const double got = static_cast<double>(c.out[(b * s.heads() + h) * c.seq + t]);
        const double wanted = sums[static_cast<size_t>(t)];
        if (!(fabs(got - wanted) <= 2e-5 * wanted + 1e-30))
          fail("column %lld of head %lld is %.9g, should be %.9g", static_cast<long long>(t),
               static_cast<long long>(h), got, wanted);
      }
    }
}

void check_hamming(Random& random) {
  loki_hamming_call c{};
  c.batch = random.between(1, 2);
  c.kv_heads = random.between(1, 2);
  c.group = random.between(1, 3);
  c.seq = random.between(1, random.chance(0.2) ? 1100 : 60);
  c.q_len = random.between(1, 3);
  c.words = random.chance(0.5) ? 4 : random.between(1, 9);
  const int64_t heads = c.kv_heads * c.group;
  const auto draw = [&](int64_t rows, int64_t per, int64_t* batch, int64_t* head, int64_t* row) {
    *row = 4 * (c.words + (random.chance(0.3) ? random.between(1, 3) : 0));
    *head = per * *row;
    *batch = rows * *head;
    Buffer all((c.batch * rows * per - 1) * *row + 4 * c.words);
    for (int64_t i = 0; i < all.size(); ++i) *all.as<uint8_t>(i) = static_cast<uint8_t>(random.between(0, 255));
    return all;
  };
  const Buffer query = draw(heads, c.q_len, &c.query_batch_stride, &c.query_head_stride, &c.query_row_stride);
  const Buffer codes = draw(c.kv_heads, c.seq, &c.codes_batch_stride, &c.codes_head_stride, &c.codes_row_stride);
  const Buffer out(4 * c.batch * heads * c.q_len * c.seq);
  c.query = query.as<int32_t>();
  c.codes = codes.as<int32_t>();
  c.out = out.as<float>();
  if (const int bad = loki_hamming(&c)) fail("hamming returned %d", bad);
  for (int64_t place = 0; place < c.batch * heads * c.q_len * c.seq; ++place) {
    const int64_t t = place % c.seq, i = place / c.seq % c.q_len, h = place / c.seq / c.q_len % heads;
    const int64_t b = place / c.seq / c.q_len / heads;
    const int64_t q = b * c.query_batch_stride + h * c.query_head_stride + i * c.query_row_stride;
    const int64_t k = b * c.codes_batch_stride + h / c.group * c.codes_head_stride + t * c.codes_row_stride;
    int bits = 0;
    for (int64_t byte = 0; byte < 4 * c.words; ++byte)
      for (int x = *query.as<uint8_t>(q + byte) ^ *codes.as<uint8_t>(k + byte); x != 0; x >>= 1) bits += x & 1;
    if (c.out[place] != static_cast<float>(bits))
      fail("%g bits differ at %lld, should be %d", static_cast<double>(c.out[place]),
           static_cast<long long>(place), bits);
  }
}

}  // namespace
}  // namespace loki_test

int main(int argc, char** argv) {
  using namespace loki_test;
  const uint64_t seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1;
  const uint64_t rounds = argc > 2 ? strtoull(argv[2], nullptr, 10) : 40;
  std::string left = loki_isas();
  loki_set_threads(2);
  while (!left.empty()) {
    const std::string isa = left.substr(0, left.find(','));
    left = left.size() == isa.size() ? "" : left.substr(isa.size() + 1);
    if (loki_set_isa(isa.c_str())) return 1;
    for (uint64_t i = 0; i < rounds; ++i) {
      Random random(seed * 0x9e3779b97f4a7c15u + i);
      Columns columns;
      draw_columns(random, &columns);
      try {
        check_columns(columns);
        check_hamming(random);
      } catch (const std::exception& e) {
        fprintf(stderr, "%s on %s, round %llu of seed %llu\n", e.what(), isa.c_str(),
                static_cast<unsigned long long>(i), static_cast<unsigned long long>(seed));
        return 1;
      }
    }
  }
  printf("%llu rounds on %s\n", static_cast<unsigned long long>(rounds), loki_isas());
  return 0;
}
