// One random attention call: its arrays, with NaN or huge numbers wherever nothing may be read.
#pragma once

#include <stdio.h>

#include "draw.h"

namespace loki_test {

struct Scene {
  loki_call call{};
  Pages pages;
  std::vector<int64_t> lengths, wanted;
  Rows keys, values, lead, scales;
  Buffer query, lead_query, query_map, visible, sink_logits;
  bool lead_is_keys = false;

  int64_t heads() const { return call.kv_heads * call.group; }
  int64_t length(int64_t b) const { return lengths.empty() ? call.seq : lengths[static_cast<size_t>(b)]; }
  bool shown(int64_t b, int64_t t) const {
    return call.visible == nullptr || call.visible[b * call.visible_batch_stride + t] != 0;
  }
  bool alone() const { return call.reduce == LOKI_REDUCE_NONE && call.group > 1; }
  int64_t choosers() const { return alone() ? heads() : call.kv_heads; }
  bool tiled() const { return call.lead_kind == LOKI_LEAD_TILES; }
  std::vector<int64_t> visible_rows(int64_t b) const {
    std::vector<int64_t> rows;
    for (int64_t t = 0; t < length(b); ++t)
      if (shown(b, t)) rows.push_back(t);
    return rows;
  }
};

inline int64_t draw_dim(Random& random) {
  return random.chance(0.5) ? random.pick({64, 80, 96, 128}) : random.between(1, random.chance(0.5) ? 40 : 256);
}

inline int64_t draw_seq(Random& random) {
  const double p = random.share();
  if (p < 0.05) return 1;
  const int64_t round = p < 0.5 ? 16 * random.between(1, 60) : 512 * random.between(1, 5);
  const int64_t seq = round + random.between(-3, 3);
  return random.chance(0.2) ? random.between(1, 3000) : seq < 1 ? 1 : seq;
}

inline void draw_sizes(Random& random, Scene* s) {
  loki_call& c = s->call;
  c.batch = random.pick({1, 1, 1, 2, 3});
  c.kv_heads = random.between(1, 3);
  c.group = random.chance(0.3) ? 1 : random.between(1, 9);
  c.seq = draw_seq(random);
  s->keys.rows.dim = draw_dim(random);
  s->values.rows.dim = random.chance(0.7) ? s->keys.rows.dim : draw_dim(random);
  const int64_t most = random.chance(0.1) ? 6000000 : 1500000;
  while (c.batch * s->heads() * c.seq * (s->keys.rows.dim + s->values.rows.dim) > most) {
    if (c.batch > 1) --c.batch;
    else if (c.kv_heads > 1) --c.kv_heads;
    else if (c.group > 4) --c.group;
    else c.seq = (c.seq + 1) / 2;
  }
  if (random.chance(0.3)) {
    for (int64_t b = 0; b < c.batch; ++b)
      s->lengths.push_back(random.chance(0.1) ? 0 : random.between(0, c.seq));
    c.lengths = s->lengths.data();
  }
  if (random.chance(0.35)) {
    s->pages = Pages::draw(random, c.batch, c.seq);
    c.block_table = s->pages.table.data();
    c.table_stride = s->pages.stride;
    c.page_size = s->pages.size;
  }
  c.scaling = 1.0 / sqrt(static_cast<double>(s->keys.rows.dim)) * (random.chance(0.1) ? 5.0 : 1.0);
  c.softcap = random.chance(0.25) ? 1.0 + 40.0 * random.share() : 0.0;
}

inline void draw_visible(Random& random, Scene* s) {
  loki_call& c = s->call;
  if (!random.chance(0.4)) return;
  const bool shared = random.chance(0.4);
  const int64_t stride = c.seq + random.between(0, 5), masks = shared ? 1 : c.batch;
  s->visible = Buffer((masks - 1) * stride + c.seq, 0xff);
  const double density = static_cast<double>(random.pick({0, 3, 50, 90, 100})) / 100.0;
  const int64_t blank = random.chance(0.3) ? 600 : 0;  // a whole chunk without a row to see
  for (int64_t b = 0; b < masks; ++b)
    for (int64_t t = 0; t < c.seq; ++t)
      *s->visible.as<uint8_t>(b * stride + t) =
          static_cast<uint8_t>(t >= blank && random.chance(density) ? random.between(1, 255) : 0);
  c.visible = s->visible.as<uint8_t>();
  c.visible_batch_stride = shared ? 0 : stride;
}

// Rows of random numbers; where `spoil`, hidden ones stay what they may be: anything.
inline void fill_rows(Random& random, const Scene& s, Rows* to, int64_t dtype, int64_t filled, bool spoil) {
  const Taste taste = draw_taste(random);
  for (int64_t b = 0; b < s.call.batch; ++b)
    for (int64_t h = 0; h < s.call.kv_heads; ++h)
      for (int64_t t = 0; t < s.length(b); ++t) {
        if (spoil && !s.shown(b, t)) continue;
        char* row = to->at(s.pages, b, h, t);
        for (int64_t i = 0; i < filled; ++i) put_number(row, dtype, i, draw_value(random, taste, dtype));
      }
}

inline void draw_rows(Random& random, Scene* s, Rows* to, int64_t dtype, bool spoil) {
  const int64_t dim = to->rows.dim, bytes = bytes_of(dtype);
  *to = Rows::draw(random, s->pages, s->call.batch, s->call.kv_heads, s->call.seq, 1, dim * bytes, bytes);
  to->rows.dim = dim;
  to->rows.dtype = dtype;
  fill_rows(random, *s, to, dtype, dim, spoil);
}

// [batch, heads, dim] with gaps.
inline Buffer draw_query(Random& random, const Scene& s, int64_t dim, int64_t dtype, int64_t* batch_stride,
                         int64_t* head_stride, bool ties = false) {
  const int64_t bytes = bytes_of(dtype);
  *head_stride = bytes * (dim + random.between(0, 5));
  *batch_stride = s.heads() * *head_stride + bytes * random.between(0, 5);
  Buffer query((s.call.batch - 1) * *batch_stride + (s.heads() - 1) * *head_stride + dim * bytes);
  Taste taste = draw_taste(random);
  if (taste == Taste::kHuge) taste = Taste::kNormal;
  if (ties) taste = Taste::kHalves;
  for (int64_t b = 0; b < s.call.batch; ++b)
    for (int64_t h = 0; h < s.heads(); ++h) {
      char* row = query.as<char>(b * *batch_stride + h * *head_stride);
      for (int64_t i = 0; i < dim; ++i) put_number(row, dtype, i, draw_value(random, taste, dtype));
      if (taste == Taste::kHalves) put_number(row, dtype, 0, 127.0);  // its codes have the step 1
    }
  return query;
}

inline void draw_tiles(Random& random, Scene* s, int64_t kind, bool spoil) {
  loki_call& c = s->call;
  const int64_t lines = lines_for(kind, c.lead_rank), per_line = coordinates_per_line(kind);
  const int64_t limit = kind == LOKI_INT8 ? 127 : 7;
  s->lead = Rows::draw(random, s->pages, c.batch, c.kv_heads, c.seq, 16, lines * 64, 4);
  s->lead.rows.dim = lines;
  s->lead.rows.dtype = kind;
  if (s->lead.rows.row_stride < lines * 64) fail("a tile is longer than its stride");
  s->scales = Rows::draw(random, s->pages, c.batch, c.kv_heads, c.seq, 1, 2, 2, true);
  c.lead = s->lead.rows;
  c.scales = static_cast<const uint16_t*>(s->scales.rows.data);
  c.scales_batch_stride = s->scales.rows.batch_stride;
  c.scales_head_stride = s->scales.rows.head_stride;
  const Taste taste = draw_taste(random);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.kv_heads; ++h)
      for (int64_t t = 0; t < s->length(b); ++t) {
        if (spoil && !s->shown(b, t)) continue;
        char* tile = s->lead.at(s->pages, b, h, t);
        for (int64_t i = 0; i < lines * per_line; ++i) {
          const double x = i >= c.lead_rank         ? 0.0
                           : !holds_codes(kind)     ? draw_value(random, taste, kind)
                           : taste == Taste::kEqual ? 3.0
                                                    : static_cast<double>(random.between(-limit, limit));
          put_tile_number(tile, kind, t % 16, i, x);
        }
        const double scale = taste == Taste::kEqual  ? 0.25
                             : taste == Taste::kTied ? 0.125 * static_cast<double>(random.between(1, 2))
                             : taste == Taste::kTiny ? 1e-7 + 1e-6 * random.share()
                             : taste == Taste::kHuge ? 1.0 + 10.0 * random.share()
                                                     : 0.02 * random.share() + 0.001;
        put_number(s->scales.at(s->pages, b, h, t), LOKI_F16, 0, scale);
      }
}

