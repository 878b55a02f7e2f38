// What no kernel can beat: the pool's own threads read memory from one end to the other.
//
// Parts have a fixed size, as those of tasks do, and any idle thread takes the next one; so the
// ceiling is reached with the same threads, CPUs and wake-ups as everything it is compared with.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "runtime.h"

namespace fluxion {
namespace {

constexpr int64_t kPartBytes = int64_t{1} << 20;

class Reading : public Job {
 public:
  Reading(Pool* pool, const char* data, int64_t bytes, int64_t parts)
      : left_(parts), pool_(pool), data_(data), bytes_(bytes) {}

  void run(int64_t first, int64_t last) noexcept override {
    const int64_t begin = first * kPartBytes;
    sum_.fetch_xor(fold(begin, std::min(last * kPartBytes, bytes_)), std::memory_order_relaxed);
    Pool* const pool = pool_;
    const int64_t done = last - first;
    // Whoever waits may destroy this object as soon as nothing is left.
    if (left_.fetch_sub(done, std::memory_order_acq_rel) == done) pool->notify_done();
  }

  const std::atomic<int64_t>& left() const { return left_; }
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
  Pool* const pool_;
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
    const Clock::duration patience = runtime().timeout;
    const int64_t parts = (bytes + kPartBytes - 1) / kPartBytes;
    Reading reading(&pool, static_cast<const char*>(data), bytes, parts);
    const Clock::time_point start = Clock::now();
    pool.push(&reading, parts);
    // The object must outlive its last part, however long that takes.
    while (!pool.help(reading.left(), Clock::now() + patience)) {
    }
    const std::chrono::duration<double> took = Clock::now() - start;
    *sum = reading.sum();
    return took.count();
  } catch (...) {
    return -1;
  }
}
