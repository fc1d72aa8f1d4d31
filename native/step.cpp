// An item is a set of query heads that read the same rows: a KV head's group, or one query head where
// each chooses for itself. Its rows are scored and attended in chunks that do not depend on how many
// threads there are, and chunks are put together in their order: so results do not depend on it.
#include "step.h"

#include <string.h>

#include <atomic>
#include <chrono>

#include "numbers.h"

namespace loki {
namespace {

constexpr int64_t kScoreChunks = 8;       // chunks of one scoring task

struct Item {
  int64_t batch, kv_head, first_head, heads;
  int64_t seq, chunks;
  LeadQuery lead;
  RowsQuery rows;
  float *exponentials, *chunk_peaks, *chunk_totals, *factors, *scores, *choose_scratch;
  int64_t stride;
  uint8_t* forced;
  int64_t* indices;
  int64_t count, splits;
  float *peaks, *totals, *sums, *weights;
  int64_t sums_stride;
  const float** head_rows;
  float* lead_rows;
};

// Hands out memory, or only measures it.
class Layout {
 public:
  explicit Layout(Arena* arena) : arena_(arena) {}
  template <typename T>
  T* take(int64_t count) {
    bytes_ += Arena::size<T>(count);
    return arena_ == nullptr ? nullptr : arena_->take<T>(count);
  }
  size_t bytes() const { return bytes_; }

 private:
  Arena* arena_;
  size_t bytes_ = 0;
};

struct Run {
  const loki_call& call;
  const Kernels& k;
  Work work;
  int64_t choosers, heads_per_item;
  Item* items;        // all of them when the work is done in phases, else null
  int64_t most_chunks, most_splits, score_tasks;
  std::atomic<int> status{LOKI_OK};
  std::atomic<int64_t> stages[3]{};

  bool alone() const { return call.reduce == LOKI_REDUCE_NONE && call.group > 1; }
  bool scores() const { return work == Work::kScore || work == Work::kStep; }
  bool reads() const { return work != Work::kScore; }
  bool sums_soft_max(const Item& item) const {
    return work == Work::kStep && call.reduce == LOKI_REDUCE_SOFTMAX_SUM && item.heads > 1;
  }
};

enum Stage { kScoring = 0, kChoosing = 1, kAttending = 2 };

// Adds the time until its end to a stage, if anybody wants to know.
class Stopwatch {
 public:
  Stopwatch(Run& run, Stage stage) : run_(run), stage_(stage) {
    if (run_.call.stages != nullptr) start_ = std::chrono::steady_clock::now();
  }
  ~Stopwatch() {
    if (run_.call.stages == nullptr) return;
    const auto taken = std::chrono::steady_clock::now() - start_;
    run_.stages[stage_] += std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count();
  }

