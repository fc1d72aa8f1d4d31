// Random calls of every entry point, by every instruction set that runs here and by 1, 2 and 3 threads,
// against plain double-precision code that is written from the contract in loki_attn.h alone.
//
//   differential [seed [rounds [first round]]]
//
// A failure prints what makes it again: the seed and the number of the round.
#include <stdlib.h>

#include "appending.h"
#include "choice.h"

namespace loki_test {
namespace {

constexpr int64_t kMostThreads = 3;

enum Entry { kScore, kAttend, kDense, kStep, kChoose, kAppend, kEntries };
const char* const kNames[kEntries] = {"score", "attend", "dense", "step", "choose", "append"};

struct Tally {
  int64_t calls[kEntries] = {};
  double worst[kEntries] = {};
};

void succeed(int status, const char* what) {
  if (status != LOKI_OK) fail("%s returned %d", what, status);
}

// Runs on the instruction set in use, which must be the one that then worked.
void call_entry(Tally* tally, Entry entry, int (*function)(const loki_call*), const loki_call& call) {
  succeed(function(&call), kNames[entry]);
  ++tally->calls[entry];
  if (strcmp(loki_last_isa(), loki_isa()) != 0) fail("%s ran instead of %s", loki_last_isa(), loki_isa());
}

// Scratch memory keeps what earlier calls left in it: let that be NaN.
void spoil_scratch() {
  const int64_t seq = 3100, dim = 32;
  const Buffer rows(seq * dim * 4), out(10 * dim * 4), indices(seq * 8), counts(80), scores(10 * seq * 4),
      sums(seq * 4);
  loki_call c{};
  c.batch = c.kv_heads = 1;
  c.group = 9;
  c.seq = seq;
  c.keys = {rows.as<char>(), LOKI_F32, dim, seq * dim * 4, seq * dim * 4, dim * 4};
  c.values = c.lead = c.keys;
  c.query = c.lead_query = rows.as<char>();
  c.query_head_stride = c.lead_query_head_stride = dim * 4;
  c.scaling = 1.0;
  c.lead_kind = LOKI_LEAD_ROWS;
  c.lead_rank = dim;
  c.count = c.indices_width = seq;
  c.out = out.as<char>();
  c.indices = indices.as<int64_t>();
  c.counts = counts.as<int64_t>();
  c.scores = scores.as<float>();
  succeed(loki_step(&c), "step");
  c.column_sums = sums.as<float>();
  succeed(loki_dense(&c), "dense");
}

// One kind of call for each number of threads: the first results are checked, the others equal them.
template <typename Call>
Results with_threads(const Scene& s, Call call) {
  std::vector<Results> all;
  for (int64_t threads = 1; threads <= kMostThreads; ++threads) {
    succeed(loki_set_threads(threads), "set_threads");
    all.emplace_back(s);
    call(all.back());
    if (const char* other = all.back().differs(all.front()))
      fail("%lld threads get other %s than one", static_cast<long long>(threads), other);
  }
  return std::move(all.front());
}

// Whole calls ------------------------------------------------------------------------------------

Results check_score(Tally* tally, const Scene& s) {
  if (s.call.lead_kind == LOKI_LEAD_RECENCY) return Results(s);
  Results got =
      with_threads(s, [&](const Results& r) { call_entry(tally, kScore, loki_score, r.into(s.call)); });
  for (int64_t b = 0; b < s.call.batch; ++b)
    for (int64_t h = 0; h < s.call.kv_heads; ++h)
      tally->worst[kScore] = std::max(tally->worst[kScore], check_scores(s, got, b, h));
  return got;
}

void check_dense(Tally* tally, const Scene& s, bool sums) {
  const Results got = with_threads(s, [&](const Results& r) {
    loki_call c = r.into(s.call);
    if (sums) c.column_sums = r.column_sums.as<float>();
    call_entry(tally, kDense, loki_dense, c);
  });
  double& worst = tally->worst[kDense];
  for (int64_t b = 0; b < s.call.batch; ++b) {
    const std::vector<int64_t> rows = s.visible_rows(b);
    for (int64_t kv_head = 0; kv_head < s.call.kv_heads; ++kv_head) {
      const Head head(s, b, kv_head);
      std::vector<Weights> weights(static_cast<size_t>(s.call.group));
      for (int64_t h = 0; h < s.call.group; ++h)
        worst = std::max(worst, check_attention(s, got, head, b, kv_head * s.call.group + h, rows,
                                                &weights[static_cast<size_t>(h)]));
      if (sums) worst = std::max(worst, check_column_sums(s, got, b, kv_head, rows, weights));
    }
  }
}

// Checks outputs against attention to the rows that each chooser read.
void check_reads(Tally* tally, Entry entry, const Scene& s, const Results& got,
                 const std::vector<std::vector<int64_t>>& rows) {
  const int64_t each = s.heads() / s.choosers();
  for (int64_t b = 0; b < s.call.batch; ++b)
    for (int64_t kv_head = 0; kv_head < s.call.kv_heads; ++kv_head) {
      const Head head(s, b, kv_head);
      for (int64_t h = kv_head * s.call.group; h < (kv_head + 1) * s.call.group; ++h) {
        Weights unused;
        const auto slot = static_cast<size_t>(b * s.choosers() + h / each);
        tally->worst[entry] =
            std::max(tally->worst[entry], check_attention(s, got, head, b, h, rows[slot], &unused));
      }
    }
}

void check_step(Tally* tally, const Scene& s, const Results& scored) {
  const Results got =
      with_threads(s, [&](const Results& r) { call_entry(tally, kStep, loki_step, r.into(s.call)); });
  std::vector<std::vector<int64_t>> rows;
  for (int64_t b = 0; b < s.call.batch; ++b)
    for (int64_t i = 0; i < s.choosers(); ++i) rows.push_back(check_choice(s, scored, got, b, i));
  check_reads(tally, kStep, s, got, rows);
}

// Attention to random rows; all others hold what nobody may read.
void check_attend(Tally* tally, Random& random, Scene* s) {
  loki_call& c = s->call;
  std::vector<std::vector<int64_t>> rows;
  Buffer indices(c.batch * s->choosers() * c.indices_width * 8, 0x7f), counts(c.batch * s->choosers() * 8);
  for (int64_t b = 0; b < c.batch; ++b) {
    const double density = random.share();
    for (int64_t i = 0; i < s->choosers(); ++i) {
      std::vector<int64_t> mine;
      for (const int64_t t : s->visible_rows(b))
        if (static_cast<int64_t>(mine.size()) < c.indices_width && random.chance(density)) mine.push_back(t);
      const auto slot = static_cast<int64_t>(rows.size());
      *counts.as<int64_t>(slot * 8) = static_cast<int64_t>(mine.size());
      if (!mine.empty()) memcpy(indices.as<char>(slot * c.indices_width * 8), mine.data(), mine.size() * 8);
      rows.push_back(mine);
    }
  }
  const int64_t per_kv_head = s->choosers() / c.kv_heads;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.kv_heads; ++h)
      for (int64_t t = 0; t < s->length(b); ++t) {
        bool read = false;
        for (int64_t i = 0; i < per_kv_head; ++i) {
          const auto& mine = rows[static_cast<size_t>(b * s->choosers() + h * per_kv_head + i)];
          read = read || std::binary_search(mine.begin(), mine.end(), t);
        }
        if (read) continue;
        memset(s->keys.at(s->pages, b, h, t), 0xff, static_cast<size_t>(c.keys.dim * bytes_of(c.keys.dtype)));
        memset(s->values.at(s->pages, b, h, t), 0xff,
               static_cast<size_t>(c.values.dim * bytes_of(c.values.dtype)));
      }
  const Results got = with_threads(*s, [&](const Results& r) {
    loki_call call = r.into(c);
    call.indices = indices.as<int64_t>();
    call.counts = counts.as<int64_t>();
    call_entry(tally, kAttend, loki_attend, call);
  });
  check_reads(tally, kAttend, *s, got, rows);
}

void check_choose(Tally* tally, Choosing* x) {
  loki_choose_call& c = x->call;
  Buffer first_indices, first_counts;
  for (int64_t threads = 1; threads <= kMostThreads; ++threads) {
    succeed(loki_set_threads(threads), "set_threads");
    x->indices = Buffer(c.batch * c.choosers * c.indices_width * 8);
    x->counts = Buffer(c.batch * c.choosers * 8);
    c.indices = c.mass > 0.0 ? nullptr : x->indices.as<int64_t>();
    c.counts = x->counts.as<int64_t>();
    succeed(loki_choose(&c), "choose");
    ++tally->calls[kChoose];
    if (threads == 1) {
      first_indices = x->indices.copy();
      first_counts = x->counts.copy();
    } else if (!(x->indices == first_indices && x->counts == first_counts)) {
      fail("%lld threads choose other rows than one", static_cast<long long>(threads));
    }
  }
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.choosers; ++h) check_chosen_row(*x, b, h);
}

