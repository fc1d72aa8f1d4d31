// Threads: those of the OpenMP library that the host process runs already, or a few of our own.
//
// Borrowing matters: an OpenMP pool keeps its threads spinning for a while after each region, and a
// second pool beside it would fight with them for the same cores.
#include <pthread.h>
#include <stdlib.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "internal.h"

namespace loki {
namespace {

struct Job {
  Task task;
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
};

void work(void* pointer) {
  Job* job = static_cast<Job*>(pointer);
  for (;;) {
    const int64_t i = job->next.fetch_add(1, std::memory_order_relaxed);
    if (i >= job->count) return;
    job->task(job->context, i);
  }
}

// A pool that sleeps between jobs. One job at a time: whoever comes meanwhile works alone.
class Pool {
 public:
  bool run(Job* job, int64_t threads) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock() || !grow(static_cast<size_t>(threads - 1))) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      wanted_ = static_cast<size_t>(threads - 1);
      busy_ = wanted_;
      ++round_;
    }
    wake_.notify_all();
    work(job);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    return true;
  }

 private:
  bool grow(size_t size) {
    try {
      while (workers_.size() < size) {
        const size_t rank = workers_.size();
        workers_.emplace_back([this, rank] { serve(rank); });
        workers_.back().detach();
      }
    } catch (const std::system_error&) {
      return false;
    }
    return true;
  }

  void serve(size_t rank) {
    uint64_t seen = 0;
    for (;;) {
      Job* job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (rank >= wanted_) continue;
        job = job_;
      }
      work(job);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  size_t wanted_ = 0, busy_ = 0;
  uint64_t round_ = 0;
};

// Never destroyed: its threads may outlive main. A forked child has none of them, and starts anew.
std::atomic<Pool*> pool{nullptr};

Pool* own_pool() {
  static std::mutex making;
  static const int forks = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  (void)forks;
  if (Pool* made = pool.load()) return made;
  std::lock_guard<std::mutex> lock(making);
  if (pool.load() == nullptr) pool.store(new Pool);
  return pool.load();
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> borrowed{nullptr};
std::atomic<int64_t> thread_count{1};

}  // namespace

int64_t threads() { return thread_count.load(std::memory_order_relaxed); }

void parallel(int64_t count, Task task, void* context) {
  Job job{task, context, count};
  const int64_t wanted = threads();
  if (count > 1 && wanted > 1) {
    // Always the whole team: a smaller one would make the library end threads and start others.
    if (const GompParallel run = borrowed.load()) {
      run(work, &job, static_cast<unsigned>(wanted), 0);
      return;
    }
    if (own_pool()->run(&job, wanted)) return;
  }
  work(&job);
}

bool Arena::reserve(size_t bytes) {
  used_ = 0;
  if (bytes <= size_) return true;
  free(base_);
  const size_t wanted = static_cast<size_t>(round_up(static_cast<int64_t>(bytes + bytes / 4), 4096));
  base_ = static_cast<char*>(aligned_alloc(4096, wanted));
  size_ = base_ == nullptr ? 0 : wanted;
  return base_ != nullptr;
}

Arena::~Arena() { free(base_); }

Arena& Arena::mine() {
  static thread_local Arena arena;
  return arena;
}

Arena& Arena::shared() {
  static thread_local Arena arena;
  return arena;
}

}  // namespace loki

extern "C" {

int loki_set_threads(int64_t count) {
  if (count < 1 || count > 1024) return LOKI_BAD_SIZE;
  loki::thread_count.store(count);
  return LOKI_OK;
}

int64_t loki_threads(void) { return loki::threads(); }

int loki_borrow_pool(void* gomp_parallel) {
  loki::borrowed.store(reinterpret_cast<loki::GompParallel>(gomp_parallel));
  return LOKI_OK;
}
}
