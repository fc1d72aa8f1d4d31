// What the tests draw from: random numbers, arrays of exact size, number formats, strides.
//
// Nothing here is shared with the kernels, so that a mistake of theirs is not repeated.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "loki_attn.h"

namespace loki_test {

// The same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double share() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  bool chance(double p) { return share() < p; }
  // A whole number in low..high, both included.
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  int64_t pick(std::initializer_list<int64_t> of) {
    return of.begin()[between(0, static_cast<int64_t>(of.size()) - 1)];
  }
  double normal() { return sqrt(-2.0 * log(1.0 - share())) * cos(6.283185307179586 * share()); }

 private:
  uint64_t state_;
};

// Memory of exactly the size asked for, full of one byte: a sanitizer sees whoever leaves it, and
// 0xff and 0x7f are NaN or huge in every number format, so that nobody reads it unpunished.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size, uint8_t fill = 0xff)
      : size_(size), data_(new uint8_t[static_cast<size_t>(size)]) {
    memset(data_.get(), fill, static_cast<size_t>(size));
  }
  template <typename T>
  T* as(int64_t offset = 0) const {
    return reinterpret_cast<T*>(data_.get() + offset);
  }
  int64_t size() const { return size_; }
  bool operator==(const Buffer& other) const {
    return size_ == other.size_ &&
           (size_ == 0 || memcmp(data_.get(), other.data_.get(), static_cast<size_t>(size_)) == 0);
  }
  Buffer copy() const {
    Buffer other(size_);
    if (size_ > 0) memcpy(other.data_.get(), data_.get(), static_cast<size_t>(size_));
    return other;
  }

 private:
  int64_t size_ = 0;
  std::unique_ptr<uint8_t[]> data_;
};

// Number formats ---------------------------------------------------------------------------------

struct Format {
  int digits;   // of the significand, the hidden one included
  int last;     // exponent of the smallest number above 0
  double most;  // largest finite number
};

inline Format format_of(int64_t dtype) {
  switch (dtype) {
    case LOKI_F32: return {24, -149, 3.4028234663852886e38};
    case LOKI_BF16: return {8, -133, 3.3895313892515355e38};
    default: return {11, -24, 65504.0};
  }
}

inline int64_t bytes_of(int64_t dtype) { return dtype == LOKI_F32 ? 4 : 2; }

// The nearest number of the format, ties to even.
inline double rounded(double x, int64_t dtype) {
  if (x == 0.0 || !isfinite(x)) return x;
  const Format f = format_of(dtype);
  int exponent;
  frexp(x, &exponent);
  const int unit = exponent - f.digits > f.last ? exponent - f.digits : f.last;
  const double y = ldexp(nearbyint(ldexp(x, -unit)), unit);
  return fabs(y) > f.most ? copysign(INFINITY, x) : y;
}

inline float single(double x) { return static_cast<float>(x); }

inline double number(const void* data, int64_t dtype, int64_t i) {
  if (dtype == LOKI_F32) {
    float f;
    memcpy(&f, static_cast<const char*>(data) + 4 * i, sizeof f);
    return static_cast<double>(f);
  }
  uint16_t h;
  memcpy(&h, static_cast<const char*>(data) + 2 * i, sizeof h);
  if (dtype == LOKI_BF16) {
    const uint32_t wide = static_cast<uint32_t>(h) << 16;
    float f;
    memcpy(&f, &wide, sizeof f);
    return static_cast<double>(f);
  }
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? ldexp(fraction, -24)
                                      : ldexp(1024 + fraction, exponent - 25);
  return h & 0x8000 ? -size : size;
}