// The same append again and again: what is written depends on nothing but the new rows.
void check_appending(Tally* tally, const Appending& a) {
  for (int64_t threads = 1; threads <= kMostThreads; ++threads) {
    succeed(loki_set_threads(threads), "set_threads");
    Untouched keys(a.keys.memory), values(a.values.memory), lead(a.lead.memory), scales(a.scales.memory),
        positions(a.positions);
    succeed(loki_append(&a.call), "append");
    ++tally->calls[kAppend];
    if (strcmp(loki_last_isa(), loki_isa()) != 0) fail("%s ran instead of %s", loki_last_isa(), loki_isa());
    check_append(a, &keys, &values, &lead, &scales, &positions);
  }
}

// Rounds -----------------------------------------------------------------------------------------

std::vector<std::string> isas() {
  std::vector<std::string> names;
  std::string name;
  for (const char* at = loki_isas();; ++at) {
    if (*at != ',' && *at != '\0') {
      name += *at;
      continue;
    }
    names.push_back(name);
    name.clear();
    if (*at == '\0') return names;
  }
}

void one_round(Tally* tally, uint64_t seed, uint64_t number, std::string* doing) {
  for (const std::string& isa : isas()) {
    *doing = isa;
    succeed(loki_set_isa(isa.c_str()), "set_isa");
    succeed(loki_set_threads(kMostThreads), "set_threads");
    spoil_scratch();
    Random random(seed * 0x9e3779b97f4a7c15u + number);
    Scene scene;
    draw_scene(random, &scene);
    *doing = isa + ": " + describe(scene);
    const Results scored = check_score(tally, scene);
    check_step(tally, scene, scored);
    check_dense(tally, scene, random.chance(0.5));
    check_attend(tally, random, &scene);
    Choosing choosing;
    draw_choosing(random, &choosing);
    *doing = isa + ": choose: " + describe(choosing);
    check_choose(tally, &choosing);
    Appending appending;
    draw_append(random, &appending);
    compute_coordinates(&appending);
    *doing = isa + ": append: " + describe(appending);
    check_appending(tally, appending);
  }
}

}  // namespace
}  // namespace loki_test

int main(int argc, char** argv) {
  using namespace loki_test;
  const uint64_t seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1;
  const uint64_t rounds = argc > 2 ? strtoull(argv[2], nullptr, 10) : 100;
  const uint64_t first = argc > 3 ? strtoull(argv[3], nullptr, 10) : 0;
  Tally tally;
  for (uint64_t i = first; i < first + rounds; ++i) {
    std::string doing;
    try {
      one_round(&tally, seed, i, &doing);
    } catch (const std::exception& e) {
      fprintf(stderr, "%s\n  %s\nAgain: differential %llu 1 %llu\n", e.what(), doing.c_str(),
              static_cast<unsigned long long>(seed), static_cast<unsigned long long>(i));
      return 1;
    }
  }
  printf("seed %llu, %llu rounds, instruction sets %s\n", static_cast<unsigned long long>(seed),
         static_cast<unsigned long long>(rounds), loki_isas());
  for (int i = 0; i < kEntries; ++i)
    printf("%-7s %7lld calls, largest error %.3f of the budget\n", kNames[i],
           static_cast<long long>(tally.calls[i]), tally.worst[i]);
  return 0;
}
