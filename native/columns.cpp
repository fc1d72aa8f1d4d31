// What every key receives of the attention of many queries, and the bits in which codes differ.
//
// Queries go in waves whose powers fit into scratch memory, and a wave in phases: products and powers
// of each chunk of keys, relative to the chunk's own peak; from all chunks, the factor of each; the
// powers times their factors, added to the columns. Who does what is shared out by chunks of keys and
// blocks of rows that depend on sizes alone, and each column is added up by one thread, in the order of
// the queries: so results do not depend on the number of threads.
#include <string.h>

#include <atomic>

#include "numbers.h"
#include "step.h"

namespace loki {
namespace {

constexpr int64_t kScratchBytes = 8 << 20;  // of a wave's powers: they stay in the last-level cache
constexpr int64_t kLeastQueries = 32;       // of a wave, before it takes fewer KV heads
constexpr int64_t kLeastRows = 24;          // of a wave: below, moving keys costs more than products
constexpr int64_t kRowBlock = 192;          // query rows of one task
constexpr int64_t kPrepared = 64;           // query rows of one task that only copies them

struct ColumnRun {
  const loki_column_call& call;
  const Kernels& k;
  bool paired = false;
  int64_t first_item = 0, items = 0;     // KV heads of all batch rows that are under way
  int64_t first_query = 0, queries = 0;  // of the wave
  // Of an item: queries of its heads, one head after the other.
  int64_t rows = 0, row_stride = 0;
  int64_t chunks = 0;
  float *query_rows = nullptr, *powers = nullptr, *peaks = nullptr, *totals = nullptr, *sinks = nullptr;
  std::atomic<int> status{LOKI_OK};

  int64_t words() const { return row_floats(call.keys.dim); }
  int64_t row_blocks() const { return round_up(rows, kRowBlock) / kRowBlock; }
  int64_t prepared_blocks() const { return round_up(rows, kPrepared) / kPrepared; }
  float* item_queries(int64_t i) const { return query_rows + i * round_up(rows, 4) * words(); }
  float* item_powers(int64_t i, int64_t chunk) const { return powers + (i * chunks + chunk) * rows * kChunk; }
  float* item_peaks(int64_t i, int64_t chunk) const { return peaks + (i * chunks + chunk) * row_stride; }
  float* item_totals(int64_t i, int64_t chunk) const { return totals + (i * chunks + chunk) * row_stride; }
  // How many keys from `from` on a query sees at most.
  int64_t seen(int64_t query, int64_t from, int64_t count) const {
    if (call.visible != nullptr) return count;
    const int64_t n = call.seq - call.q_len + query + 1 - from;
    return n < 0 ? 0 : n > count ? count : n;
  }
};

int64_t chunk_keys(const loki_column_call& c, int64_t chunk) {
  const int64_t left = c.seq - chunk * kChunk;
  return left < kChunk ? left : kChunk;
}

// Brings some query rows to the form that the products take.
void prepare_queries(void* context, int64_t index) {
  ColumnRun& run = *static_cast<ColumnRun*>(context);
  const loki_column_call& c = run.call;
  const int64_t item = index / run.prepared_blocks(), from = index % run.prepared_blocks() * kPrepared;
  const int64_t count = run.rows - from < kPrepared ? run.rows - from : kPrepared;
  const int64_t batch = (run.first_item + item) / c.kv_heads, kv = (run.first_item + item) % c.kv_heads;
  const void* rows[kPrepared];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t head = kv * c.group + (from + i) / run.queries;
    const int64_t query = run.first_query + (from + i) % run.queries;
    rows[i] = static_cast<const char*>(c.query) + batch * c.query_batch_stride +
              head * c.query_head_stride + query * c.query_row_stride;
    const bool sunk = c.sink_logits != nullptr;
    run.sinks[item * run.row_stride + from + i] =
        sunk ? static_cast<float>(c.sink_logits[head] * kLog2) : -__builtin_inff();
  }
  RowsQuery query{count, c.keys.dim, false, run.item_queries(item) + from * run.words()};
  run.k.prepare_rows(rows, c.query_dtype, c.keys.dtype, &query);
}

// Products and powers of a block of query rows with a chunk of keys.
void chunk_powers(void* context, int64_t index) {
  ColumnRun& run = *static_cast<ColumnRun*>(context);
  const loki_column_call& c = run.call;
  const int64_t item = index / (run.chunks * run.row_blocks());
  const int64_t chunk = index / run.row_blocks() % run.chunks;
  const int64_t from = index % run.row_blocks() * kRowBlock;
  const int64_t rows = run.rows - from < kRowBlock ? run.rows - from : kRowBlock;
  const int64_t first = chunk * kChunk, count = chunk_keys(c, chunk);
  const int64_t batch = (run.first_item + item) / c.kv_heads, kv = (run.first_item + item) % c.kv_heads;

  int64_t seen[kRowBlock];
  const uint8_t* visible[kRowBlock];
  bool any = false;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t query = run.first_query + (from + i) % run.queries;
    seen[i] = run.seen(query, first, count);
    any = any || seen[i] > 0;
    if (c.visible != nullptr)
      visible[i] = c.visible + batch * c.visible_batch_stride + kv * c.visible_head_stride +
                   query * c.visible_row_stride + first;
  }
  const int64_t lines = panel_lines(c.keys.dim, run.paired);
  Arena& arena = Arena::mine();
  if (!arena.reserve(Arena::size<float>(kChunk * lines) + Arena::size<float>(kChunk))) {
    run.status = LOKI_NO_MEMORY;
    return;
  }
  float* panel = arena.take<float>(kChunk * lines);
  float* bias = c.bias == nullptr ? nullptr : arena.take<float>(kChunk);
  if (any) {
    const void* keys[kChunk];
    const char* key = static_cast<const char*>(c.keys.data) + batch * c.keys.batch_stride +
                      kv * c.keys.head_stride;
    for (int64_t i = 0; i < round_up(count, 16); ++i)
      keys[i] = key + (first + (i < count ? i : count - 1)) * c.keys.row_stride;
    run.k.key_panel(keys, round_up(count, 16), c.keys.dtype, c.keys.dim, run.paired, panel);
  }
  if (any && bias != nullptr) {  // whole registers are read, the caller's rows may end anywhere
    memset(bias, 0, sizeof(float) * kChunk);
    const char* given = reinterpret_cast<const char*>(c.bias) + batch * c.bias_batch_stride +
                        kv * c.bias_head_stride;
    memcpy(bias, reinterpret_cast<const float*>(given) + first, sizeof(float) * static_cast<size_t>(count));
  }
  const ColumnRows queries{run.item_queries(item) + from * run.words(), run.words(), rows, lines,
                           run.paired, seen, c.visible == nullptr ? nullptr : visible, bias,
                           static_cast<float>(c.scaling), static_cast<float>(c.softcap)};
  run.k.column_powers(queries, panel, count, run.item_powers(item, chunk) + from * kChunk,
                      run.item_peaks(item, chunk) + from, run.item_totals(item, chunk) + from);
}