inline void put_number(void* data, int64_t dtype, int64_t i, double x) {
  const double y = rounded(x, dtype);
  char* at = static_cast<char*>(data) + i * bytes_of(dtype);
  if (dtype != LOKI_F16) {
    const float f = single(y);
    uint32_t wide;
    memcpy(&wide, &f, sizeof wide);
    const uint16_t upper = static_cast<uint16_t>(wide >> 16);
    if (dtype == LOKI_F32) memcpy(at, &f, sizeof f);
    else memcpy(at, &upper, sizeof upper);
    return;
  }
  uint16_t h = 0x7e00;
  const double size = fabs(y);
  if (size < 0x1p-14) h = static_cast<uint16_t>(ldexp(size, 24));
  else if (isinf(size)) h = 0x7c00;
  else if (!isnan(size)) {
    int exponent;
    const double part = frexp(size, &exponent);
    h = static_cast<uint16_t>(((exponent + 14) << 10) | (static_cast<int>(ldexp(part, 11)) - 1024));
  }
  h = static_cast<uint16_t>(h | (signbit(y) ? 0x8000 : 0));
  memcpy(at, &h, sizeof h);
}

// Values -----------------------------------------------------------------------------------------

enum class Taste { kNormal, kTied, kHalves, kEqual, kHuge, kTiny };

inline Taste draw_taste(Random& random) {
  const double p = random.share();
  return p < 0.6    ? Taste::kNormal
         : p < 0.7  ? Taste::kTied
         : p < 0.75 ? Taste::kHalves
         : p < 0.83 ? Taste::kEqual
         : p < 0.92 ? Taste::kHuge
                    : Taste::kTiny;
}

inline double draw_value(Random& random, Taste taste, int64_t dtype) {
  switch (taste) {
    case Taste::kTied: return static_cast<double>(random.between(-1, 1));
    case Taste::kHalves: return 0.5 * static_cast<double>(random.between(-254, 254));  // roundings tie
    case Taste::kEqual: return 0.75;
    case Taste::kHuge: return random.normal() * (dtype == LOKI_F16 ? 1e3 : 1e4);
    case Taste::kTiny: return random.normal() * (dtype == LOKI_F16 ? 1e-7 : 1e-39);
    default: return random.normal();
  }
}

// The largest power of two that a number is a whole multiple of.
inline double grain(double x) {
  if (x == 0.0) return INFINITY;
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  const int exponent = static_cast<int>(bits >> 52 & 2047), zeros = __builtin_ctzll(bits | uint64_t{1} << 52);
  return ldexp(1.0, exponent - 1075 + zeros);
}

// Places -----------------------------------------------------------------------------------------

// Pages of the batch rows, in random order and with some that nobody uses.
struct Pages {
  std::vector<int32_t> table;  // empty: unpaged
  int64_t stride = 0, size = 0, count = 0;

  bool none() const { return table.empty(); }
  static Pages draw(Random& random, int64_t batch, int64_t rows) {
    Pages pages;
    pages.size = random.pick({16, 16, 32, 48, 64, 256});
    const int64_t each = (rows + pages.size - 1) / pages.size;
    pages.stride = each + random.between(0, 2);
    pages.count = batch * each + random.between(0, 3);
    std::vector<int32_t> order(static_cast<size_t>(pages.count));
    for (size_t i = 0; i < order.size(); ++i) {
      order[i] = static_cast<int32_t>(i);
      std::swap(order[i], order[static_cast<size_t>(random.between(0, static_cast<int64_t>(i)))]);
    }
    pages.table.assign(static_cast<size_t>(batch * pages.stride), INT32_MIN);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < each; ++i)
        pages.table[static_cast<size_t>(b * pages.stride + i)] = order[static_cast<size_t>(b * each + i)];
    return pages;
  }
};

// Rows of `unit` tokens of every batch row and KV head, with gaps wherever strides allow them.
struct Rows {
  Buffer memory;
  loki_rows rows{};
  int64_t unit = 1;

