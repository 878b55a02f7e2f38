#include "pool.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "cpus.h"
#include "fetch.h"
#include "relax.h"
#include "signals.h"

namespace fluxion {
namespace {

// Bounds the harm of a missed wake-up and lets waiting callers see their deadline.
constexpr auto kNap = std::chrono::milliseconds(20);

// About as long as a lock is held by the threads that come before.
constexpr int kMostPauses = 8;

// Of the next job, what a thread touches first; a task is no larger.
constexpr int64_t kFetchedJob = 320;

thread_local const Pool* working_for = nullptr;

// The number in an environment variable if it lies within bounds, otherwise `fallback`.
long environment_number(const char* name, long low, long high, long fallback) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return fallback;
  char* end = nullptr;
  const long number = std::strtol(text, &end, 10);
  return *end == '\0' && number >= low && number <= high ? number : fallback;
}

}  // namespace

void SpinLock::lock() {
  // Whoever only looks leaves the line with all who wait. They all see it free at once, so those who
  // come too late stay away for longer each time.
  for (int pauses = 1;; pauses = std::min(2 * pauses, kMostPauses)) {
    for (int i = 0; held_.load(std::memory_order_relaxed); ++i) {
      // Who holds it may have lost its core.
      if (i % 64 == 63) std::this_thread::yield();
      relax();
    }
    if (!held_.exchange(true, std::memory_order_acquire)) return;
    for (int i = 0; i < pauses; ++i) relax();
  }
}

template <typename Ready>
bool Pool::spin_until(const Ready& ready) const {
  const Clock::time_point end = Clock::now() + spin();
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

Pool::Pool(int threads, std::vector<int> cpus, Clock::duration spin)
    : cpus_(std::move(cpus)), spin_(spin), threads_(threads < 1 ? 1 : threads) {}

Pool::~Pool() { set_threads(1); }

void Pool::push(Job* job, int64_t parts, Turn turn, bool one_of_many, int64_t first) {
  job->next_ = nullptr;
  job->parts_ = parts;
  job->next_part_ = first;
  job->one_of_many_ = one_of_many;
  ensure_started();
  {
    std::lock_guard<SpinLock> lock(queue_lock_);
    if (turn == Turn::kNext || head_ == nullptr) {
      if (head_ != nullptr) head_->next_part_ = head_part_;
      job->next_ = head_;
      head_ = job;
      head_part_ = first;
      if (tail_ == nullptr) tail_ = job;
    } else {
      tail_->next_ = job;
      tail_ = job;
    }
    queued_parts_.store(queued_parts() + parts - first, std::memory_order_relaxed);
  }
  announce();
}

void Pool::push_all(Offer* offer) {
  const int64_t jobs = offer->jobs();
  if (jobs == 0) return;
  ensure_started();
  bool opened = false;
  {
    std::lock_guard<SpinLock> lock(queue_lock_);
    // A single thread takes job after job.
    opened = threads() > 1 && nothing_offered();
    if (opened) {
      // All who are idle look at this line; mostly it is the same offer again.
      if (offered_.load(std::memory_order_relaxed) != offer) {
        offered_.store(offer, std::memory_order_release);
      }
      offer->open(threads());
    }
  }
  // From the last job on the offer may be the next one already.
  for (int64_t i = 0; !opened && i < jobs; ++i) {
    push(offer->job(i), offer->parts(i), Turn::kLast, true);
  }
  announce();
}

// Whoever sends the workers home says so and then looks for work; here it is the other way round, so
// one of them sees the other, and no work is left without workers.
void Pool::announce() {
  maybe_work_.exchange(true);
  if (!started_.load()) ensure_started();
  wake(1);
}

void Pool::ensure_started() {
  if (started_.load(std::memory_order_acquire)) return;
  std::lock_guard<std::mutex> lock(start_mutex_);
  start_workers();
}

// Whether anyone sleeps who has to be told of what the caller has just published. Adding nothing
// orders the two: whoever goes to sleep counts first and then looks, so one of them sees the other.
bool Pool::anyone(std::atomic<int>* sleepers) {
  return sleepers->fetch_add(0, std::memory_order_acq_rel) > 0;
}

// The mutex is left alone while nobody sleeps: many threads queue parts at the same time, and one
// that finds a mutex taken goes through the kernel.
void Pool::wake(int count) {
  if (!anyone(&sleeping_) && !anyone(&waiting_)) return;
  bool helper = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (count == 1 && waking_ > 0) return;  // It will wake others while there is work.
    helper = sleeping_ == 0 && waiting_ > 0;
    count = std::min(count, sleeping_.load() - waking_);
    waking_ += std::max(count, 0);
  }
  for (int i = 0; i < count; ++i) wake_.notify_one();
  if (helper) done_.notify_one();
}