inline void draw_lead(Random& random, Scene* s, bool spoil) {
  loki_call& c = s->call;
  const double p = random.share();
  c.lead_kind = p < 0.7 ? LOKI_LEAD_TILES : p < 0.9 ? LOKI_LEAD_ROWS : LOKI_LEAD_RECENCY;
  if (c.lead_kind == LOKI_LEAD_RECENCY) return;
  const bool mapped = random.chance(0.4);
  if (s->tiled()) {
    c.lead_rank = random.chance(0.5) ? random.pick({8, 16, 32, 64}) : random.between(1, 70);
    draw_tiles(random, s, random.pick({LOKI_INT8, LOKI_INT8, LOKI_INT4, LOKI_BF16, LOKI_F32}), spoil);
    if (!holds_codes(c.lead.dtype) && random.chance(0.8)) c.scales = nullptr;
  } else if (random.chance(0.5)) {
    s->lead_is_keys = true;
    c.lead = s->keys.rows;
    c.lead_rank = random.between(1, c.keys.dim);
  } else {
    const int64_t dtype = random.between(LOKI_F32, LOKI_F16), dim = draw_dim(random);
    c.lead_rank = random.between(1, dim);
    s->lead =
        Rows::draw(random, s->pages, c.batch, c.kv_heads, c.seq, 1, dim * bytes_of(dtype), bytes_of(dtype));
    s->lead.rows.dim = dim;
    s->lead.rows.dtype = dtype;
    fill_rows(random, *s, &s->lead, dtype, c.lead_rank, spoil);
    c.lead = s->lead.rows;
  }
  c.lead_query_dtype = random.between(LOKI_F32, LOKI_F16);
  s->lead_query = draw_query(random, *s, mapped ? c.keys.dim : c.lead_rank, c.lead_query_dtype,
                             &c.lead_query_batch_stride, &c.lead_query_head_stride, random.chance(0.2));
  c.lead_query = s->lead_query.as<char>();
  if (!mapped) return;
  const int64_t numbers = c.kv_heads * c.keys.dim * c.lead_rank;
  s->query_map = Buffer(numbers * 4);
  for (int64_t i = 0; i < numbers; ++i) put_number(s->query_map.as<char>(), LOKI_F32, i, random.normal());
  c.query_map = s->query_map.as<float>();
}

