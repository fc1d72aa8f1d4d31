// Who runs the work does not matter: calls from many threads at once through the pool of our own, calls
// on threads of another runtime, and calls in a forked child give what one thread alone gives.
//
//   concurrent [rounds]
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

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

void call_at_once(int64_t rounds, const std::vector<Caller>& callers, std::atomic<int>* failures) {
  std::vector<std::thread> threads;
  for (const Caller& caller : callers) threads.emplace_back(repeat, std::cref(caller), rounds, failures);
  for (std::thread& thread : threads) thread.join();
}

// A runtime that lends its threads, in the form of OpenMP's.
std::atomic<int> lent{0};
void lend(void (*work)(void*), void* data, unsigned count, unsigned) {
  ++lent;
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < count; ++i) threads.emplace_back(work, data);
  work(data);
  for (std::thread& thread : threads) thread.join();
}

void call_on_borrowed(const std::vector<Caller>& callers, std::atomic<int>* failures) {
  loki_borrow_pool(reinterpret_cast<void*>(&lend));
  for (const Caller& caller : callers) repeat(caller, 1, failures);
  loki_borrow_pool(nullptr);
}

// A child has none of its parent's threads.
void call_in_child(const std::vector<Caller>& callers, std::atomic<int>* failures) {
#if !defined(__SANITIZE_THREAD__)
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> own{0};
    alarm(60);  // a child that waits for a thread it does not have would wait for ever
    for (const Caller& caller : callers) repeat(caller, 1, &own);
    _exit(own.load() == 0 ? 0 : 1);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
    fprintf(stderr, "a forked child ended with status %d\n", status);
    ++*failures;
  }
#else
  (void)callers;
  (void)failures;
#endif
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
    loki_set_threads(3);
    call_at_once(rounds, callers, &failures);
    call_on_borrowed(callers, &failures);
    call_in_child(callers, &failures);
  }
  if (lent.load() == 0) {
    fprintf(stderr, "no call used the threads it was lent\n");
    ++failures;
  }
  printf("%d callers, %lld rounds of 6 scenes, %d differences\n", kCallers, static_cast<long long>(rounds),
         failures.load());
  return failures.load() == 0 ? 0 : 1;
}