 private:
  Run& run_;
  Stage stage_;
  std::chrono::steady_clock::time_point start_{};
};

const uint8_t* visible_of(const loki_call& c, int64_t batch) {
  return c.visible == nullptr ? nullptr : c.visible + batch * c.visible_batch_stride;
}

int64_t most_rows_read(const Run& run, const Item& item) {
  if (run.work == Work::kDense) return item.seq;
  return run.call.indices_width < item.seq ? run.call.indices_width : item.seq;
}

void describe(const Run& run, int64_t index, Item* item) {
  const loki_call& c = run.call;
  const int64_t heads = c.kv_heads * c.group;
  item->batch = index / run.choosers;
  const int64_t chooser = index % run.choosers;
  item->heads = run.heads_per_item;
  item->first_head = chooser * run.heads_per_item;
  item->kv_head = item->first_head / (heads / c.kv_heads);
  item->seq = c.lengths == nullptr ? c.seq : c.lengths[item->batch];
  item->chunks = round_up(item->seq, kChunk) / kChunk;
  item->stride = round_up(item->seq, kChunk);
}

void lay_out(const Run& run, Item* item, Layout* memory) {
  const loki_call& c = run.call;
  const int64_t padded = round_up(item->heads, 4);
  item->head_rows = memory->take<const float*>(item->heads);
  if (run.scores()) {
    LeadQuery& lead = item->lead;
    lead.heads = item->heads;
    lead.rank = c.lead_rank;
    lead.kind = c.lead.dtype;
    lead.tiled = c.lead_kind == LOKI_LEAD_TILES;
    lead.lines = lead.tiled ? c.lead.dim : 0;
    const int64_t words = lead.tiled ? run.k.lead_words(lead.kind, lead.lines) : 0;
    lead.words = memory->take<int32_t>(words * item->heads);
    lead.start = memory->take<int32_t>(item->heads);
    lead.factor = memory->take<float>(item->heads);
    lead.rows = memory->take<float>(lead.tiled ? 0 : padded * row_floats(c.lead_rank));
    const int64_t widest = c.keys.dim > c.lead_rank ? c.keys.dim : c.lead_rank;
    item->lead_rows = memory->take<float>(item->heads * round_up(widest, 16));
    const int64_t least = 3 * (item->stride + 64);
    const int64_t logits = item->heads * item->stride;
    item->exponentials = memory->take<float>(logits > least ? logits : least);
    // The exponentials are of no more use when rows are chosen.
    item->choose_scratch = item->exponentials;
    item->chunk_peaks = memory->take<float>(item->chunks * item->heads);
    item->chunk_totals = memory->take<float>(item->chunks * item->heads);
    item->factors = memory->take<float>(item->chunks * item->heads);
    item->scores = memory->take<float>(item->stride);
    item->forced = c.mass > 0.0 ? memory->take<uint8_t>(item->stride) : nullptr;
  }
  if (run.reads()) {
    item->rows.heads = item->heads;
    item->rows.dim = c.keys.dim;
    item->rows.rows = memory->take<float>(padded * row_floats(c.keys.dim));
    const int64_t most = round_up(most_rows_read(run, *item), kChunk) / kChunk;
    item->sums_stride = item->heads * round_up(c.values.dim, 16);
    item->peaks = memory->take<float>(most * item->heads);
    item->totals = memory->take<float>(most * item->heads);
    item->sums = memory->take<float>(most * item->sums_stride);
    const bool sums = c.column_sums != nullptr && run.work == Work::kDense;
    item->weights = sums ? memory->take<float>(item->heads * item->stride) : nullptr;
  }
}

const char* head_at(const void* data, const Item& item, int64_t h, int64_t batch_stride,
                    int64_t head_stride) {
  return static_cast<const char*>(data) + item.batch * batch_stride +
         (item.first_head + h) * head_stride;
}

// Brings the queries of an item to the forms that the kernels take.
void prepare(const Run& run, Item* item) {
  const loki_call& c = run.call;
  if (run.scores() && c.lead_kind != LOKI_LEAD_RECENCY) {
    const int64_t width = round_up(c.keys.dim > c.lead_rank ? c.keys.dim : c.lead_rank, 16);
    for (int64_t h = 0; h < item->heads; ++h) {
      const char* row = head_at(c.lead_query, *item, h, c.lead_query_batch_stride,
                                c.lead_query_head_stride);
      float* out = item->lead_rows + h * width;
      if (c.query_map != nullptr) {
        const float* map = c.query_map + item->kv_head * c.keys.dim * c.lead_rank;
        run.k.project(row, c.lead_query_dtype, c.keys.dim, map, c.lead_rank, out);
      } else {
        for (int64_t i = 0; i < c.lead_rank; ++i) out[i] = load_number(row, c.lead_query_dtype, i);
      }
      item->head_rows[h] = out;
    }
    // Logits become exponents of 2 right away; a cap comes between, and then that does it.
    const bool powers = run.sums_soft_max(*item) && c.softcap == 0.0;
    const double scaling = c.scaling * (powers ? kLog2 : 1.0);
    run.k.prepare_lead(item->head_rows, static_cast<float>(scaling), &item->lead);
  }
  if (run.reads()) {
    for (int64_t h = 0; h < item->heads; ++h)
      item->head_rows[h] = reinterpret_cast<const float*>(
          head_at(c.query, *item, h, c.query_batch_stride, c.query_head_stride));
    run.k.prepare_rows(reinterpret_cast<const void* const*>(item->head_rows), c.query_dtype,
                       c.keys.dtype, &item->rows);
  }
}

// Score ------------------------------------------------------------------------------------------

void chunk_logits(const Run& run, const Item& item, int64_t from, int64_t count, float* logits,
                  int64_t stride) {
  const loki_call& c = run.call;
  if (c.lead_kind == LOKI_LEAD_TILES) {
    const uint8_t* tiles[kChunk / kTileRows];
    const uint16_t* scales[kChunk / kTileRows];
    uint16_t last[kTileRows] = {0};
    const int64_t tile_count = round_up(count, kTileRows) / kTileRows;
    loki_rows scale_rows{c.scales, LOKI_F16, 1, c.scales_batch_stride, c.scales_head_stride, 2};
    for (int64_t i = 0; i < tile_count; ++i) {
      const int64_t row = from + i * kTileRows;
      tiles[i] = reinterpret_cast<const uint8_t*>(
          row_at(c, c.lead, item.batch, item.kv_head, row / kTileRows, kTileRows));
      scales[i] = nullptr;
      if (c.scales == nullptr) continue;
      scales[i] = reinterpret_cast<const uint16_t*>(
          row_at(c, scale_rows, item.batch, item.kv_head, row));
      if (item.seq - row < kTileRows) {  // behind the last row there may be no memory of ours
        memcpy(last, scales[i], 2 * static_cast<size_t>(item.seq - row));
        scales[i] = last;
      }
    }
    run.k.tile_logits(tiles, scales, tile_count, item.lead, logits, stride);
  } else {
    const void* rows[kChunk + 16];
    alignas(64) float scratch[4 * kChunk];
    for (int64_t i = 0; i < round_up(count, 16); ++i)
      rows[i] = row_at(c, c.lead, item.batch, item.kv_head, from + (i < count ? i : count - 1));
    run.k.row_logits(rows, count, c.lead.dtype, item.lead, logits, stride, scratch);
  }
  if (c.softcap != 0.0)
    for (int64_t h = 0; h < item.heads; ++h)
      run.k.soft_cap(logits + h * stride, round_up(count, 16), static_cast<float>(c.softcap),
                     run.sums_soft_max(item) ? static_cast<float>(kLog2) : 1.0f);
}

int64_t chunk_rows(const Item& item, int64_t chunk) {
  const int64_t left = item.seq - chunk * kChunk;
  return left < kChunk ? left : kChunk;
}

void score_chunk(const Run& run, const Item& item, int64_t chunk) {
  const loki_call& c = run.call;
  const int64_t from = chunk * kChunk, count = chunk_rows(item, chunk);
  if (run.work == Work::kScore) {
    float* out = c.scores + (item.batch * c.kv_heads * c.group + item.first_head) * c.seq + from;
    // Through a buffer of our own: whole tiles do not fit the caller's rows.
    chunk_logits(run, item, from, count, item.exponentials + from, item.stride);
    for (int64_t h = 0; h < item.heads; ++h)
      memcpy(out + h * c.seq, item.exponentials + h * item.stride + from,
             sizeof(float) * static_cast<size_t>(count));
    return;
  }
  if (c.lead_kind == LOKI_LEAD_RECENCY) {
    for (int64_t i = 0; i < count; ++i) item.scores[from + i] = static_cast<float>(from + i);
    return;
  }
  float* logits = item.exponentials + from;
  chunk_logits(run, item, from, count, logits, item.stride);
  if (!run.sums_soft_max(item)) return;
  const uint8_t* visible = visible_of(c, item.batch);
  // The plane of the next chunk comes in shares, one per head, behind what scoring asked for itself.
  const bool more = c.lead_kind == LOKI_LEAD_TILES && chunk + 1 < item.chunks;
  const int64_t share = more ? c.lead.dim * kLineBytes * (kChunk / kTileRows) / item.heads : 0;
  const int64_t step = share / (kChunk / 16) / 64 * 64;
  const char* next = !more ? nullptr
      : row_at(c, c.lead, item.batch, item.kv_head, (from + kChunk) / kTileRows, kTileRows);
  for (int64_t h = 0; h < item.heads; ++h)
    run.k.exponentials(logits + h * item.stride, count, visible ? visible + from : nullptr,
                       item.chunk_peaks + chunk * item.heads + h,
                       item.chunk_totals + chunk * item.heads + h, next + h * share, step);
}

// Choose -----------------------------------------------------------------------------------------

// One score per row from those of the heads; exponentials become shares of each head's total.
void agree(const Run& run, const Item& item) {
  const loki_call& c = run.call;
  if (c.lead_kind == LOKI_LEAD_RECENCY) return;
  if (!run.sums_soft_max(item)) {
    run.k.largest(item.exponentials, item.stride, item.heads, item.seq, item.scores);
    return;
  }
  for (int64_t h = 0; h < item.heads; ++h) {
    const float none = -__builtin_inff();
    const bool sunk = c.sink_logits != nullptr;
    const float sink = sunk ? static_cast<float>(c.sink_logits[item.first_head + h] * kLog2) : none;
    float peak = sink;
    for (int64_t i = 0; i < item.chunks; ++i) {
      const float p = item.chunk_peaks[i * item.heads + h];
      peak = p > peak || p != p ? p : peak;
    }
    if (peak == none) peak = 0.0f;
    double total = sunk ? __builtin_exp2(static_cast<double>(sink - peak)) : 0.0;
    for (int64_t i = 0; i < item.chunks; ++i) {
      const float p = item.chunk_peaks[i * item.heads + h];
      const double factor = __builtin_exp2(static_cast<double>(p) - static_cast<double>(peak));
      total += static_cast<double>(item.chunk_totals[i * item.heads + h]) * factor;
      item.factors[i * item.heads + h] = static_cast<float>(factor);
    }
    const double inverse = total == 0.0 ? 0.0 : 1.0 / total;
    for (int64_t i = 0; i < item.chunks; ++i)
      item.factors[i * item.heads + h] =
          static_cast<float>(static_cast<double>(item.factors[i * item.heads + h]) * inverse);
  }
  for (int64_t i = 0; i < item.chunks; ++i)
    run.k.weigh(item.exponentials + i * kChunk, item.stride, item.heads, chunk_rows(item, i),
                item.factors + i * item.heads, item.scores + i * kChunk);
}

// Calls `mark` with each sink and recent row; returns how many rows are visible.
template <typename Mark>
int64_t forced_rows(const loki_call& c, const Item& item, Mark mark) {
  const uint8_t* visible = visible_of(c, item.batch);
  if (visible == nullptr) {
    for (int64_t t = 0; t < c.sinks && t < item.seq; ++t) mark(t);
    for (int64_t t = item.seq > c.recents ? item.seq - c.recents : 0; t < item.seq; ++t) mark(t);
    return item.seq;
  }
  int64_t shown = 0;
  for (int64_t t = 0; t < item.seq; ++t)
    if (visible[t] && shown++ < c.sinks) mark(t);
  for (int64_t t = item.seq - 1, left = c.recents; t >= 0 && left > 0; --t)
    if (visible[t]) mark(t), --left;
  return shown;
}

int64_t limited(const loki_call& c, int64_t wanted, int64_t visible) {
  if (c.cap > 0 && wanted > c.cap) wanted = c.cap;
  if (wanted < c.floor) wanted = c.floor;
  if (visible <= c.dense_below || wanted > visible) wanted = visible;
  return wanted;
}

int64_t count_by_mass(const Run& run, Item* item) {
  const loki_call& c = run.call;
  const uint8_t* visible = visible_of(c, item->batch);
  memset(item->forced, 0, static_cast<size_t>(item->seq));
  const int64_t shown = forced_rows(c, *item, [&](int64_t t) { item->forced[t] = 1; });
  float* weights = item->choose_scratch;
  memcpy(weights, item->scores, sizeof(float) * static_cast<size_t>(item->seq));
  if (!run.sums_soft_max(*item)) {
    float peak, total;
    for (int64_t i = 0; i < item->seq; ++i) weights[i] *= static_cast<float>(kLog2);
    run.k.exponentials(weights, item->seq, visible, &peak, &total, nullptr, 0);
  }
  float* scratch = weights + round_up(item->seq, 16);
  return limited(c, mass_count(weights, item->seq, item->forced, c.mass, scratch), shown);
}

void choose(const Run& run, Item* item) {
  const loki_call& c = run.call;
  const int64_t slot = item->batch * run.choosers + item->first_head / item->heads;
  item->indices = c.indices + slot * c.indices_width;
  agree(run, *item);
  int64_t wanted = c.wanted != nullptr ? c.wanted[item->batch]
                   : c.count > 0       ? c.count
                                       : count_by_mass(run, item);
  run.k.settle(item->scores, item->seq, visible_of(c, item->batch), item->scores);
  const int64_t shown =
      forced_rows(c, *item, [&](int64_t t) { item->scores[t] = __builtin_inff(); });
  wanted = wanted > shown ? shown : wanted;
  wanted = wanted > c.indices_width ? c.indices_width : wanted;
  run.k.choose(item->scores, item->seq, wanted, item->choose_scratch, item->indices);
  for (int64_t i = wanted; i < c.indices_width; ++i) item->indices[i] = -1;
  c.counts[slot] = item->count = wanted;
  item->splits = round_up(wanted, kChunk) / kChunk;
}

// Attend -----------------------------------------------------------------------------------------

// The rows of one split as addresses; `rows`, if wanted, says which they are.
int64_t list_rows(const Run& run, const Item& item, int64_t split, const void** keys,
                  const void** values, int64_t* rows) {
  const loki_call& c = run.call;
  const uint8_t* visible = run.work == Work::kDense ? visible_of(c, item.batch) : nullptr;
  const int64_t from = split * kChunk;
  const int64_t to = from + kChunk < item.count ? from + kChunk : item.count;
  int64_t listed = 0;
  for (int64_t i = from; i < to; ++i) {
    if (visible != nullptr && !visible[i]) continue;
    const int64_t t = run.work == Work::kDense ? i : item.indices[i];
    keys[listed] = row_at(c, c.keys, item.batch, item.kv_head, t);
    values[listed] = row_at(c, c.values, item.batch, item.kv_head, t);
    if (rows != nullptr) rows[listed] = t;
    ++listed;
  }
  for (int64_t i = listed; listed > 0 && i < round_up(listed, 16); ++i) {
    keys[i] = keys[listed - 1];
    values[i] = values[listed - 1];
  }
  return listed;
}

void attend_split(const Run& run, const Item& item, int64_t split) {
  const loki_call& c = run.call;
  const void *keys[kChunk + 16], *values[kChunk + 16];
  alignas(64) float scratch[5 * kChunk];
  int64_t rows[kChunk];
  Partial out{item.peaks + split * item.heads, item.totals + split * item.heads,
              item.sums + split * item.sums_stride};
  const int64_t listed =
      list_rows(run, item, split, keys, values, item.weights == nullptr ? nullptr : rows);
  if (listed == 0) {
    for (int64_t h = 0; h < item.heads; ++h) {
      out.peak[h] = -__builtin_inff();
      out.total[h] = 0.0f;
    }
    if (item.weights != nullptr)
      memset(item.weights + split * item.heads * kChunk, 0,
             sizeof(float) * static_cast<size_t>(item.heads * kChunk));
    return;
  }
  float* weights = item.weights == nullptr ? nullptr : item.weights + split * item.heads * kChunk;
  run.k.attend(RowList{keys, values, listed}, c.keys.dtype, c.values.dtype, c.values.dim, item.rows,
               static_cast<float>(c.scaling), static_cast<float>(c.softcap), scratch, &out, weights);
  if (weights == nullptr) return;
  // From the order of the list to that of the rows; hidden rows get nothing.
  for (int64_t h = 0; h < item.heads; ++h) {
    float* w = weights + h * kChunk;
    int64_t i = listed;
    for (int64_t t = kChunk - 1; t >= 0; --t) {
      const bool mine = i > 0 && rows[i - 1] == split * kChunk + t;
      w[t] = mine ? w[--i] : 0.0f;
    }
  }
}

void finish(const Run& run, const Item& item) {
  const loki_call& c = run.call;
  const int64_t padded = round_up(c.values.dim, 16), bytes = number_bytes(c.query_dtype);
  float peaks[1], totals[1];
  for (int64_t h = 0; h < item.heads; ++h) {
    const int64_t head = item.first_head + h;
    const int64_t place = item.batch * c.kv_heads * c.group + head;
    char* out = static_cast<char*>(c.out) + place * c.values.dim * bytes;
    run.k.merge(item.peaks + h, item.totals + h, item.sums + h * padded, item.splits, item.heads,
                item.sums_stride, c.values.dim,
                c.sink_logits == nullptr ? nullptr : c.sink_logits + head, c.query_dtype, out,
                c.log_sum_exp == nullptr ? nullptr : c.log_sum_exp + place, peaks, totals);
    if (item.weights == nullptr) continue;
    float* sums = c.column_sums + (item.batch * c.kv_heads + item.kv_head) * c.seq;
    for (int64_t t = 0; h == 0 && t < c.seq; ++t) sums[t] = 0.0f;
    for (int64_t s = 0; s < item.splits; ++s) {
      const double grown = static_cast<double>(item.peaks[s * item.heads + h]) - static_cast<double>(peaks[0]);
      if (totals[0] == 0.0f) continue;
      const float factor = static_cast<float>(__builtin_exp2(grown) / static_cast<double>(totals[0]));
      const float* w = item.weights + (s * item.heads + h) * kChunk;
      const int64_t count = item.count - s * kChunk < kChunk ? item.count - s * kChunk : kChunk;
      for (int64_t t = 0; t < count; ++t)
        if (w[t] != 0.0f) sums[s * kChunk + t] += w[t] * factor;
    }
  }
}

// Which rows an item reads when nothing is chosen here.
void given_rows(const Run& run, Item* item) {
  const loki_call& c = run.call;
  if (run.work == Work::kAttend) {
    const int64_t slot = item->batch * run.choosers + item->first_head / item->heads;
    item->indices = c.indices + slot * c.indices_width;
    item->count = c.counts[slot];
  } else {
    item->count = item->seq;
  }
  item->splits = round_up(item->count, kChunk) / kChunk;
}

// In order ---------------------------------------------------------------------------------------

void whole_item(void* context, int64_t index) {
  Run& run = *static_cast<Run*>(context);
  Item item{};
  describe(run, index, &item);
  Layout measured(nullptr);
  lay_out(run, &item, &measured);
  Arena& arena = Arena::mine();
  if (!arena.reserve(measured.bytes())) {
    run.status = LOKI_NO_MEMORY;
    return;
  }
  Layout memory(&arena);
  lay_out(run, &item, &memory);
  {
    Stopwatch watch(run, kScoring);
    prepare(run, &item);
    if (run.scores())
      for (int64_t i = 0; i < item.chunks; ++i) score_chunk(run, item, i);
  }
  if (!run.reads()) return;
  if (run.work == Work::kStep) {
    Stopwatch watch(run, kChoosing);
    choose(run, &item);
  } else {
    given_rows(run, &item);
  }
  Stopwatch watch(run, kAttending);
  for (int64_t i = 0; i < item.splits; ++i) attend_split(run, item, i);
  finish(run, item);
}

void prepare_task(void* context, int64_t index) {
  Run& run = *static_cast<Run*>(context);
  prepare(run, &run.items[index]);
  if (run.reads() && run.work != Work::kStep) given_rows(run, &run.items[index]);
}

void score_task(void* context, int64_t index) {
  Run& run = *static_cast<Run*>(context);
  const Item& item = run.items[index / run.score_tasks];
  Stopwatch watch(run, kScoring);
  const int64_t first = index % run.score_tasks * kScoreChunks;
  for (int64_t i = first; i < first + kScoreChunks && i < item.chunks; ++i) score_chunk(run, item, i);
}

void choose_task(void* context, int64_t index) {
  Run& run = *static_cast<Run*>(context);
  Stopwatch watch(run, kChoosing);
  choose(run, &run.items[index]);
}

void attend_task(void* context, int64_t index) {
  Run& run = *static_cast<Run*>(context);
  const Item& item = run.items[index / run.most_splits];
  Stopwatch watch(run, kAttending);
  const int64_t split = index % run.most_splits;
  if (split < item.splits) attend_split(run, item, split);
}

void finish_task(void* context, int64_t index) {
  Run& run = *static_cast<Run*>(context);
  finish(run, run.items[index]);
}

// Few items for many threads: every phase is shared out, with a wait between two of them.
int in_phases(Run* run, int64_t count) {
  Arena& arena = Arena::shared();
  size_t bytes = Arena::size<Item>(count);
  int64_t chunks = 1, splits = 1;
  for (int64_t i = 0; i < count; ++i) {
    Item item{};
    describe(*run, i, &item);
    Layout measured(nullptr);
    lay_out(*run, &item, &measured);
    bytes += measured.bytes();
    if (item.chunks > chunks) chunks = item.chunks;
    const int64_t most = round_up(most_rows_read(*run, item), kChunk) / kChunk;
    if (most > splits) splits = most;
  }
  if (!arena.reserve(bytes)) return LOKI_NO_MEMORY;
  run->items = arena.take<Item>(count);
  for (int64_t i = 0; i < count; ++i) {
    run->items[i] = Item{};
    describe(*run, i, &run->items[i]);
    Layout memory(&arena);
    lay_out(*run, &run->items[i], &memory);
  }
  run->score_tasks = round_up(chunks, kScoreChunks) / kScoreChunks;
  run->most_splits = splits;
  parallel(count, prepare_task, run);
  if (run->scores()) parallel(count * run->score_tasks, score_task, run);
  if (run->work == Work::kStep) parallel(count, choose_task, run);
  if (run->reads()) {
    parallel(count * run->most_splits, attend_task, run);
    parallel(count, finish_task, run);
  }
  return run->status;
}

int64_t bytes_read(const Run& run) {
  const loki_call& c = run.call;
  const int64_t rows = run.work == Work::kDense ? c.seq : run.reads() ? c.indices_width : 0;
  const int64_t scored = run.scores() ? c.seq * c.lead_rank * 2 : 0;
  return c.batch * c.kv_heads * (scored + rows * (c.keys.dim + c.values.dim) * 2);
}

}  // namespace

int run(const loki_call& call, Work work) {
  Run run{call, kernels(), work, 0, 0, nullptr, 0, 0, 0};
  // Without a choice to share, the group still shares the rows that it reads.
  const bool alone = run.alone() && work != Work::kDense && work != Work::kScore;
  run.choosers = alone ? call.kv_heads * call.group : call.kv_heads;
  run.heads_per_item = alone ? 1 : call.group;
  const int64_t count = call.batch * run.choosers, workers = threads();
  if (bytes_read(run) < kWorthThreads) {
    for (int64_t i = 0; i < count; ++i) whole_item(&run, i);
  } else if (workers > 1 && count % workers != 0 && count < 4 * workers) {
    run.status = in_phases(&run, count);
  } else {
    parallel(count, whole_item, &run);
  }
  for (int i = 0; call.stages != nullptr && i < 3; ++i) call.stages[i] += run.stages[i];
  return run.status;
}

}  // namespace loki
