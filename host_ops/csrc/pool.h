// A pool of threads that own nothing but a queue of jobs.
//
// What is offered (offer.h) is begun before what is queued. One offer is open at a time; the jobs of
// another one are queued.
// Ownership: a Job belongs to its caller, who keeps it alive until its last part has run; the queue
// links jobs through themselves, so pushing never allocates and cannot fail.
// Threads: every method may be called from any thread, also from a part that the pool runs.
// `run_some` and `help` let a waiting caller work too, so that a pool of no threads at all makes
// progress. Workers leave all signals to the threads of the process that expect them.
// Waking: a push wakes one sleeping worker at most, and each worker that wakes to find work left
// wakes two more. So the caller, who has more to do, pays for one wake-up and not for all.
// A process has one pool (runtime.h). It starts its threads at the first push.

#ifndef FLUXION_POOL_H_
#define FLUXION_POOL_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "job.h"
#include "offer.h"

namespace fluxion {

using Clock = std::chrono::steady_clock;

class Pool;

// A lock for a few instructions, among threads that have nothing better to do than to wait.
class SpinLock {
 public:
  void lock();
  void unlock() { held_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool> held_{false};
};

// The gap between two layers of a decode step is shorter than a wake-up through the kernel; longer
// spinning would take the core from the framework's own threads.
// The nanosecond tells it from any time that FLUXION_SPIN_US can choose.
constexpr Clock::duration kDefaultSpin = std::chrono::microseconds(50) + std::chrono::nanoseconds(1);

// Where a device calls, workers would sleep between two steps unless they spin for as long as the
// device needs for the last layer, the logits and the start of the next step, about 0.7 ms of an 8B
// model; waking them costs a layer 0.1 ms and more. There the framework needs few CPUs.
constexpr Clock::duration kAwakeSpin = std::chrono::milliseconds(2) + std::chrono::nanoseconds(1);

// Where a job is queued: behind all others, or before them because others wait for what it finds.
// What is on offer is begun before either.
enum class Turn { kLast, kNext };

class Pool {
 public:
  // So many workers are started, confined to `cpus` (anywhere if there are none), or none for one
  // thread, which is the caller. Whoever has nothing to do spins for `spin` before it sleeps.
  explicit Pool(int threads, std::vector<int> cpus = {}, Clock::duration spin = kDefaultSpin);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Enqueues parts [first, parts), at least one. The job must not be queued already. As one of many,
  // whoever takes some of it takes a share of all that is queued.
  void push(Job* job, int64_t parts, Turn turn = Turn::kLast, bool one_of_many = false,
            int64_t first = 0);

  // Hands out the jobs of `offer` in shares of all their parts, or queues them as one of many each.
  void push_all(Offer* offer);

  // About how many parts are queued, and shares on offer.
  int64_t queued() const {
    const Offer* const offer = offered_.load(std::memory_order_acquire);
    return queued_parts() + (offer == nullptr ? 0 : offer->left());
  }

  // Asks for the memory that finding the next part takes.
  void fetch_queue();

  // Runs some queued parts on the calling thread. Returns false if nothing is queued.
  bool run_some();

  // Works and waits until `left` is 0 or `deadline` has passed; returns whether it is 0.
  bool help(const std::atomic<int64_t>& left, Clock::time_point deadline);

  // Wakes the callers of `help`; to be called after a counter they wait for has reached 0.
  void notify_done();

  // Replaces the workers, after the parts they are in. The calling thread runs what is queued, so
  // that nothing waits for workers that no longer exist. Throws if it is a worker itself, which
  // would have to wait for its own end.
  void set_threads(int threads);
  int threads() const { return threads_.load(std::memory_order_relaxed); }
  const std::vector<int>& cpus() const { return cpus_; }
  // Spins for kAwakeSpin instead of kDefaultSpin, or the other way round; another time was chosen by
  // the user and stays. Returns whether anything changed.
  bool stay_awake(bool awake) {
    Clock::duration before = awake ? kDefaultSpin : kAwakeSpin;
    return spin_.compare_exchange_strong(before, awake ? kAwakeSpin : kDefaultSpin);
  }
  // How long whoever has nothing to do spins before it sleeps.
  Clock::duration spin() const { return spin_.load(std::memory_order_relaxed); }

 private:
  struct Parts {
    Job* job;
    int64_t first;
    int64_t last;
  };

  void announce();
  void ensure_started();
  int64_t queued_parts() const { return queued_parts_.load(std::memory_order_relaxed); }
  bool run_share();
  bool nothing_offered() const;
  bool pop(Parts* parts);
  void work(uint64_t epoch);
  static bool anyone(std::atomic<int>* sleepers);
  void wake(int count);
  template <typename Ready>
  bool spin_until(const Ready& ready) const;
  void start_workers();   // Both with start_mutex_ held.
  void stop_workers();

  const std::vector<int> cpus_;
  // Whoever has nothing to do looks at these all the time, and they hardly ever change.
  std::atomic<Clock::duration> spin_;
  std::atomic<uint64_t> epoch_{0};  // Raised to send the workers of older epochs home.
  std::atomic<int> threads_;
  // Idle threads look at this alone. It is raised behind the lock, so that who pushes does not have
  // to take the lock's line back from all of them, and lowered by who finds nothing; so it may be up
  // while nothing is queued, but while something is queued it is up or about to be.
  alignas(kLineBytes) std::atomic<bool> maybe_work_{false};
  std::atomic<Offer*> offered_{nullptr};  // Written under queue_lock_, before the flag is raised.
  alignas(kLineBytes) SpinLock queue_lock_;
  alignas(kLineBytes) Job* head_ = nullptr;  // Guarded by queue_lock_, like tail_.
  Job* tail_ = nullptr;
  int64_t head_part_ = 0;           // The next part of head_; under the lock.
  std::atomic<int64_t> queued_parts_{0};  // Not yet begun; written under queue_lock_.
  alignas(kLineBytes) std::mutex mutex_;  // For going to sleep only.
  std::condition_variable wake_;    // Where workers sleep.
  std::condition_variable done_;    // Where helpers do.
  std::atomic<int> sleeping_{0};    // Workers on wake_; changed under mutex_, like the next two.
  int waking_ = 0;                  // Of these, how many have been called and are not yet up.
  std::atomic<int> waiting_{0};     // Helpers on done_.
  std::mutex start_mutex_;          // Guards workers_; taken before mutex_.
  std::vector<std::thread> workers_;
  std::atomic<bool> started_{false};
};

// FLUXION_NUM_THREADS if it is a number from 1 to 1024, otherwise as many as there are CPUs to use, or
// as many as the process may keep busy where its control group sets a limit.
int default_threads();

// FLUXION_SPIN_US if it is a number from 0 to 1000000, otherwise kDefaultSpin.
Clock::duration default_spin();

}  // namespace fluxion

#endif  // FLUXION_POOL_H_