// Turns the peaks of sixteen query rows into factors.
void row_factors(void* context, int64_t index) {
  ColumnRun& run = *static_cast<ColumnRun*>(context);
  const int64_t blocks = run.row_stride / 16, item = index / blocks, from = index % blocks * 16;
  for (int64_t r = run.rows; r < from + 16; ++r) {  // behind the last row
    run.sinks[item * run.row_stride + r] = -__builtin_inff();
    for (int64_t chunk = 0; chunk < run.chunks; ++chunk) {
      run.item_peaks(item, chunk)[r] = -__builtin_inff();
      run.item_totals(item, chunk)[r] = 0.0f;
    }
  }
  run.k.column_factors(run.item_peaks(item, 0) + from, run.item_totals(item, 0) + from, run.chunks,
                       run.row_stride, run.sinks + item * run.row_stride + from);
}

// Adds the wave's weights of one query head to a chunk of columns.
void add_columns(void* context, int64_t index) {
  ColumnRun& run = *static_cast<ColumnRun*>(context);
  const loki_column_call& c = run.call;
  const int64_t chunk = index % run.chunks, head = index / run.chunks % c.group;
  const int64_t item = index / run.chunks / c.group, count = chunk_keys(c, chunk);
  int64_t unseeing = 0;  // queries that lie before this chunk: their powers were never written
  if (c.visible == nullptr) {
    unseeing = chunk * kChunk - (c.seq - c.q_len + run.first_query);
    unseeing = unseeing < 0 ? 0 : unseeing;
  }
  const int64_t row = head * run.queries + unseeing;
  const int64_t out = (run.first_item + item) * c.group + head;
  if (unseeing < run.queries)
    run.k.column_add(run.item_powers(item, chunk) + row * kChunk, run.item_peaks(item, chunk) + row,
                     run.queries - unseeing, count, c.largest != 0, c.out + out * c.seq + chunk * kChunk);
}