  // `cell` is the alignment of a row and the grain of its gaps; `tight`: rows follow each other.
  static Rows draw(Random& random, const Pages& pages, int64_t batch, int64_t heads, int64_t tokens,
                   int64_t unit, int64_t bytes, int64_t cell, bool tight = false) {
    Rows r;
    r.unit = unit;
    const int64_t outer = pages.none() ? batch : pages.count;
    const int64_t slots = (pages.none() ? tokens + unit - 1 : pages.size) / unit;
    const auto gap = [&] { return random.chance(0.5) ? 0 : cell * random.between(1, 9); };
    if (tight || random.chance(0.6)) {
      r.rows.row_stride = bytes + (tight ? 0 : gap());
      r.rows.head_stride = slots * r.rows.row_stride + gap();
      r.rows.batch_stride = heads * r.rows.head_stride + gap();
    } else {
      r.rows.head_stride = bytes + gap();
      r.rows.row_stride = heads * r.rows.head_stride + gap();
      r.rows.batch_stride = slots * r.rows.row_stride + gap();
    }
    const int64_t start = gap();
    const int64_t size = start + (outer - 1) * r.rows.batch_stride + (heads - 1) * r.rows.head_stride +
                         (slots - 1) * r.rows.row_stride + bytes;
    r.memory = Buffer(size, random.chance(0.7) ? 0xff : 0x7f);
    r.rows.data = r.memory.as<char>(start);
    return r;
  }

  char* at(const Pages& pages, int64_t batch, int64_t head, int64_t token) const {
    int64_t outer = batch, slot = token / unit;
    if (!pages.none()) {
      outer = pages.table[static_cast<size_t>(batch * pages.stride + token / pages.size)];
      slot = token % pages.size / unit;
    }
    return static_cast<char*>(const_cast<void*>(rows.data)) + outer * rows.batch_stride +
           head * rows.head_stride + slot * rows.row_stride;
  }
};

// Tiles ------------------------------------------------------------------------------------------

inline int64_t coordinates_per_line(int64_t kind) {
  return kind == LOKI_F32 ? 1 : kind == LOKI_BF16 ? 2 : kind == LOKI_INT8 ? 4 : 8;
}
inline int64_t lines_for(int64_t kind, int64_t rank) {
  const int64_t per_line = coordinates_per_line(kind);
  return (rank + per_line - 1) / per_line;
}
inline bool holds_codes(int64_t kind) { return kind == LOKI_INT8 || kind == LOKI_INT4; }

// Coordinate c of a tile's column, straight from the layout in loki_attn.h.
inline double tile_number(const char* tile, int64_t kind, int64_t column, int64_t c) {
  const int64_t per_line = coordinates_per_line(kind), i = c % per_line;
  const char* at = tile + c / per_line * 64 + column * 4;
  if (kind == LOKI_INT8) return static_cast<double>(static_cast<int8_t>(at[i]));
  if (kind == LOKI_INT4) {
    const uint8_t both = static_cast<uint8_t>(at[i % 4]);
    return static_cast<double>((i < 4 ? both & 15 : both >> 4) - 8);
  }
  return number(at, kind, i);
}

inline void put_tile_number(char* tile, int64_t kind, int64_t column, int64_t c, double x) {
  const int64_t per_line = coordinates_per_line(kind), i = c % per_line;
  char* at = tile + c / per_line * 64 + column * 4;
  if (kind == LOKI_INT8) {
    at[i] = static_cast<char>(static_cast<int8_t>(x));
  } else if (kind == LOKI_INT4) {
    const int code = static_cast<int>(x) + 8, both = static_cast<uint8_t>(at[i % 4]);
    at[i % 4] = static_cast<char>(i < 4 ? (both & 0xf0) | code : (both & 15) | (code << 4));
  } else {
    put_number(at, kind, i, x);
  }
}

// Failures ---------------------------------------------------------------------------------------

template <typename... Parts>
[[noreturn]] void fail(const char* format, Parts... parts) {
  char text[1024];
  snprintf(text, sizeof text, format, parts...);
  throw std::runtime_error(text);
}

}  // namespace loki_test
