// A pool of threads that own nothing but a queue of jobs.
//
// Ownership: a Job belongs to its caller, who keeps it alive until its last part has run; the queue
// links jobs through themselves, so pushing never allocates and cannot fail.
// Threads: every method may be called from any thread. `run_one` and `help` let a waiting caller
// work too, so that a pool of no threads at all makes progress.
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

namespace fluxion {

using Clock = std::chrono::steady_clock;

class Pool;

// Work in `parts` independent parts, begun in order.
class Job {
 public:
  virtual ~Job() = default;
  // Runs one part. The job may be pushed again, or cease to exist, once its last part has run.
  virtual void run(int64_t part) noexcept = 0;

 private:
  friend class Pool;
  Job* next_ = nullptr;
  int64_t parts_ = 0;
  int64_t next_part_ = 0;
};

class Pool {
 public:
  // `threads` counts the helping caller: `threads - 1` workers are started.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Enqueues `parts` > 0 parts. The job must not be queued already.
  void push(Job* job, int64_t parts);

  // Runs one queued part on the calling thread. Returns false if nothing is queued.
  bool run_one();

  // Works and waits until `left` is 0 or `deadline` has passed; returns whether it is 0.
  bool help(const std::atomic<int64_t>& left, Clock::time_point deadline);

  // Wakes the callers of `help`; to be called after a counter they wait for has reached 0.
  void notify_done();

  // Replaces the workers, after the parts they are in. The calling thread runs what is queued, so
  // that nothing waits for workers that no longer exist.
  void set_threads(int threads);
  int threads() const { return threads_.load(std::memory_order_relaxed); }

 private:
  struct Part {
    Job* job;
    int64_t index;
  };

  bool pop(Part* part);
  void work(uint64_t epoch);
  void start_workers();   // Both with start_mutex_ held.
  void stop_workers();

  std::mutex mutex_;
  std::condition_variable wake_;
  Job* head_ = nullptr;             // Guarded by mutex_, like tail_.
  Job* tail_ = nullptr;
  std::atomic<int64_t> queued_{0};  // Parts not yet begun; written under mutex_.
  std::atomic<uint64_t> epoch_{0};  // Raised to send the workers of older epochs home.
  std::atomic<int> threads_;
  std::mutex start_mutex_;          // Guards workers_; taken before mutex_.
  std::vector<std::thread> workers_;
  std::atomic<bool> started_{false};
};

// CPUs this process may run on.
int allowed_cpus();

// FLUXION_NUM_THREADS if it is a number from 1 to 1024, otherwise the allowed CPUs.
int default_threads();

}  // namespace fluxion

#endif  // FLUXION_POOL_H_
