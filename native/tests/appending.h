// One random append, and what it must write: every byte of every array is accounted for.
#pragma once

#include <algorithm>

#include "naive.h"

namespace loki_test {

// Leading coordinates of a new key, and how far float32 may be from them.
struct Coordinates {
  std::vector<double> value, error;
  double peak = 0.0, peak_error = 0.0;
};

struct Appending {
  loki_append_call call{};
  Pages pages;
  Rows new_keys, new_values, keys, values, lead, scales;
  Buffer key_map, positions;
  std::vector<Coordinates> coordinates;  // of each new key, once they are asked for
};

inline Rows draw_new_rows(Random& random, const loki_append_call& c, int64_t dim, int64_t dtype) {
  Rows r =
      Rows::draw(random, Pages(), c.batch, c.kv_heads, c.tokens, 1, dim * bytes_of(dtype), bytes_of(dtype));
  r.rows.dim = dim;
  r.rows.dtype = dtype;
  const Taste taste = draw_taste(random);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.kv_heads; ++h)
      for (int64_t t = 0; t < c.tokens; ++t)
        for (int64_t i = 0; i < dim; ++i)
          put_number(r.at(Pages(), b, h, t), dtype, i,
                     random.chance(0.01) ? 0.0 : draw_value(random, taste, dtype));
  return r;
}

// Where copies of rows like `from` go.
inline Rows draw_place(Random& random, const Appending& a, const Rows& from, int64_t capacity) {
  const int64_t bytes = bytes_of(from.rows.dtype);
  Rows r =
      Rows::draw(random, a.pages, a.call.batch, a.call.kv_heads, capacity, 1, from.rows.dim * bytes, bytes);
  r.rows.dim = from.rows.dim;
  r.rows.dtype = from.rows.dtype;
  return r;
}

inline void draw_append(Random& random, Appending* a) {
  loki_append_call& c = a->call;
  c.batch = random.between(1, 3);
  c.kv_heads = random.between(1, 4);
  c.tokens = random.chance(0.4) ? 1 : random.between(1, 200);
  c.start = random.chance(0.3) ? 0 : random.between(0, 300);
  if (c.batch * c.kv_heads * c.tokens > 400) c.batch = c.kv_heads = 1;
  const int64_t capacity = c.start + c.tokens + (random.chance(0.5) ? 0 : random.between(0, 40));
  if (random.chance(0.35)) {
    a->pages = Pages::draw(random, c.batch, capacity);
    c.block_table = a->pages.table.data();
    c.table_stride = a->pages.stride;
    c.page_size = a->pages.size;
  }
  const int64_t dtype = random.between(LOKI_F32, LOKI_F16), dim = draw_dim(random);
  a->new_keys = draw_new_rows(random, c, dim, dtype);
  a->new_values = draw_new_rows(random, c, random.chance(0.7) ? dim : draw_dim(random), dtype);
  c.new_keys = a->new_keys.rows;
  c.new_values = a->new_values.rows;
  if (random.chance(0.8)) {
    a->keys = draw_place(random, *a, a->new_keys, capacity);
    a->values = draw_place(random, *a, a->new_values, capacity);
    c.keys = a->keys.rows;
    c.values = a->values.rows;
  }
  if (random.chance(0.8)) {
    c.positions_head_stride = 4 * (capacity + random.between(0, 3));
    c.positions_batch_stride = c.kv_heads * c.positions_head_stride + 4 * random.between(0, 3);
    a->positions = Buffer((c.batch - 1) * c.positions_batch_stride +
                          (c.kv_heads - 1) * c.positions_head_stride + 4 * capacity);
    c.positions = a->positions.as<int32_t>();
    c.first_position = random.between(0, 1000);
  }
  if (random.chance(0.1)) return;
  const int64_t kind = random.pick({LOKI_INT8, LOKI_INT8, LOKI_INT4, LOKI_BF16, LOKI_F32});
  c.lead_rank = random.chance(0.5) ? random.pick({8, 16, 32, 64}) : random.between(1, 100);
  a->key_map = Buffer(c.kv_heads * dim * c.lead_rank * 4);
  const bool tied = random.chance(0.4);
  for (int64_t i = 0; i < a->key_map.size() / 4; ++i)
    put_number(a->key_map.as<char>(), LOKI_F32, i,
               tied ? static_cast<double>(random.between(-1, 1)) : 0.1 * random.normal());
  c.key_map = a->key_map.as<float>();
  a->lead =
      Rows::draw(random, a->pages, c.batch, c.kv_heads, capacity, 16, lines_for(kind, c.lead_rank) * 64, 4);
  a->lead.rows.dim = lines_for(kind, c.lead_rank);
  a->lead.rows.dtype = kind;
  c.lead = a->lead.rows;
  if (!holds_codes(kind)) return;
  a->scales = Rows::draw(random, a->pages, c.batch, c.kv_heads, capacity, 1, 2, 2, true);
  c.scales = static_cast<uint16_t*>(const_cast<void*>(a->scales.rows.data));
  c.scales_batch_stride = a->scales.rows.batch_stride;
  c.scales_head_stride = a->scales.rows.head_stride;
}

