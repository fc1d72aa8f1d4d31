// Calls from many threads at once, through one pool of our own: each result is what it is alone.
//
//   concurrent [rounds]
#include <stdlib.h>

#include <atomic>
#include <thread>

#include "naive.h"

namespace loki_test {
namespace {

constexpr int kCallers = 4;

struct Caller {
  Scene scene;
  std::vector<Results> alone;
};

Results run(const Scene& s) {
  Results r(s);
  loki_call c = r.into(s.call);
  int bad = loki_step(&c);
  c.column_sums = r.column_sums.as<float>();
  bad = bad ? bad : loki_dense(&c);
  if (c.lead_kind != LOKI_LEAD_RECENCY) bad = bad ? bad : loki_score(&c);
  if (bad) fail("a call returned %d", bad);
  return r;
}

void repeat(const Caller& caller, int64_t rounds, std::atomic<int>* failures) {
  for (int64_t i = 0; i < rounds; ++i) {
    const Results r = run(caller.scene);
    if (const char* other = r.differs(caller.alone.front())) {
      fprintf(stderr, "another %s than alone: %s\n", other, describe(caller.scene).c_str());
      ++*failures;
    }
  }
}

}  // namespace
}  // namespace loki_test

int main(int argc, char** argv) {
  using namespace loki_test;
  const int64_t rounds = argc > 1 ? strtoll(argv[1], nullptr, 10) : 20;
  std::atomic<int> failures{0};
  for (uint64_t seed = 0; seed < 6; ++seed) {
    loki_set_threads(1);
    std::vector<Caller> callers(kCallers);
    Random random(seed);
    for (Caller& caller : callers) {
      draw_scene(random, &caller.scene);
      caller.alone.push_back(run(caller.scene));
    }
    std::vector<std::thread> threads;
    loki_set_threads(3);
    for (const Caller& caller : callers) threads.emplace_back(repeat, std::cref(caller), rounds, &failures);
    for (std::thread& thread : threads) thread.join();
  }
  printf("%d callers, %lld rounds of 6 scenes, %d differences\n", kCallers, static_cast<long long>(rounds), failures.load());
  return failures.load() == 0 ? 0 : 1;
}
