// One attention call, from its arguments to its results: what is done for which rows, in what order.
#pragma once

#include "internal.h"

namespace loki {

constexpr int64_t kWorthThreads = 1 << 16;  // bytes below which one thread is faster than two

// Where row t lies; the tiles of a paged lead are rows of `unit` tokens.
template <typename Call>
const char* row_at(const Call& c, const loki_rows& rows, int64_t batch, int64_t head, int64_t t,
                   int64_t unit = 1) {
  const char* data = static_cast<const char*>(rows.data) + head * rows.head_stride;
  if (c.block_table == nullptr) return data + batch * rows.batch_stride + t * rows.row_stride;
  const int64_t per_page = c.page_size / unit;
  const int64_t page = c.block_table[batch * c.table_stride + t / per_page];
  return data + page * rows.batch_stride + (t % per_page) * rows.row_stride;
}

enum class Work { kScore, kAttend, kDense, kStep };

// The arguments are checked before; returns a loki_status.
int run(const loki_call& call, Work work);
int run_choose(const loki_choose_call& call);
int run_append(const loki_append_call& call);
int run_columns(const loki_column_call& call);
int run_hamming(const loki_hamming_call& call);

// How many of the best rows reach `mass` of all weights, forced ones first. `scratch`: count floats.
int64_t mass_count(const float* weights, int64_t count, const uint8_t* forced, double mass,
                   float* scratch);

}  // namespace loki