// Before and after: all bytes that were not meant to be written must be as they were.
class Untouched {
 public:
  explicit Untouched(const Buffer& buffer)
      : buffer_(buffer), before_(buffer.copy()), meant_(buffer.size(), 0) {}
  void meant(const char* at, int64_t bytes) {
    const int64_t from = at - buffer_.as<char>();
    if (from < 0 || from + bytes > buffer_.size()) fail("the test itself looks outside its array");
    memset(meant_.as<char>(from), 1, static_cast<size_t>(bytes));
  }
  void check(const char* what) const {
    for (int64_t i = 0; i < buffer_.size(); ++i)
      if (!*meant_.as<char>(i) && *buffer_.as<char>(i) != *before_.as<char>(i))
        fail("%s: byte %lld of %lld was overwritten", what, static_cast<long long>(i),
             static_cast<long long>(buffer_.size()));
  }

 private:
  const Buffer& buffer_;
  Buffer before_, meant_;
};

inline Coordinates coordinates_of(const Appending& a, const char* key, int64_t head) {
  const loki_append_call& c = a.call;
  const int64_t dim = c.new_keys.dim;
  Coordinates x;
  for (int64_t j = 0; j < c.lead_rank; ++j) {
    Dot dot;
    for (int64_t i = 0; i < dim; ++i)
      dot.add(number(key, c.new_keys.dtype, i),
              static_cast<double>(c.key_map[(head * dim + i) * c.lead_rank + j]));
    x.value.push_back(dot.value());
    x.error.push_back(dot.error());
    x.peak = std::max(x.peak, fabs(dot.value()));
    x.peak_error = std::max(x.peak_error, x.error.back());
  }
  return x;
}

inline void compute_coordinates(Appending* a) {
  const loki_append_call& c = a->call;
  for (int64_t b = 0; c.key_map != nullptr && b < c.batch; ++b)
    for (int64_t h = 0; h < c.kv_heads; ++h)
      for (int64_t i = 0; i < c.tokens; ++i)
        a->coordinates.push_back(coordinates_of(*a, a->new_keys.at(Pages(), b, h, i), h));
}

inline void check_between(const char* what, double got, double low, double high) {
  if (!(got >= low && got <= high)) fail("%s is %.9g, should be %.9g..%.9g", what, got, low, high);
}

// A scale is peak / limit in float16, held within its normal numbers; the quotient is a float32.
inline double scale_for(double peak, double limit) {
  const auto step = static_cast<double>(single(peak) / single(limit));
  return rounded(std::max(0x1p-14, std::min(65504.0, step)), LOKI_F16);
}

