// Wrong arguments: each gets the status that fits, and nothing is written.
#include <functional>

#include "choice.h"
#include "appending.h"

namespace loki_test {
namespace {

int failures = 0, checks = 0;

void expect(const char* what, int got, int wanted) {
  ++checks;
  if (got == wanted) return;
  ++failures;
  fprintf(stderr, "%s: status %d, should be %d\n", what, got, wanted);
}

// A small call that every entry point accepts.
Scene sound_scene() {
  Random random(1);
  Scene s;
  loki_call& c = s.call;
  c.batch = c.kv_heads = 2;
  c.group = 3;
  c.seq = 40;
  c.scaling = 0.2;
  s.keys.rows.dim = s.values.rows.dim = 32;
  draw_rows(random, &s, &s.keys, LOKI_F32, false);
  draw_rows(random, &s, &s.values, LOKI_F32, false);
  c.keys = s.keys.rows;
  c.values = s.values.rows;
  s.query = draw_query(random, s, 32, LOKI_F32, &c.query_batch_stride, &c.query_head_stride);
  c.query = s.query.as<char>();
  c.lead_kind = LOKI_LEAD_TILES;
  c.lead_rank = 16;
  draw_tiles(random, &s, LOKI_INT8, false);
  c.lead_query = c.query;
  c.lead_query_batch_stride = c.query_batch_stride;
  c.lead_query_head_stride = c.query_head_stride;
  c.count = c.indices_width = 12;
  return s;
}

// The same call goes through every door, so what is refused later is refused for what was changed.
void check_sound(const Scene& s) {
  const Results results(s);
  const loki_call c = results.into(s.call);
  expect("score: sound", loki_score(&c), LOKI_OK);
  expect("step: sound", loki_step(&c), LOKI_OK);
  expect("attend: sound", loki_attend(&c), LOKI_OK);  // to what the step chose
  expect("dense: sound", loki_dense(&c), LOKI_OK);
}

using Change = std::function<void(loki_call*)>;

struct Wrong {
  const char* what;
  int status;
  Change change;
};

// Calls with one thing wrong; no result may differ from what was there.
void refuse(const char* entry, int (*function)(const loki_call*), const Scene& s, const std::vector<Wrong>& all,
            const Change& prepare) {
  for (const Wrong& wrong : all) {
    const Results before(s), results(s);
    loki_call c = results.into(s.call);
    prepare(&c);
    wrong.change(&c);
    char what[200];
    snprintf(what, sizeof what, "%s: %s", entry, wrong.what);
    expect(what, function(&c), wrong.status);
    if (const char* other = results.differs(before)) {
      ++failures;
      fprintf(stderr, "%s: wrote %s\n", what, other);
    }
  }
}

// What `check_sizes` and the like must find in each call.
std::vector<Wrong> wrong_sizes() {
  static const int64_t too_long = -1;
  static std::vector<int64_t> lengths(8, too_long), long_lengths(8, INT64_MAX);
  static const int32_t table[64] = {0};
  return {
      {"batch 0", LOKI_BAD_SIZE, [](loki_call* c) { c->batch = 0; }},
      {"kv_heads -1", LOKI_BAD_SIZE, [](loki_call* c) { c->kv_heads = -1; }},
      {"group 0", LOKI_BAD_SIZE, [](loki_call* c) { c->group = 0; }},
      {"seq 0", LOKI_BAD_SIZE, [](loki_call* c) { c->seq = 0; }},
      {"seq beyond 32 bits", LOKI_BAD_SIZE, [](loki_call* c) { c->seq = int64_t{1} << 31; }},
      {"a negative length", LOKI_BAD_SIZE, [](loki_call* c) { c->lengths = lengths.data(); }},
      {"a length beyond seq", LOKI_BAD_SIZE, [](loki_call* c) { c->lengths = long_lengths.data(); }},
      {"pages of 0 rows", LOKI_BAD_SIZE,
       [](loki_call* c) { c->block_table = table, c->table_stride = 64, c->page_size = 0; }},
      {"pages that split tiles", LOKI_BAD_SIZE,
       [](loki_call* c) { c->block_table = table, c->table_stride = 64, c->page_size = 24; }},
      {"too few pages", LOKI_BAD_SIZE,
       [](loki_call* c) { c->block_table = table, c->table_stride = 1, c->page_size = 16; }},
  };
}

std::vector<Wrong> wrong_rows() {
  return {
      {"no query", LOKI_NULL_POINTER, [](loki_call* c) { c->query = nullptr; }},
      {"no out", LOKI_NULL_POINTER, [](loki_call* c) { c->out = nullptr; }},
      {"no keys", LOKI_NULL_POINTER, [](loki_call* c) { c->keys.data = nullptr; }},
      {"no values", LOKI_NULL_POINTER, [](loki_call* c) { c->values.data = nullptr; }},
      {"int8 keys", LOKI_BAD_DTYPE, [](loki_call* c) { c->keys.dtype = LOKI_INT8; }},
      {"values of no dtype", LOKI_BAD_DTYPE, [](loki_call* c) { c->values.dtype = 9; }},
      {"query of no dtype", LOKI_BAD_DTYPE, [](loki_call* c) { c->query_dtype = -1; }},
      {"keys without elements", LOKI_BAD_SIZE, [](loki_call* c) { c->keys.dim = 0; }},
      {"values too wide", LOKI_BAD_SIZE, [](loki_call* c) { c->values.dim = 1025; }},
  };
}

std::vector<Wrong> wrong_leads() {
  return {
      {"no lead", LOKI_NULL_POINTER, [](loki_call* c) { c->lead.data = nullptr; }},
      {"codes without scales", LOKI_NULL_POINTER, [](loki_call* c) { c->scales = nullptr; }},
      {"no lead query", LOKI_NULL_POINTER, [](loki_call* c) { c->lead_query = nullptr; }},
      {"lead of no kind", LOKI_BAD_DTYPE, [](loki_call* c) { c->lead_kind = 3; }},
      {"float16 tiles", LOKI_BAD_DTYPE, [](loki_call* c) { c->lead.dtype = LOKI_F16; }},
      {"int8 lead query", LOKI_BAD_DTYPE, [](loki_call* c) { c->lead_query_dtype = LOKI_INT8; }},
      {"rank 0", LOKI_BAD_SIZE, [](loki_call* c) { c->lead_rank = 0; }},
      {"rank 1025", LOKI_BAD_SIZE, [](loki_call* c) { c->lead_rank = 1025; }},
      {"lines that do not fit the rank", LOKI_BAD_SIZE, [](loki_call* c) { ++c->lead.dim; }},
      {"tiles that overlap", LOKI_BAD_SIZE, [](loki_call* c) { c->lead.row_stride = c->lead.dim * 64 - 4; }},
      {"rows narrower than the rank", LOKI_BAD_SIZE,
       [](loki_call* c) { c->lead_kind = LOKI_LEAD_ROWS, c->lead = c->keys, c->lead_rank = c->keys.dim + 1; }},
  };
}

std::vector<Wrong> wrong_choices() {
  static const std::vector<int64_t> negative(8, -1);
  return {
      {"no indices", LOKI_NULL_POINTER, [](loki_call* c) { c->indices = nullptr; }},
      {"no counts", LOKI_NULL_POINTER, [](loki_call* c) { c->counts = nullptr; }},
      {"no room for indices", LOKI_BAD_SIZE, [](loki_call* c) { c->indices_width = 0; }},
      {"sinks -1", LOKI_BAD_SIZE, [](loki_call* c) { c->sinks = -1; }},
      {"recents -1", LOKI_BAD_SIZE, [](loki_call* c) { c->recents = -1; }},
      {"no such reduce", LOKI_BAD_DTYPE, [](loki_call* c) { c->reduce = 3; }},
      {"count -1", LOKI_BAD_SIZE, [](loki_call* c) { c->count = -1; }},
      {"neither count nor mass", LOKI_BAD_SIZE, [](loki_call* c) { c->count = 0, c->mass = 0.0; }},
      {"a mass above 1", LOKI_BAD_SIZE, [](loki_call* c) { c->count = 0, c->mass = 1.5; }},
      {"a mass that is no number", LOKI_BAD_SIZE, [](loki_call* c) { c->count = 0, c->mass = NAN; }},
      {"wanted -1", LOKI_BAD_SIZE, [](loki_call* c) { c->wanted = negative.data(); }},
  };
}

template <typename... Lists>
std::vector<Wrong> joined(const Lists&... lists) {
  std::vector<Wrong> all;
  for (const std::vector<Wrong>& list : {lists...}) all.insert(all.end(), list.begin(), list.end());
  return all;
}

void check_attention_calls(const Scene& s) {
  const Change as_is = [](loki_call*) {};
  const std::vector<Wrong> score = {
      {"no scores", LOKI_NULL_POINTER, [](loki_call* c) { c->scores = nullptr; }},
      {"nothing to score", LOKI_BAD_DTYPE, [](loki_call* c) { c->lead_kind = LOKI_LEAD_RECENCY; }},
  };
  refuse("score", loki_score, s, joined(wrong_sizes(), wrong_leads(), score), as_is);
  refuse("dense", loki_dense, s, joined(wrong_sizes(), wrong_rows()), as_is);
  refuse("step", loki_step, s, joined(wrong_sizes(), wrong_rows(), wrong_leads(), wrong_choices()), as_is);

  // Given rows: one per chooser, of which the last chooser's is wrong.
  const int64_t slots = s.call.batch * s.choosers(), width = s.call.indices_width;
  Buffer indices(slots * width * 8, 0), counts(slots * 8, 0);
  for (int64_t i = 0; i < slots; ++i) *counts.as<int64_t>(i * 8) = 1;
  int64_t* last_index = indices.as<int64_t>((slots - 1) * width * 8);
  int64_t* last_count = counts.as<int64_t>((slots - 1) * 8);
  const Change given = [&](loki_call* c) {
    *last_index = 0;
    *last_count = 1;
    c->indices = indices.as<int64_t>();
    c->counts = counts.as<int64_t>();
  };
  const std::vector<Wrong> attend = {
      {"no indices", LOKI_NULL_POINTER, [](loki_call* c) { c->indices = nullptr; }},
      {"no counts", LOKI_NULL_POINTER, [](loki_call* c) { c->counts = nullptr; }},
      {"a row below 0", LOKI_BAD_INDEX, [&](loki_call*) { *last_index = -1; }},
      {"a row beyond the last", LOKI_BAD_INDEX, [&](loki_call* c) { *last_index = c->seq; }},
      {"a negative count", LOKI_BAD_SIZE, [&](loki_call*) { *last_count = -1; }},
      {"a count beyond the room", LOKI_BAD_SIZE, [&](loki_call* c) { *last_count = c->indices_width + 1; }},
      {"more rows than there are", LOKI_BAD_SIZE,
       [&](loki_call* c) {
         // Each is a row that exists, some twice.
         c->seq = 10;
         *last_count = c->seq + 1;
         memset(last_index, 0, static_cast<size_t>(width) * 8);
       }},
  };
  refuse("attend", loki_attend, s, joined(wrong_sizes(), wrong_rows(), attend), given);
  for (const auto function : {loki_score, loki_attend, loki_dense, loki_step})
    expect("no call", function(nullptr), LOKI_NULL_POINTER);
}

void check_choose_call() {
  const float scores[4] = {1, 2, 3, 4};
  const int64_t wanted[1] = {2}, negative[1] = {-1};
  int64_t indices[4] = {7, 7, 7, 7}, counts[1] = {7};
  const auto sound = [&] {
    loki_choose_call c{};
    c.batch = c.choosers = 1;
    c.seq = c.indices_width = 4;
    c.scores = scores;
    c.wanted = wanted;
    c.indices = indices;
    c.counts = counts;
    return c;
  };
  const std::vector<std::pair<int, std::function<void(loki_choose_call*)>>> wrongs = {
      {LOKI_NULL_POINTER, [](loki_choose_call* c) { c->scores = nullptr; }},
      {LOKI_NULL_POINTER, [](loki_choose_call* c) { c->counts = nullptr; }},
      {LOKI_NULL_POINTER, [](loki_choose_call* c) { c->wanted = nullptr; }},
      {LOKI_NULL_POINTER, [](loki_choose_call* c) { c->indices = nullptr; }},
      {LOKI_BAD_SIZE, [](loki_choose_call* c) { c->batch = 0; }},
      {LOKI_BAD_SIZE, [](loki_choose_call* c) { c->choosers = 0; }},
      {LOKI_BAD_SIZE, [](loki_choose_call* c) { c->seq = 0; }},
      {LOKI_BAD_SIZE, [](loki_choose_call* c) { c->indices_width = 0; }},
      {LOKI_BAD_SIZE, [&](loki_choose_call* c) { c->wanted = negative; }},
      {LOKI_BAD_SIZE, [](loki_choose_call* c) { c->mass = 1.5; }},
  };
  for (size_t i = 0; i < wrongs.size(); ++i) {
    loki_choose_call c = sound();
    wrongs[i].second(&c);
    expect(("choose: case " + std::to_string(i)).c_str(), loki_choose(&c), wrongs[i].first);
    for (const int64_t x : {indices[0], indices[1], indices[2], indices[3], counts[0]})
      expect("choose: written", static_cast<int>(x), 7);
  }
  loki_choose_call c = sound();
  expect("choose: sound", loki_choose(&c), LOKI_OK);
  expect("choose: its first row", static_cast<int>(indices[0]), 2);
  expect("choose: no call", loki_choose(nullptr), LOKI_NULL_POINTER);
}

void check_append_call() {
  Appending a;
  for (uint64_t seed = 0; a.call.key_map == nullptr || a.scales.rows.data == nullptr ||
                          a.keys.rows.data == nullptr || !a.pages.none();
       ++seed) {
    a = Appending();
    Random random(seed);
    draw_append(random, &a);
  }
  const std::vector<std::pair<int, std::function<void(loki_append_call*)>>> wrongs = {
      {LOKI_BAD_SIZE, [](loki_append_call* c) { c->batch = 0; }},
      {LOKI_BAD_SIZE, [](loki_append_call* c) { c->kv_heads = 0; }},
      {LOKI_BAD_SIZE, [](loki_append_call* c) { c->tokens = 0; }},
      {LOKI_BAD_SIZE, [](loki_append_call* c) { c->start = -1; }},
      {LOKI_BAD_SIZE, [](loki_append_call* c) { c->start = INT32_MAX; }},
      {LOKI_NULL_POINTER, [](loki_append_call* c) { c->new_keys.data = nullptr; }},
      {LOKI_NULL_POINTER, [](loki_append_call* c) { c->new_values.data = nullptr; }},
      {LOKI_BAD_DTYPE, [](loki_append_call* c) { c->new_keys.dtype = LOKI_INT4; }},
      {LOKI_BAD_SIZE, [](loki_append_call* c) { ++c->keys.dim; }},
      {LOKI_BAD_SIZE, [](loki_append_call* c) { ++c->values.dim; }},
      {LOKI_NULL_POINTER, [](loki_append_call* c) { c->lead.data = nullptr; }},
      {LOKI_NULL_POINTER, [](loki_append_call* c) { c->scales = nullptr; }},
      {LOKI_BAD_SIZE, [](loki_append_call* c) { c->lead_rank = 0; }},
      {LOKI_BAD_SIZE, [](loki_append_call* c) { ++c->lead.dim; }},
      {LOKI_BAD_SIZE,
       [](loki_append_call* c) {
         static const int32_t table[8] = {0};
         c->block_table = table, c->table_stride = 8, c->page_size = 8;
       }},
  };
  Untouched keys(a.keys.memory), values(a.values.memory), lead(a.lead.memory), scales(a.scales.memory),
      positions(a.positions);
  for (size_t i = 0; i < wrongs.size(); ++i) {
    loki_append_call c = a.call;
    wrongs[i].second(&c);
    expect(("append: case " + std::to_string(i)).c_str(), loki_append(&c), wrongs[i].first);
  }
  keys.check("append: keys");
  values.check("append: values");
  lead.check("append: lead");
  scales.check("append: scales");
  positions.check("append: positions");
  expect("append: no call", loki_append(nullptr), LOKI_NULL_POINTER);
}

void check_settings() {
  const std::string isa = loki_isa();
  expect("abi", loki_abi(), LOKI_ATTN_ABI);
  expect("isa: none", loki_set_isa(nullptr), LOKI_NULL_POINTER);
  expect("isa: unknown", loki_set_isa("abacus"), LOKI_BAD_ISA);
  expect("isa: part of a name", loki_set_isa("porta"), LOKI_BAD_ISA);
  expect("isa: unchanged", loki_isa() == isa, 1);
  expect("threads: 0", loki_set_threads(0), LOKI_BAD_SIZE);
  expect("threads: too many", loki_set_threads(1 << 20), LOKI_BAD_SIZE);
  expect("threads: 2", loki_set_threads(2), LOKI_OK);
  expect("threads: are 2", static_cast<int>(loki_threads()), 2);
  const Buffer bytes(1 << 16, 1);
  uint64_t sum = 7;
  expect("read: no data", loki_read(nullptr, 1 << 16, &sum), LOKI_NULL_POINTER);
  expect("read: no sum", loki_read(bytes.as<char>(), 1 << 16, nullptr), LOKI_NULL_POINTER);
  expect("read: too little", loki_read(bytes.as<char>(), 100, &sum), LOKI_BAD_SIZE);
  expect("read: sum untouched", sum == 7, 1);
  expect("read", loki_read(bytes.as<char>(), 1 << 16, &sum), LOKI_OK);
  expect("read: sum", sum == (uint64_t{1} << 13) * 0x0101010101010101u, 1);
}

}  // namespace
}  // namespace loki_test

int main() {
  using namespace loki_test;
  try {
    const Scene scene = sound_scene();
    check_sound(scene);
    check_attention_calls(scene);
    check_choose_call();
    check_append_call();
    check_settings();
  } catch (const std::exception& e) {
    fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