// Small work is done by the calling thread alone.
void share_out(bool alone, int64_t count, Task task, void* context) {
  if (!alone) return parallel(count, task, context);
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

void run_wave(ColumnRun* run) {
  const loki_column_call& c = run->call;
  const int64_t last = c.visible != nullptr ? c.seq : c.seq - c.q_len + run->first_query + run->queries;
  run->chunks = round_up(last, kChunk) / kChunk;
  run->rows = run->queries * c.group;
  run->row_stride = round_up(run->rows, 16);
  const bool alone = run->items * run->rows * last * c.keys.dim < 16 * kWorthThreads;
  share_out(alone, run->items * run->prepared_blocks(), prepare_queries, run);
  share_out(alone, run->items * run->chunks * run->row_blocks(), chunk_powers, run);
  share_out(alone, run->items * run->row_stride / 16, row_factors, run);
  share_out(alone, run->items * c.group * run->chunks, add_columns, run);
}

struct HammingRun {
  const loki_hamming_call& call;
  const Kernels& k;
  int64_t chunks;
};

void hamming_chunk(void* context, int64_t index) {
  const HammingRun& run = *static_cast<HammingRun*>(context);
  const loki_hamming_call& c = run.call;
  const int64_t chunk = index % run.chunks, item = index / run.chunks, first = chunk * kChunk;
  const int64_t batch = item / c.kv_heads, kv = item % c.kv_heads;
  const int64_t count = c.seq - first < kChunk ? c.seq - first : kChunk;
  const char* codes = reinterpret_cast<const char*>(c.codes) + batch * c.codes_batch_stride +
                      kv * c.codes_head_stride + first * c.codes_row_stride;
  for (int64_t row = 0; row < c.group * c.q_len; ++row) {
    const int64_t head = kv * c.group + row / c.q_len, query = row % c.q_len;
    const char* asked = reinterpret_cast<const char*>(c.query) + batch * c.query_batch_stride +
                        head * c.query_head_stride + query * c.query_row_stride;
    float* out = c.out + ((batch * c.kv_heads * c.group + head) * c.q_len + query) * c.seq + first;
    run.k.differing_bits(codes, c.codes_row_stride, count, c.words,
                         reinterpret_cast<const uint32_t*>(asked), out);
  }
}

}  // namespace

int run_columns(const loki_column_call& call) {
  ColumnRun run{call, kernels()};
  run.paired = run.k.pairs && call.query_dtype == LOKI_BF16 && call.keys.dtype == LOKI_BF16;
  const int64_t all = call.batch * call.kv_heads, stride = round_up(call.seq, kChunk);
  const int64_t query_bytes = call.group * stride * static_cast<int64_t>(sizeof(float));
  const int64_t wished = call.window < kLeastQueries ? call.window : kLeastQueries;
  int64_t items = kScratchBytes / (query_bytes * wished);
  items = items < 1 ? 1 : items > all ? all : items;
  const int64_t least = round_up(kLeastRows, call.group) / call.group;
  int64_t queries = kScratchBytes / (query_bytes * items);
  queries = queries < least ? least : queries;
  const int64_t waves = (call.window + queries - 1) / queries;
  queries = (call.window + waves - 1) / waves;

  const int64_t rows = queries * call.group, row_stride = round_up(rows, 16), chunks = stride / kChunk;
  const int64_t sizes[] = {items * round_up(rows, 4) * row_floats(call.keys.dim),
                           items * chunks * rows * kChunk, items * chunks * row_stride,
                           items * chunks * row_stride, items * row_stride};
  float** const parts[] = {&run.query_rows, &run.powers, &run.peaks, &run.totals, &run.sinks};
  size_t bytes = 0;
  for (const int64_t size : sizes) bytes += Arena::size<float>(size);
  Arena& arena = Arena::shared();
  if (!arena.reserve(bytes)) return LOKI_NO_MEMORY;
  for (int i = 0; i < 5; ++i) *parts[i] = arena.take<float>(sizes[i]);

  memset(call.out, 0, sizeof(float) * static_cast<size_t>(all * call.group * call.seq));
  for (run.first_item = 0; run.first_item < all; run.first_item += items) {
    run.items = all - run.first_item < items ? all - run.first_item : items;
    for (run.first_query = call.q_len - call.window; run.first_query < call.q_len;
         run.first_query += queries) {
      const int64_t left = call.q_len - run.first_query;
      run.queries = left < queries ? left : queries;
      run_wave(&run);
      if (run.status != LOKI_OK) return run.status;
    }
  }
  return LOKI_OK;
}

int run_hamming(const loki_hamming_call& call) {
  HammingRun run{call, kernels(), round_up(call.seq, kChunk) / kChunk};
  const int64_t items = call.batch * call.kv_heads;
  const bool alone = items * call.group * call.q_len * call.seq * call.words < kWorthThreads;
  share_out(alone, items * run.chunks, hamming_chunk, &run);
  return LOKI_OK;
}

}  // namespace loki