// Takes a fair share of half of a job's parts, or of all jobs', so that few threads are not held up
// by counting and many still finish together. Without workers nobody else is expected to take the
// rest.
bool Pool::pop(Parts* parts) {
  std::lock_guard<SpinLock> lock(queue_lock_);
  Job* const job = head_;
  if (job == nullptr) {
    if (nothing_offered()) maybe_work_.store(false, std::memory_order_relaxed);
    return false;
  }
  const int64_t left = job->parts_ - head_part_;
  const int64_t sharers = threads() > 1 ? 2 * threads() : 1;
  const int64_t share = (job->one_of_many_ ? queued_parts() : left) / sharers;
  const int64_t taken = std::min(std::max<int64_t>(share, 1), left);
  *parts = {job, head_part_, head_part_ + taken};
  head_part_ += taken;
  if (taken == left) {
    head_ = job->next_;
    head_part_ = head_ == nullptr ? 0 : head_->next_part_;
    if (head_ == nullptr) tail_ = nullptr;
  }
  queued_parts_.store(queued_parts() - taken, std::memory_order_relaxed);
  if (head_ == nullptr && nothing_offered()) maybe_work_.store(false, std::memory_order_relaxed);
  return true;
}

void Pool::fetch_queue() {
  // What idle threads look at, the lock, the queue and the lock of who sleeps lie side by side.
  const char* const first = reinterpret_cast<const char*>(&maybe_work_);
  fetch(first, reinterpret_cast<const char*>(&done_) - first);
  std::lock_guard<SpinLock> lock(queue_lock_);
  if (head_ != nullptr) fetch(head_, kFetchedJob);
}

bool Pool::nothing_offered() const {
  const Offer* const offer = offered_.load(std::memory_order_relaxed);
  return offer == nullptr || offer->left() == 0;
}

bool Pool::run_share() {
  Offer* const offer = offered_.load(std::memory_order_acquire);
  int64_t first, end;
  bool last = false;
  if (offer == nullptr || !offer->take(&first, &end, &last)) return false;
  if (last) {
    // Or all who are idle would ask for the lock to find out.
    std::lock_guard<SpinLock> lock(queue_lock_);
    if (head_ == nullptr && nothing_offered()) maybe_work_.store(false, std::memory_order_relaxed);
  }
  offer->run(first, end);
  return true;
}

bool Pool::run_some() {
  if (!maybe_work_.load(std::memory_order_acquire)) return false;
  if (run_share()) return true;
  Parts parts;
  if (!pop(&parts)) return false;
  parts.job->run(parts.first, parts.last);
  return true;
}

bool Pool::help(const std::atomic<int64_t>& left, Clock::time_point deadline) {
  const auto done = [&] { return left.load(std::memory_order_acquire) == 0; };
  const auto work = [&] { return maybe_work_.load(std::memory_order_acquire); };
  while (!done()) {
    if (Clock::now() >= deadline) return false;
    if (run_some()) continue;
    if (spin_until([&] { return done() || work(); })) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    const Clock::time_point nap = Clock::now() + kNap;
    ++waiting_;
    done_.wait_until(lock, std::min(nap, deadline), [&] { return done() || work(); });
    --waiting_;
  }
  return true;
}

void Pool::notify_done() {
  if (!anyone(&waiting_)) return;
  {
    // Taking the lock closes the window between a helper's check and its sleep.
    std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_ == 0) return;
  }
  done_.notify_all();
}

void Pool::work(uint64_t epoch) {
  const auto retired = [&] { return epoch_.load(std::memory_order_acquire) != epoch; };
  const auto ready = [&] { return retired() || maybe_work_.load(std::memory_order_acquire); };
  run_on(cpus_);
  working_for = this;
  bool woken = false;
  while (!retired()) {
    if (woken && maybe_work_.load(std::memory_order_relaxed)) wake(2);
    woken = false;
    if (run_some()) continue;
    if (spin_until(ready)) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    // Not in a loop: whoever was called has to come up, or it would count as waking for ever.
    if (!ready()) wake_.wait(lock);
    --sleeping_;
    waking_ = std::max(waking_ - 1, 0);
    woken = true;
  }
}

void Pool::start_workers() {
  if (started_.load(std::memory_order_relaxed)) return;
  const uint64_t epoch = epoch_.load(std::memory_order_relaxed);
  const int workers = threads() == 1 ? 0 : threads();
  const SignalsBlocked blocked;
  try {
    while (static_cast<int>(workers_.size()) < workers) {
      workers_.emplace_back([this, epoch] { work(epoch); });
    }
  } catch (...) {
    // The system refuses more threads: who waits helps, and threads() tells, also of a single one.
    const int started = static_cast<int>(workers_.size());
    threads_.store(std::max(started, 1), std::memory_order_relaxed);
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
  started_.store(false);
}

void Pool::set_threads(int threads) {
  if (working_for == this) throw std::logic_error("a worker cannot replace the workers");
  {
    std::lock_guard<std::mutex> lock(start_mutex_);
    stop_workers();
    threads_.store(threads < 1 ? 1 : threads, std::memory_order_relaxed);
  }
  if (!maybe_work_.load()) return;
  while (run_some()) {
  }
}

int default_threads() {
  const std::vector<int> wanted = wanted_cpus();
  const size_t cpus = wanted.empty() ? allowed_cpus().size() : wanted.size();
  const long useful = std::min(static_cast<long>(cpus), cpu_quota());
  return static_cast<int>(environment_number("FLUXION_NUM_THREADS", 1, 1024, useful));
}

Clock::duration default_spin() {
  const long spin_us = environment_number("FLUXION_SPIN_US", 0, 1000000, -1);
  return spin_us < 0 ? kDefaultSpin : std::chrono::microseconds(spin_us);
}

}  // namespace fluxion
