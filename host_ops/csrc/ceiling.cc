// What no kernel can beat: the pool's own threads read memory from one end to the other.
//
// Parts have a fixed size, as those of tasks do, and any idle thread takes the next one; so the
// ceiling is reached with the same threads, CPUs and wake-ups as everything it is compared with.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>

#include "runtime.h"

namespace fluxion {
namespace {

constexpr int64_t kPartBytes = int64_t{1} << 20;

class Reading : public Job {
 public:
  Reading(const char* data, int64_t bytes, int64_t parts)
      : left_(parts), data_(data), bytes_(bytes) {}

  void run(int64_t first, int64_t last) noexcept override {
    const int64_t begin = first * kPartBytes;
    sum_.fetch_xor(fold(begin, std::min(last * kPartBytes, bytes_)), std::memory_order_relaxed);
    const int64_t done = last - first;
    if (left_.fetch_sub(done, std::memory_order_acq_rel) != done) return;
    // Whoever waits may destroy this object as soon as the lock is free.
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = Clock::now();
    over_ = true;
    read_.notify_one();
  }

  // Sleeps, for a thread that looks on takes its CPU from one that reads. Returns when the last part
  // was read.
  Clock::time_point wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    read_.wait(lock, [&] { return over_; });
    return ended_;
  }

  uint64_t sum() const { return sum_.load(std::memory_order_relaxed); }

 private:
  // Eight independent chains keep enough loads in flight; the compiler makes vectors of them.
  uint64_t fold(int64_t begin, int64_t end) const {
    uint64_t chains[8] = {};
    int64_t at = begin;
    for (; at + 64 <= end; at += 64) {
      uint64_t words[8];
      std::memcpy(words, data_ + at, 64);
      for (int i = 0; i < 8; ++i) chains[i] ^= words[i];
    }
    uint64_t all = 0;
    for (; at < end; ++at) all ^= static_cast<unsigned char>(data_[at]);
    for (const uint64_t chain : chains) all ^= chain;
    return all;
  }

  std::atomic<int64_t> left_;
  std::atomic<uint64_t> sum_{0};
  std::mutex mutex_;
  std::condition_variable read_;
  bool over_ = false;
  Clock::time_point ended_;
  const char* const data_;
  const int64_t bytes_;
};

}  // namespace
}  // namespace fluxion

// Reads `bytes` bytes at `data` once with all threads of the pool and returns the seconds it took,
// or -1 if that failed. `sum` receives the exclusive or of all 64-bit words and of the bytes that
// are left, so that nothing can be left out.
extern "C" __attribute__((visibility("default"))) double fluxion_read_all(const void* data,
                                                                         int64_t bytes,
                                                                         uint64_t* sum) {
  using namespace fluxion;
  if (data == nullptr || sum == nullptr || bytes <= 0) return -1;
  try {
    Pool& pool = runtime().pool;
    const int64_t parts = (bytes + kPartBytes - 1) / kPartBytes;
    Reading reading(static_cast<const char*>(data), bytes, parts);
    const Clock::time_point start = Clock::now();
    pool.push(&reading, parts);
    // Without workers nobody else reads.
    while (pool.threads() == 1 && pool.run_some()) {
    }
    const std::chrono::duration<double> took = reading.wait() - start;
    *sum = reading.sum();
    return took.count();
  } catch (...) {
    return -1;
  }
}