inline void draw_reading(Random& random, Scene* s) {
  loki_call& c = s->call;
  c.reduce = random.between(LOKI_REDUCE_SOFTMAX_SUM, LOKI_REDUCE_NONE);
  c.sinks = random.pick({0, 0, 1, 4, 40});
  c.recents = random.pick({0, 0, 1, 16, 100});
  const int64_t most = c.seq + random.between(0, 20);
  const double p = random.share();
  if (p < 0.3) {
    for (int64_t b = 0; b < c.batch; ++b) s->wanted.push_back(random.between(0, most));
    c.wanted = s->wanted.data();
  } else if (p < 0.65 || c.lead_kind == LOKI_LEAD_RECENCY) {
    c.count = random.between(1, random.chance(0.5) ? most : most / 8 + 1);
  } else {
    c.mass = random.chance(0.1) ? 1.0 : 0.01 + 0.98 * random.share();
    c.cap = random.chance(0.3) ? random.between(1, most) : 0;
    c.floor = random.chance(0.5) ? c.sinks + c.recents : 0;
    c.dense_below = random.chance(0.2) ? random.between(0, c.seq) : 0;
  }
  c.indices_width = random.chance(0.7) ? c.seq : random.between(1, most);
}

inline void draw_scene(Random& random, Scene* s) {
  loki_call& c = s->call;
  draw_sizes(random, s);
  draw_visible(random, s);
  const bool spoil = random.chance(0.5), alike = random.chance(0.7);
  const int64_t dtype = random.between(LOKI_F32, LOKI_F16);
  const auto other = [&] { return alike ? dtype : random.between(LOKI_F32, LOKI_F16); };
  draw_rows(random, s, &s->keys, dtype, spoil);
  draw_rows(random, s, &s->values, other(), spoil);
  c.keys = s->keys.rows;
  c.values = s->values.rows;
  c.query_dtype = other();
  s->query = draw_query(random, *s, c.keys.dim, c.query_dtype, &c.query_batch_stride, &c.query_head_stride);
  c.query = s->query.as<char>();
  if (random.chance(0.3)) {
    s->sink_logits = Buffer(s->heads() * 4);
    for (int64_t h = 0; h < s->heads(); ++h)
      put_number(s->sink_logits.as<char>(), LOKI_F32, h, 3.0 * random.normal());
    c.sink_logits = s->sink_logits.as<float>();
  }
  draw_lead(random, s, spoil);
  draw_reading(random, s);
}

inline std::string describe(const Scene& s) {
  const loki_call& c = s.call;
  const auto n = [](int64_t x) { return static_cast<long long>(x); };
  char text[700];
  snprintf(text, sizeof text,
           "batch %lld kv_heads %lld group %lld seq %lld lengths %s page_size %lld | keys dtype %lld dim "
           "%lld values %lld %lld query %lld | scaling %g softcap %g sink_logits %d visible %d | lead "
           "kind %lld dtype %lld rank %lld query %lld map %d reduce %lld | wanted %d count %lld mass %g "
           "cap %lld floor %lld dense_below %lld sinks %lld recents %lld width %lld",
           n(c.batch), n(c.kv_heads), n(c.group), n(c.seq), s.lengths.empty() ? "no" : "yes", n(c.page_size),
           n(c.keys.dtype), n(c.keys.dim), n(c.values.dtype), n(c.values.dim), n(c.query_dtype), c.scaling,
           c.softcap, c.sink_logits != nullptr, c.visible != nullptr, n(c.lead_kind), n(c.lead.dtype),
           n(c.lead_rank), n(c.lead_query_dtype), c.query_map != nullptr, n(c.reduce), c.wanted != nullptr,
           n(c.count), c.mass, n(c.cap), n(c.floor), n(c.dense_below), n(c.sinks), n(c.recents),
           n(c.indices_width));
  return text;
}

}  // namespace loki_test
