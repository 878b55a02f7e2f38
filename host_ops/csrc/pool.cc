#include "pool.h"

#include <cstdlib>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fluxion {
namespace {

// The gap between two layers of a decode step is shorter than a wake-up through the kernel, longer
// spinning would take the core from the framework's own threads.
constexpr auto kSpin = std::chrono::microseconds(50);
// Bounds the harm of a missed wake-up and lets waiting callers see their deadline.
constexpr auto kNap = std::chrono::milliseconds(20);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Ready>
bool spin_until(const Ready& ready) {
  const Clock::time_point end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

}  // namespace

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads) {}

Pool::~Pool() { set_threads(1); }

void Pool::push(Job* job, int64_t parts) {
  if (!started_.load(std::memory_order_acquire)) {
    std::lock_guard<std::mutex> lock(start_mutex_);
    start_workers();
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job->next_ = nullptr;
    job->parts_ = parts;
    job->next_part_ = 0;
    (tail_ != nullptr ? tail_->next_ : head_) = job;
    tail_ = job;
    queued_.store(queued_.load(std::memory_order_relaxed) + parts, std::memory_order_release);
  }
  if (parts > 1) {
    wake_.notify_all();
  } else {
    wake_.notify_one();
  }
}

bool Pool::pop(Part* part) {
  if (queued_.load(std::memory_order_acquire) == 0) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  Job* job = head_;
  if (job == nullptr) return false;
  *part = {job, job->next_part_++};
  if (job->next_part_ == job->parts_) {
    head_ = job->next_;
    if (head_ == nullptr) tail_ = nullptr;
  }
  queued_.store(queued_.load(std::memory_order_relaxed) - 1, std::memory_order_release);
  return true;
}

bool Pool::run_one() {
  Part part;
  if (!pop(&part)) return false;
  part.job->run(part.index);
  return true;
}

bool Pool::help(const std::atomic<int64_t>& left, Clock::time_point deadline) {
  const auto done = [&] { return left.load(std::memory_order_acquire) == 0; };
  const auto work = [&] { return queued_.load(std::memory_order_acquire) > 0; };
  while (!done()) {
    if (Clock::now() >= deadline) return false;
    if (run_one()) continue;
    if (spin_until([&] { return done() || work(); })) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    const Clock::time_point nap = Clock::now() + kNap;
    wake_.wait_until(lock, nap < deadline ? nap : deadline, [&] { return done() || work(); });
  }
  return true;
}

void Pool::notify_done() {
  // Taking the lock closes the window between a waiter's check and its sleep.
  { std::lock_guard<std::mutex> lock(mutex_); }
  wake_.notify_all();
}

void Pool::work(uint64_t epoch) {
  const auto retired = [&] { return epoch_.load(std::memory_order_acquire) != epoch; };
  const auto ready = [&] { return retired() || queued_.load(std::memory_order_acquire) > 0; };
  while (!retired()) {
    if (run_one()) continue;
    if (spin_until(ready)) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, ready);
  }
}

void Pool::start_workers() {
  if (started_.load(std::memory_order_relaxed)) return;
  const uint64_t epoch = epoch_.load(std::memory_order_relaxed);
  const int workers = threads() - 1;
  try {
    while (static_cast<int>(workers_.size()) < workers) {
      workers_.emplace_back([this, epoch] { work(epoch); });
    }
  } catch (...) {
    // The system refuses more threads: helpers still do all the work, and threads() tells.
    threads_.store(static_cast<int>(workers_.size()) + 1, std::memory_order_relaxed);
  }
  started_.store(true, std::memory_order_release);
}

void Pool::stop_workers() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    epoch_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  started_.store(false, std::memory_order_release);
}

void Pool::set_threads(int threads) {
  {
    std::lock_guard<std::mutex> lock(start_mutex_);
    stop_workers();
    threads_.store(threads < 1 ? 1 : threads, std::memory_order_relaxed);
  }
  while (run_one()) {
  }
}

int allowed_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

int default_threads() {
  const char* text = std::getenv("FLUXION_NUM_THREADS");
  if (text != nullptr && *text != '\0') {
    char* end = nullptr;
    const long wanted = std::strtol(text, &end, 10);
    if (*end == '\0' && wanted >= 1 && wanted <= 1024) return static_cast<int>(wanted);
  }
  return allowed_cpus();
}

}  // namespace fluxion
