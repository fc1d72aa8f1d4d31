// What the orchestration (step.cpp, api.cpp) and the kernels of every instruction set share.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "loki_attn.h"

namespace loki {

constexpr int64_t kTileRows = 16;
constexpr int64_t kLineBytes = 64;
constexpr double kLog2 = 1.4426950408889634;  // of e: logits times this are exponents of 2
// Rows that are scored or attended in one go: small enough for the first-level cache, and the same
// for any number of threads, so that results are.
constexpr int64_t kChunk = 512;

static constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The query heads of one KV head, ready for the lead plane. Filled by `prepare_lead`.
struct LeadQuery {
  int64_t heads;    // query heads that share the plane's rows
  int64_t lines;    // of a tile; 0 for plain rows
  int64_t rank;
  int64_t kind;     // loki_dtype of the plane
  bool tiled;
  int32_t* words;   // tiles: what is multiplied with each line, see kernels.cpp
  int32_t* start;   // [heads] first value of an integer sum
  float* factor;    // [heads] from sums to logits
  float* rows;      // plain rows: [heads rounded up to 4, row_floats(rank)]
};

// The query heads of one KV head, ready for key rows. Filled by `prepare_rows`.
struct RowsQuery {
  int64_t heads, dim;
  bool paired;      // bfloat16 pairs for a pairwise dot product, else floats
  float* rows;      // [heads rounded up to 4, row_floats(dim)]
};

// Soft-max attention over some rows, not yet normalised: sums relative to 2 ** `peak`.
struct Partial {
  float* peak;   // [heads]
  float* total;  // [heads]
  float* sums;   // [heads, value dim rounded up to 16]
};

static constexpr int64_t row_floats(int64_t dim) { return round_up(dim, 32); }

// Rows of one chunk, gathered as addresses: paged, strided and selected rows look alike.
struct RowList {
  const void* const* keys;
  const void* const* values;
  int64_t count;
};

// Words of a key in a panel: floats, or bfloat16 in pairs.
static constexpr int64_t panel_lines(int64_t dim, bool paired) { return paired ? (dim + 1) / 2 : dim; }

// Query rows that meet a chunk of keys.
struct ColumnRows {
  const float* rows;  // `stride` floats apart, as `prepare_rows` writes them
  int64_t stride, count;
  int64_t lines;      // of the panel
  bool paired;
  const int64_t* seen;            // [count]: how many of the keys a query may see, the first ones
  const uint8_t* const* visible;  // null, or [count] marks of the keys
  const float* bias;              // null, or one of each key, whole registers
  float scaling, cap;
};

// Kernels of one instruction set. Logits are [heads, stride]; all float buffers are 64-byte aligned.
struct Kernels {
  const char* name;
  bool pairs;  // bfloat16 is multiplied in pairs

  // Words per query head that `prepare_lead` writes.
  int64_t (*lead_words)(int64_t kind, int64_t lines);
  void (*prepare_lead)(const float* const* heads, float scaling, LeadQuery* query);
  void (*prepare_rows)(const void* const* heads, int64_t dtype, int64_t key_dtype, RowsQuery* query);

  // out[j] = sum_i row[i] * map[i, j]
  void (*project)(const void* row, int64_t dtype, int64_t dim, const float* map, int64_t rank,
                  float* out);
  // Writes one column of a tile from `rank` coordinates, and its scale where the kind has one.
  void (*encode)(const float* lead, int64_t kind, int64_t rank, int64_t lines, uint8_t* tile,
                 int64_t column, uint16_t* scale);

