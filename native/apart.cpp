// What is done apart from an attention call: rows chosen from scores that came from elsewhere, and new
// rows appended.
#include <string.h>

#include <atomic>

#include "numbers.h"
#include "step.h"

namespace loki {
namespace {

struct ChooseRun {
  const loki_choose_call& call;
  const Kernels& k;
  std::atomic<int> status{LOKI_OK};
};

void choose_row(void* context, int64_t index) {
  ChooseRun& run = *static_cast<ChooseRun*>(context);
  const loki_choose_call& c = run.call;
  const int64_t batch = index / c.choosers, head = index % c.choosers, padded = round_up(c.seq, 16);
  Arena& arena = Arena::mine();
  if (!arena.reserve(Arena::size<float>(padded) + Arena::size<float>(3 * (padded + 64)))) {
    run.status = LOKI_NO_MEMORY;
    return;
  }
  float* settled = arena.take<float>(padded);
  float* scratch = arena.take<float>(3 * (padded + 64));
  const float* scores = reinterpret_cast<const float*>(
      reinterpret_cast<const char*>(c.scores) + batch * c.scores_batch_stride + head * c.scores_head_stride);
  const uint8_t* visible = c.visible == nullptr ? nullptr
      : c.visible + batch * c.visible_batch_stride + head * c.visible_head_stride;
  const uint8_t* forced = c.forced == nullptr ? nullptr
      : c.forced + batch * c.forced_batch_stride + head * c.forced_head_stride;
  // The kernels read whole registers; the caller's rows may end anywhere.
  memcpy(settled, scores, sizeof(float) * static_cast<size_t>(c.seq));
  for (int64_t i = c.seq; i < padded; ++i) settled[i] = 0.0f;
  int64_t shown = c.seq;
  if (visible != nullptr) {
    shown = 0;
    for (int64_t i = 0; i < c.seq; ++i) shown += visible[i] != 0;
  }
  run.k.settle(settled, c.seq, visible, settled);
  for (int64_t i = 0; forced != nullptr && i < c.seq; ++i)
    if (forced[i] && (visible == nullptr || visible[i])) settled[i] = __builtin_inff();
  int64_t wanted = c.wanted[index];
  wanted = wanted > shown ? shown : wanted;
  wanted = wanted > c.indices_width ? c.indices_width : wanted;
  int64_t* out = c.indices + index * c.indices_width;
  run.k.choose(settled, c.seq, wanted, scratch, out);
  for (int64_t i = wanted; i < c.indices_width; ++i) out[i] = -1;
  c.counts[index] = wanted;
}

struct MassRun {
  const loki_choose_call& call;
  std::atomic<int> status{LOKI_OK};
};

void mass_row(void* context, int64_t index) {
  MassRun& run = *static_cast<MassRun*>(context);
  const loki_choose_call& c = run.call;
  const int64_t batch = index / c.choosers, head = index % c.choosers;
  Arena& arena = Arena::mine();
  if (!arena.reserve(Arena::size<float>(c.seq))) {
    run.status = LOKI_NO_MEMORY;
    return;
  }
  const float* weights = reinterpret_cast<const float*>(
      reinterpret_cast<const char*>(c.scores) + batch * c.scores_batch_stride + head * c.scores_head_stride);
  const uint8_t* forced = c.forced == nullptr ? nullptr
      : c.forced + batch * c.forced_batch_stride + head * c.forced_head_stride;
  c.counts[index] = mass_count(weights, c.seq, forced, c.mass, arena.take<float>(c.seq));
}

struct AppendRun {
  const loki_append_call& call;
  const Kernels& k;
  int64_t blocks;
};

constexpr int64_t kAppendTokens = 64;

// Up to 64 new tokens of one KV head.
void append_block(void* context, int64_t index) {
  AppendRun& run = *static_cast<AppendRun*>(context);
  const loki_append_call& c = run.call;
  const int64_t block = index % run.blocks, pair = index / run.blocks;
  const int64_t batch = pair / c.kv_heads, head = pair % c.kv_heads;
  const int64_t from = block * kAppendTokens;
  const int64_t to = from + kAppendTokens < c.tokens ? from + kAppendTokens : c.tokens;
  float lead[1024];
  loki_rows scale_rows{c.scales, LOKI_F16, 1, c.scales_batch_stride, c.scales_head_stride, 2};
  const auto place = [&](const loki_rows& rows, int64_t row, int64_t unit) {
    return const_cast<char*>(row_at(c, rows, batch, head, row, unit));
  };
  for (int64_t i = from; i < to; ++i) {
    const int64_t t = c.start + i;
    const char* key = static_cast<const char*>(c.new_keys.data) + batch * c.new_keys.batch_stride +
                      head * c.new_keys.head_stride + i * c.new_keys.row_stride;
    const char* value = static_cast<const char*>(c.new_values.data) +
                        batch * c.new_values.batch_stride + head * c.new_values.head_stride +
                        i * c.new_values.row_stride;
    if (c.keys.data != nullptr)
      memcpy(place(c.keys, t, 1), key,
             static_cast<size_t>(c.keys.dim * number_bytes(c.keys.dtype)));
    if (c.values.data != nullptr)
      memcpy(place(c.values, t, 1), value,
             static_cast<size_t>(c.values.dim * number_bytes(c.values.dtype)));
    if (c.positions != nullptr)
      *reinterpret_cast<int32_t*>(reinterpret_cast<char*>(c.positions) +
                                  batch * c.positions_batch_stride + head * c.positions_head_stride +
                                  t * 4) = static_cast<int32_t>(c.first_position + i);
    if (c.key_map == nullptr) continue;
    run.k.project(key, c.new_keys.dtype, c.new_keys.dim,
                  c.key_map + head * c.new_keys.dim * c.lead_rank, c.lead_rank, lead);
    uint8_t* tile = reinterpret_cast<uint8_t*>(place(c.lead, t / kTileRows, kTileRows));
    uint16_t none = 0;
    uint16_t* scale = c.scales == nullptr
        ? &none : reinterpret_cast<uint16_t*>(place(scale_rows, t, 1));
    run.k.encode(lead, c.lead.dtype, c.lead_rank, c.lead.dim, tile, t % kTileRows, scale);
  }
}

}  // namespace

int run_choose(const loki_choose_call& call) {
  const int64_t rows = call.batch * call.choosers;
  if (call.mass > 0.0) {
    MassRun run{call};
    parallel(rows, mass_row, &run);
    return run.status;
  }
  ChooseRun run{call, kernels()};
  if (rows * call.seq * 4 < kWorthThreads)
    for (int64_t i = 0; i < rows; ++i) choose_row(&run, i);
  else
    parallel(rows, choose_row, &run);
  return run.status;
}

int run_append(const loki_append_call& call) {
  AppendRun run{call, kernels(), round_up(call.tokens, kAppendTokens) / kAppendTokens};
  const int64_t tasks = call.batch * call.kv_heads * run.blocks;
  if (call.tokens * call.batch < 16)
    for (int64_t i = 0; i < tasks; ++i) append_block(&run, i);
  else
    parallel(tasks, append_block, &run);
  return LOKI_OK;
}

}  // namespace loki
