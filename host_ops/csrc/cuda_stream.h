// Host work in the order of a CUDA stream.
//
// An exchange is one call of the host by a stream: operands are copied into its pinned memory, the
// host is called, the stream waits if there are results, and those are copied back. The thread that
// enqueues it runs ahead of the data and sees none of it.
// A thread of ours (the courier, one for each stream) watches a pinned word of each exchange for the
// exchange's generation, and writes another word when the host is done. With kernels, one kernel
// copies the operands, writes the first word, waits for the other and copies the results. With
// memory operations the driver writes and waits in the stream's order, between copies. With host
// functions the driver calls the host itself, which takes longest.
// Ownership: a stream owns its exchanges and never gives their memory back. One is reused once
// the stream has passed its last copy, which shows when a later exchange arrives, and once nobody reads
// there to whom it was lent.
// Threads: any may enqueue. Neither courier nor host functions call CUDA.

#ifndef FLUXION_CUDA_STREAM_H_
#define FLUXION_CUDA_STREAM_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_copy.h"
#include "cuda_driver.h"
#include "pool.h"
#include "types.h"

namespace fluxion {

enum class CudaSync { kMemoryOperations, kKernels, kHostFunctions };

// FLUXION_CUDA_SYNC ("kernel", "memops" or "hostfunc"), else host functions where
// CUDA_LAUNCH_BLOCKING asks for simple execution, else kernels.
CudaSync wanted_cuda_sync();

class CudaStream;

struct Exchange {
  CudaStream* stream = nullptr;
  uint32_t* go = nullptr;       // Pinned; the stream writes it.
  uint32_t* done = nullptr;     // Pinned; the host writes it.
  char* staging = nullptr;      // Pinned, `capacity` bytes.
  int64_t capacity = 0;
  uint32_t generation = 0;      // Wraps around; compared by difference.
  bool waits = false;
  std::function<void()> work;   // Does not throw.
  std::atomic<bool> refused{false};  // The stream will never get there.
  // Whether `work` has lent the staging memory to someone; only where the stream does not wait.
  Lease lease = std::make_shared<std::atomic<bool>>(false);
};

class CudaStream {
 public:
  CudaStream(const CudaDriver* driver, CudaDriver::Stream stream, CudaSync sync);
  // Releases the stream from whatever it waits for.
  ~CudaStream();
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  // An exchange with this much staging memory, for one `enqueue`. Waits for one if the stream is
  // too far behind. Null, with the reason, without memory.
  Exchange* acquire(int64_t bytes, std::string* problem);

  // Enqueues copies, the call of the host, and, if `waits`, the wait for it and the copies of its
  // results. Returns what went wrong, or nothing.
  std::string enqueue(Exchange* exchange, const CudaCopies& operands,
                      std::function<void()> work, bool waits, const CudaCopies& results);

  // Waits until the host has been called by everything enqueued, or the deadline, or the device
  // has failed; returns whether it has been. Calls CUDA.
  bool drain(Clock::time_point deadline);

  CudaSync sync() const { return sync_; }
  // Whether small arrays are copied by our kernel.
  bool has_copy_kernel() const { return copy_kernel_ != nullptr; }
  const CudaDriver& driver() const { return *driver_; }
  // Pinned memory of all exchanges.
  int64_t staging_bytes() const;
  // A test seam: exchanges count from here. Nothing may be under way.
  void set_generation(uint32_t generation);

 private:
  void announce(Exchange* exchange);
  int exchange_by_kernel(Exchange* exchange, const CudaCopies& operands,
                         const CudaCopies& results);
  int call_host(Exchange* exchange);
  bool grow(int64_t capacity, std::string* problem);
  Exchange* take(int64_t capacity);
  bool may_grow(int64_t capacity) const;
  void await_exchange() const;
  void serve();
  bool await(const Exchange* exchange) const;
  void answer(Exchange* exchange) noexcept;
  void forget(Exchange* exchange);

  const CudaDriver* const driver_;
  const CudaDriver::Stream stream_;
  CudaSync sync_;
  CudaDriver::Function copy_kernel_ = nullptr;
  uint32_t first_generation_ = 0;
  std::mutex enqueue_mutex_;        // Keeps the order of the stream that of the queue.
  mutable std::mutex mutex_;        // Guards the rest; never held while CUDA is called.
  std::condition_variable wake_;
  std::condition_variable idle_;
  std::vector<std::unique_ptr<Exchange>> exchanges_;
  std::vector<Exchange*> free_;
  std::vector<Exchange*> spent_;    // Answered; the stream may still copy their results.
  std::vector<Exchange*> lent_;     // Answered; the host may still read their operands.
  std::deque<Exchange*> queue_;
  bool asleep_ = false;             // The courier waits for `wake_`.
  std::atomic<int64_t> queued_{0};  // The queue's length, for the courier to watch.
  std::atomic<bool> stop_{false};
  std::thread courier_;
};

// The stream of this name, made at first use. With the first one the pool leaves two CPUs to the
// framework and spins for longer, unless these have been chosen.
CudaStream& cuda_stream(const CudaDriver* driver, CudaDriver::Stream stream);

// How the stream that was made first calls the host and copies, such as "memops, kernel"; empty if
// there is none.
const char* describe_cuda();

// Waits for the host calls of all streams; returns whether there are none left.
bool drain_cuda(Clock::time_point deadline);

}  // namespace fluxion

#endif  // FLUXION_CUDA_STREAM_H_