inline void check_column(const Appending& a, const char* tile, int64_t column, const char* scale_at,
                         const Coordinates& x) {
  const loki_append_call& c = a.call;
  const int64_t kind = c.lead.dtype, all = c.lead.dim * coordinates_per_line(kind);
  const double limit = kind == LOKI_INT8 ? 127.0 : 7.0;
  double scale = 1.0;
  if (holds_codes(kind)) {
    scale = number(scale_at, LOKI_F16, 0);
    check_between("scale", scale, scale_for(x.peak - x.peak_error, limit),
                  scale_for(x.peak + x.peak_error, limit));
  }
  for (int64_t i = 0; i < all; ++i) {
    const double got = tile_number(tile, kind, column, i);
    if (i >= c.lead_rank) {
      check_between("a coordinate beyond the rank", got, 0.0, 0.0);
      continue;
    }
    const double value = x.value[static_cast<size_t>(i)], error = x.error[static_cast<size_t>(i)];
    const auto stored = [&](double y) {
      if (!holds_codes(kind)) return rounded(y, kind);
      const auto ratio = static_cast<double>(single(y) / single(scale));
      return std::max(-limit, std::min(limit, nearbyint(ratio)));
    };
    check_between("coordinate", got, stored(value - error), stored(value + error));
  }
}

// After the call; the `Untouched`s were made before it.
inline void check_append(const Appending& a, Untouched* keys, Untouched* values, Untouched* lead,
                         Untouched* scales, Untouched* positions) {
  const loki_append_call& c = a.call;
  const auto copied = [&](const Rows& from, const Rows& to, Untouched* memory, int64_t b, int64_t h,
                          int64_t i) {
    const int64_t bytes = from.rows.dim * bytes_of(from.rows.dtype);
    const char* at = to.at(a.pages, b, h, c.start + i);
    memory->meant(at, bytes);
    if (memcmp(at, from.at(Pages(), b, h, i), static_cast<size_t>(bytes)) != 0)
      fail("a row differs from the new one");
  };
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.kv_heads; ++h)
      for (int64_t i = 0; i < c.tokens; ++i) {
        const int64_t t = c.start + i;
        if (c.keys.data != nullptr) copied(a.new_keys, a.keys, keys, b, h, i);
        if (c.values.data != nullptr) copied(a.new_values, a.values, values, b, h, i);
        if (c.positions != nullptr) {
          const char* at =
              a.positions.as<char>(b * c.positions_batch_stride + h * c.positions_head_stride + 4 * t);
          int32_t position;
          memcpy(&position, at, sizeof position);
          check_between("position", position, static_cast<double>(c.first_position + i),
                        static_cast<double>(c.first_position + i));
          positions->meant(at, 4);
        }
        if (c.key_map == nullptr) continue;
        const char* tile = a.lead.at(a.pages, b, h, t);
        const char* scale = holds_codes(c.lead.dtype) ? a.scales.at(a.pages, b, h, t) : nullptr;
        check_column(a, tile, t % 16, scale,
                     a.coordinates[static_cast<size_t>((b * c.kv_heads + h) * c.tokens + i)]);
        for (int64_t line = 0; line < c.lead.dim; ++line) lead->meant(tile + line * 64 + t % 16 * 4, 4);
        if (scale != nullptr) scales->meant(scale, 2);
      }
  keys->check("keys");
  values->check("values");
  lead->check("lead");
  scales->check("scales");
  positions->check("positions");
}

inline std::string describe(const Appending& a) {
  const loki_append_call& c = a.call;
  const auto n = [](int64_t x) { return static_cast<long long>(x); };
  char text[300];
  snprintf(text, sizeof text,
           "batch %lld kv_heads %lld tokens %lld start %lld page_size %lld keys dtype %lld dim %lld copies %d "
           "lead %d dtype %lld rank %lld positions %d",
           n(c.batch), n(c.kv_heads), n(c.tokens), n(c.start), n(c.page_size), n(c.new_keys.dtype),
           n(c.new_keys.dim), c.keys.data != nullptr, c.key_map != nullptr, n(c.lead.dtype), n(c.lead_rank),
           c.positions != nullptr);
  return text;
}

}  // namespace loki_test
