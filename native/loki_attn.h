// The C interface of the native kernels. No torch, no Python: pointers, sizes and strides.
//
// Every function returns 0, or one of the codes of loki_status; nothing is written on an error.
// All fields are 8 bytes wide, so that a caller can fill a struct without knowing its padding.
// Strides are in bytes. The last dimension of every array is contiguous.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LOKI_ATTN_ABI 2
#define LOKI_EXPORT __attribute__((visibility("default")))

enum loki_status {
  LOKI_OK = 0,
  LOKI_NULL_POINTER = 1,
  LOKI_BAD_SIZE = 2,
  LOKI_BAD_DTYPE = 3,
  LOKI_BAD_INDEX = 4,   // a row index outside 0..seq-1
  LOKI_NO_MEMORY = 5,   // scratch memory could not be had
  LOKI_BAD_ISA = 6,     // unknown, or this processor lacks it
};

enum loki_dtype { LOKI_F32 = 0, LOKI_BF16 = 1, LOKI_F16 = 2, LOKI_INT8 = 3, LOKI_INT4 = 4 };

// How the query heads of a group agree; LOKI_REDUCE_NONE lets each choose for itself.
enum loki_reduce { LOKI_REDUCE_SOFTMAX_SUM = 0, LOKI_REDUCE_MAX = 1, LOKI_REDUCE_NONE = 2 };

// What ranks the rows.
enum loki_lead {
  LOKI_LEAD_RECENCY = 0,  // later rows first, nothing is read
  LOKI_LEAD_TILES = 1,    // tiles of 16 rows, see below
  LOKI_LEAD_ROWS = 2,     // the first `lead_rank` elements of plain rows
};

// Row t of head h of batch row b lies at
//   data + b * batch_stride + h * head_stride + t * row_stride,                     unpaged, or
//   data + page(b, t / page_size) * batch_stride + h * head_stride + (t % page_size) * row_stride.
typedef struct {
  const void* data;
  int64_t dtype;  // loki_dtype: F32, BF16 or F16
  int64_t dim;    // elements of a row
  int64_t batch_stride, head_stride, row_stride;
} loki_rows;

// One decode attention call of one layer.
//
// A lead of tiles holds 16 rows in ceil(rank / per_line) lines of 64 bytes. A line holds, for each of
// the 16 rows in turn, 4 bytes: 1 float, 2 bfloat16, 4 int8, or 8 int4 codes. An int4 byte i of line
// j holds coordinate 8j + i in its low and 8j + 4 + i in its high half, as code + 8. Coordinates
// beyond the rank hold zeros (code 0), and so do their query maps. For tiles, `lead.dim` is the number
// of lines of a tile, `lead.row_stride` the bytes from tile to tile.
typedef struct {
  int64_t batch, kv_heads, group;  // query heads = kv_heads * group
  int64_t seq;                     // rows held; the most of any batch row when `lengths` is given
  const int64_t* lengths;          // null, or [batch]: rows of each batch row, 0..seq
  const int32_t* block_table;      // null, or [batch, table_stride]: pages of each batch row
  int64_t table_stride;            // elements
  int64_t page_size;               // rows per page; a multiple of 16 with tiles; 0 when unpaged
  loki_rows keys, values;
  const void* query;               // [batch, heads, keys.dim] in the space of the key rows
  int64_t query_dtype;
  int64_t query_batch_stride, query_head_stride;
  double scaling;                  // factor on q.k
  double softcap;                  // 0: none
  const float* sink_logits;        // null, or [heads]
  const uint8_t* visible;          // null, or bytes [batch or 1, seq]: rows that may be read
  int64_t visible_batch_stride;    // 0: the same for every batch row

  // what ranks the rows
  int64_t lead_kind;               // loki_lead
  int64_t lead_rank;               // coordinates
  loki_rows lead;                  // with LOKI_LEAD_TILES also INT8 and INT4
  const uint16_t* scales;          // null, or float16: the factor of each row's codes
  int64_t scales_batch_stride, scales_head_stride;  // pages like rows: batch_stride is per page
  const void* lead_query;          // [batch, heads, keys.dim or, without a map, lead_rank]
  int64_t lead_query_dtype;
  int64_t lead_query_batch_stride, lead_query_head_stride;
  const float* query_map;          // null, or [kv_heads, keys.dim, lead_rank]
  int64_t reduce;                  // loki_reduce

  // how many rows are read
  const int64_t* wanted;           // null, or [batch]: rows to read, sinks and recents included
  int64_t count;                   // where `wanted` is null: the same for every batch row; 0: see mass
  double mass;                     // where neither is given: the share of attention to reach
  int64_t cap, floor, dense_below; // limits of a mass; cap 0: none
  int64_t sinks, recents;

  // results
  void* out;                       // [batch, heads, values.dim] contiguous, dtype of the query
  float* log_sum_exp;              // null, or [batch, heads]
  float* column_sums;              // loki_dense: null, or [batch, kv_heads, seq]: the group's weights
  int64_t* indices;                // [batch, choosers, indices_width], -1 where unused
  int64_t indices_width;
  int64_t* counts;                 // [batch, choosers]; choosers = heads for REDUCE_NONE
  float* scores;                   // loki_score: [batch, heads, seq]
  int64_t* stages;                 // null, or [3]: nanoseconds spent on scoring, choosing, attending
                                   // are added, those of all threads together
} loki_call;