  void (*tile_logits)(const uint8_t* const* tiles, const uint16_t* const* scales, int64_t tile_count,
                      const LeadQuery& query, float* logits, int64_t stride);
  // `rows` holds a multiple of 16 addresses; `scratch` 4 * kChunk floats.
  void (*row_logits)(const void* const* rows, int64_t count, int64_t dtype, const LeadQuery& query,
                     float* logits, int64_t stride, float* scratch);
  // In place: factor * cap * tanh(logit / cap).
  void (*soft_cap)(float* logits, int64_t count, float cap, float factor);
  // In place: 2 ** (logit - peak), of logits that were multiplied by log2(e); invisible rows and
  // those beyond `count` become 0.
  // Every 16 logits, `ahead_step` further bytes from `ahead` on are prefetched.
  void (*exponentials)(float* logits, int64_t count, const uint8_t* visible, float* peak,
                       float* total, const char* ahead, int64_t ahead_step);
  // scores = sum over heads of weights * factor, or the largest logit.
  void (*weigh)(const float* exponentials, int64_t stride, int64_t heads, int64_t count,
                const float* factor, float* scores);
  void (*largest)(const float* logits, int64_t stride, int64_t heads, int64_t count, float* scores);
  // Brings scores into the order of choice: NaN lowest, finite, invisible below all.
  void (*settle)(const float* scores, int64_t count, const uint8_t* visible, float* out);
  // Ascending rows of the `wanted` best of `count` settled scores; scratch: 3 * (count + 64) floats.
  void (*choose)(const float* settled, int64_t count, int64_t wanted, float* scratch, int64_t* out);

  // `list` holds addresses up to a multiple of 16 beyond its count; scratch: 5 * kChunk floats.
  // Peaks are in units of log2(e). weights: null, or [heads, kChunk]: powers relative to the peak.
  void (*attend)(const RowList& list, int64_t key_dtype, int64_t value_dtype, int64_t value_dim,
                 const RowsQuery& query, float scaling, float cap, float* scratch, Partial* out,
                 float* weights);
  // Partials of all chunks, `chunks` apart by `head_floats` per head, into one row of output.
  void (*merge)(const float* peaks, const float* totals, const float* sums, int64_t chunks,
                int64_t chunk_heads, int64_t sums_stride, int64_t value_dim, const float* sink,
                int64_t dtype, void* out, float* log_sum_exp, float* peak, float* total);

  // Keys as a panel, see columns.h; `count` addresses, a multiple of 16.
  void (*key_panel)(const void* const* rows, int64_t count, int64_t dtype, int64_t dim, bool paired,
                    float* panel);
  // Powers of the keys' logits, [row, kChunk], each row relative to its own peak in units of log2(e).
  void (*column_powers)(const ColumnRows& queries, const float* panel, int64_t count, float* out,
                        float* peaks, float* totals);
  // Of 16 query rows: peaks and totals of all chunks, `stride` apart; peaks become factors of powers.
  void (*column_factors)(float* peaks, const float* totals, int64_t chunks, int64_t stride,
                         const float* sinks);
  // Adds powers times factors of `rows` query rows to the sums, or keeps the largest.
  void (*column_add)(const float* powers, const float* factors, int64_t rows, int64_t count,
                     bool largest, float* sums);
  void (*differing_bits)(const char* codes, int64_t stride, int64_t count, int64_t words,
                         const uint32_t* query, float* out);
  uint64_t (*sum_bytes)(const void* data, int64_t bytes);
};

// A pool of threads. `task(context, i)` runs once for each i in 0..count-1, on any of the threads.
using Task = void (*)(void* context, int64_t index);
void parallel(int64_t count, Task task, void* context);
int64_t threads();

// Scratch memory of the calling thread, kept for its next call.
class Arena {
 public:
  // Makes room for `bytes` and starts over; false if the memory cannot be had.
  bool reserve(size_t bytes);
  template <typename T>
  T* take(int64_t count) {
    char* at = base_ + used_;
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), kLineBytes));
    return reinterpret_cast<T*>(at);
  }
  template <typename T>
  static size_t size(int64_t count) {
    return static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), kLineBytes));
  }
  ~Arena();
  static Arena& mine();    // for tasks
  static Arena& shared();  // for the thread that calls, around its tasks

 private:
  char* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

const Kernels& kernels();  // of the instruction set in use

}  // namespace loki