// New rows of one layer, written behind `start` rows.
typedef struct {
  int64_t batch, kv_heads, tokens, start;
  const int32_t* block_table;
  int64_t table_stride, page_size;
  loki_rows new_keys, new_values;  // [batch, kv_heads, tokens, dim]
  loki_rows keys, values;          // where they go; null data: that copy is not wanted
  const float* key_map;            // [kv_heads, key dim, lead_rank], null: no lead is kept
  int64_t lead_rank;
  loki_rows lead;                  // tiles, as in loki_call
  uint16_t* scales;                // for INT8 and INT4
  int64_t scales_batch_stride, scales_head_stride;
  int32_t* positions;              // null, or [batch, kv_heads, rows]
  int64_t positions_batch_stride, positions_head_stride;
  int64_t first_position;          // position of the first new token
} loki_append_call;

// The best `wanted` rows of each score row: forced ones first, ties to the lower row, ascending.
typedef struct {
  int64_t batch, choosers, seq;
  const float* scores;             // [batch, choosers, seq]
  int64_t scores_batch_stride, scores_head_stride;
  const uint8_t* visible;          // null, or bytes [batch or 1, choosers or 1, seq]
  int64_t visible_batch_stride, visible_head_stride;
  const uint8_t* forced;           // alike
  int64_t forced_batch_stride, forced_head_stride;
  const int64_t* wanted;           // [batch, choosers]
  double mass;                     // above 0: `scores` are weights, and only `counts` is written, with
                                   // the size of the smallest set that reaches this share of them
  int64_t* indices;                // [batch, choosers, indices_width]
  int64_t indices_width;
  int64_t* counts;                 // [batch, choosers]
} loki_choose_call;

// What every key receives of the attention of many queries.
typedef struct {
  int64_t batch, kv_heads, group;  // query heads = kv_heads * group
  int64_t seq;                     // keys
  int64_t q_len;                   // queries; at most `seq` where `visible` is null
  int64_t window;                  // how many of them count, the last ones: 1..q_len
  loki_rows keys;
  const void* query;               // [batch, heads, q_len, keys.dim]
  int64_t query_dtype;
  int64_t query_batch_stride, query_head_stride, query_row_stride;
  double scaling, softcap;         // as in loki_call
  const float* sink_logits;        // null, or [heads]
  const uint8_t* visible;          // bytes [batch or 1, kv_heads or 1, q_len, seq]; null: causal, the
                                   // queries are the last rows
  int64_t visible_batch_stride, visible_head_stride, visible_row_stride;
  const float* bias;               // null, or [batch, kv_heads, seq], added to the capped logits
  int64_t bias_batch_stride, bias_head_stride;
  int64_t largest;                 // 0: sums of weights, else the largest one
  float* out;                      // [batch, heads, seq]
} loki_column_call;

// How many bits differ between codes of queries and of keys.
typedef struct {
  int64_t batch, kv_heads, group, seq, q_len;
  int64_t words;                   // of 32 bits
  const int32_t* query;            // [batch, heads, q_len, words]
  int64_t query_batch_stride, query_head_stride, query_row_stride;
  const int32_t* codes;            // [batch, kv_heads, seq, words]
  int64_t codes_batch_stride, codes_head_stride, codes_row_stride;
  float* out;                      // [batch, heads, q_len, seq]
} loki_hamming_call;

LOKI_EXPORT int loki_score(const loki_call*);   // estimated logits of every row
LOKI_EXPORT int loki_attend(const loki_call*);  // exact attention to `indices`
LOKI_EXPORT int loki_dense(const loki_call*);   // exact attention to every visible row
LOKI_EXPORT int loki_step(const loki_call*);    // score, choose, attend in one
LOKI_EXPORT int loki_choose(const loki_choose_call*);
LOKI_EXPORT int loki_append(const loki_append_call*);
LOKI_EXPORT int loki_column_sums(const loki_column_call*);
LOKI_EXPORT int loki_hamming(const loki_hamming_call*);

LOKI_EXPORT int loki_abi(void);
LOKI_EXPORT const char* loki_isas(void);         // the ones that run here, best first, "a,b,c"
LOKI_EXPORT const char* loki_isa(void);          // the one in use
LOKI_EXPORT int loki_set_isa(const char* name);
LOKI_EXPORT const char* loki_last_isa(void);     // the one whose code ran last: proof for tests

// Threads. `borrow` lends the kernels another runtime's pool: the address of GOMP_parallel of the
// OpenMP library that the host process already uses, or null for a pool of our own.
LOKI_EXPORT int loki_set_threads(int64_t count);
LOKI_EXPORT int64_t loki_threads(void);
LOKI_EXPORT int loki_borrow_pool(void* gomp_parallel);

// Sum `bytes` at `data` with all threads, reading each once: what this memory can deliver.
LOKI_EXPORT int loki_read(const void* data, int64_t bytes, uint64_t* sum);

#ifdef __cplusplus
}
#endif
