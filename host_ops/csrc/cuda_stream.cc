#include "cuda_stream.h"

#include <algorithm>
#include <cstring>

#include "cpus.h"
#include "relax.h"
#include "runtime.h"
#include "signals.h"

#if defined(__linux__)
#include <sys/prctl.h>
#endif

namespace fluxion {
namespace {

constexpr int64_t kLine = 128;             // Flags on cache lines of their own, then the staging.
constexpr int64_t kHeader = 2 * kLine;
constexpr int64_t kSlabBytes = 256 << 10;  // Few allocations, because each may halt the device.
// How far a program runs ahead of its data. Of each size there are two at least, beside those that
// are lent, because one is free only when the stream has got to the next.
constexpr int64_t kMaxBytes = 64 << 20;
constexpr int64_t kMaxExchanges = 256;
constexpr int64_t kFewest = 2;
constexpr unsigned kPortableMapped = 3;    // CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP
constexpr unsigned kWaitGreaterEqual = 0;  // CU_STREAM_WAIT_VALUE_GEQ, by difference

// The dense part of a layer takes less; a longer wait means that the program does other things.
constexpr auto kSpin = std::chrono::milliseconds(1);
constexpr auto kShortNap = std::chrono::microseconds(20);
constexpr auto kLongNap = std::chrono::milliseconds(1);
constexpr auto kPatience = std::chrono::seconds(1);
constexpr auto kDrainNap = std::chrono::milliseconds(20);
constexpr int kNotReady = 600;  // CUDA_ERROR_NOT_READY

uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// The first power of two that holds the bytes, so that few sizes are in use.
int64_t rounded(int64_t bytes) {
  int64_t size = 1024;
  while (size < bytes) size *= 2;
  return size;
}

class CurrentContext {
 public:
  CurrentContext(const CudaDriver& driver, CudaDriver::Stream stream) : driver_(driver) {
    CudaDriver::Context context = nullptr;
    error_ = driver.stream_context(stream, &context);
    if (error_ == 0) error_ = driver.push_context(context);
  }
  ~CurrentContext() {
    CudaDriver::Context context = nullptr;
    if (error_ == 0) driver_.pop_context(&context);
  }
  int error() const { return error_; }

 private:
  const CudaDriver& driver_;
  int error_ = 0;
};

}  // namespace

CudaStream::CudaStream(const CudaDriver* driver, CudaDriver::Stream stream, CudaSync sync)
    : driver_(driver), stream_(stream), sync_(sync) {
  const bool has_memory_operations = driver->write_value && driver->wait_value;
  const CurrentContext context(*driver_, stream_);
  if (context.error() == 0) copy_kernel_ = load_copy_kernel(*driver_);
  if (sync_ == CudaSync::kKernels && copy_kernel_ == nullptr) sync_ = CudaSync::kMemoryOperations;
  std::string problem;
  if (sync_ == CudaSync::kMemoryOperations && !has_memory_operations) {
    sync_ = CudaSync::kHostFunctions;
  } else if (sync_ == CudaSync::kMemoryOperations && grow(rounded(0), &problem)) {
    const bool works = context.error() == 0 &&
                       driver_->write_value(stream_, address(free_.back()->go), 0, 0) == 0;
    if (!works) sync_ = CudaSync::kHostFunctions;
  }
}

CudaStream::~CudaStream() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true, std::memory_order_release);
  }
  wake_.notify_all();
  if (courier_.joinable()) courier_.join();
  for (Exchange* exchange : queue_) {
    __atomic_store_n(exchange->done, exchange->generation, __ATOMIC_RELEASE);
  }
}

bool CudaStream::grow(int64_t capacity, std::string* problem) {
  const int64_t size = kHeader + capacity;
  const int64_t count = std::clamp<int64_t>(kSlabBytes / size, 1, 16);
  void* slab = nullptr;
  const CurrentContext context(*driver_, stream_);
  int error = context.error();
  if (error == 0) error = driver_->allocate_host(&slab, size * count, kPortableMapped);
  if (error != 0) {
    *problem = "expected " + std::to_string(size * count) + " bytes of pinned memory, got " +
               driver_->describe(error) + "; free host memory";
    return false;
  }
  std::memset(slab, 0, size * count);
  std::lock_guard<std::mutex> lock(mutex_);
  for (int64_t i = 0; i < count; ++i) {
    char* base = static_cast<char*>(slab) + i * size;
    auto exchange = std::make_unique<Exchange>();
    exchange->stream = this;
    exchange->go = reinterpret_cast<uint32_t*>(base);
    exchange->done = reinterpret_cast<uint32_t*>(base + kLine);
    exchange->staging = base + kHeader;
    exchange->capacity = capacity;
    exchange->generation = first_generation_;
    *exchange->go = *exchange->done = first_generation_;
    exchanges_.push_back(std::move(exchange));
    // So that nothing allocates when an exchange changes lists.
    free_.reserve(exchanges_.size());
    spent_.reserve(exchanges_.size());
    lent_.reserve(exchanges_.size());
    free_.push_back(exchanges_.back().get());
  }
  return true;
}

Exchange* CudaStream::take(int64_t capacity) {
  const auto reads = [](const Exchange* e) { return e->lease->load(std::memory_order_acquire); };
  const auto ended = std::partition(lent_.begin(), lent_.end(), reads);
  free_.insert(free_.end(), ended, lent_.end());
  lent_.erase(ended, lent_.end());
  const auto fits = [&](const Exchange* e) { return e->capacity == capacity; };
  const auto found = std::find_if(free_.begin(), free_.end(), fits);
  if (found == free_.end()) return nullptr;
  Exchange* exchange = *found;
  free_.erase(found);
  return exchange;
}

bool CudaStream::may_grow(int64_t capacity) const {
  const auto fits = [&](const auto& e) { return e->capacity == capacity; };
  const int64_t made = std::count_if(exchanges_.begin(), exchanges_.end(), fits);
  const int64_t lent = std::count_if(lent_.begin(), lent_.end(), fits);
  // Those that are lent may come back only with what has yet to be enqueued.
  if (made - lent < kFewest) return true;
  return made < std::clamp<int64_t>(kMaxBytes / (kHeader + capacity), kFewest, kMaxExchanges);
}

Exchange* CudaStream::acquire(int64_t bytes, std::string* problem) {
  const int64_t capacity = rounded(bytes);
  const Clock::time_point deadline = Clock::now() + runtime().timeout.load();
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      Exchange* exchange = take(capacity);
      while (exchange == nullptr && !may_grow(capacity)) {
        if (idle_.wait_until(lock, deadline) == std::cv_status::timeout) {
          *problem = "expected the device to get on with its work, got none done in the time of "
                     "FLUXION_TIMEOUT_S; look for an earlier failure on this device";
          return nullptr;
        }
        exchange = take(capacity);
      }
      if (exchange != nullptr) return exchange;
    }
    if (!grow(capacity, problem)) return nullptr;
  }
}

int64_t CudaStream::staging_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t bytes = 0;
  for (const auto& exchange : exchanges_) bytes += kHeader + exchange->capacity;
  return bytes;
}

void CudaStream::set_generation(uint32_t generation) {
  std::lock_guard<std::mutex> lock(mutex_);
  first_generation_ = generation;
  for (const auto& exchange : exchanges_) {
    exchange->generation = *exchange->go = *exchange->done = generation;
  }
}

// The exchange is queued first: a driver that executes everything at once calls the host in here.
void CudaStream::announce(Exchange* exchange) {
  bool asleep = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    // Before it is queued: if there is no courier, nobody may ever wait for this exchange.
    if (sync_ != CudaSync::kHostFunctions && !courier_.joinable()) {
      const SignalsBlocked blocked;
      courier_ = std::thread([this] { serve(); });
    }
    queue_.push_back(exchange);
    queued_.fetch_add(1, std::memory_order_release);
    asleep = asleep_;
  }
  if (asleep) wake_.notify_one();
}

int CudaStream::exchange_by_kernel(Exchange* exchange, const CudaCopies& operands,
                                   const CudaCopies& results) {
  announce(exchange);
  CudaSignal signal;
  signal.signalled = address(exchange->go);
  signal.awaited = exchange->waits ? address(exchange->done) : 0;
  signal.value = exchange->generation;
  bool launched = false;
  const int error =
      enqueue_exchange(*driver_, copy_kernel_, stream_, operands, results, signal, &launched);
  // A kernel that waits must be answered, whatever failed behind it.
  if (!launched) exchange->refused.store(true, std::memory_order_release);
  return error;
}

int CudaStream::call_host(Exchange* exchange) {
  announce(exchange);
  if (sync_ == CudaSync::kHostFunctions) {
    const auto call = [](void* data) {
      Exchange* called = static_cast<Exchange*>(data);
      called->stream->answer(called);
    };
    const int error = driver_->launch_host_function(stream_, call, exchange);
    if (error != 0) forget(exchange);
    return error;
  }
  const int error =
      driver_->write_value(stream_, address(exchange->go), exchange->generation, 0);
  if (error != 0) {
    exchange->refused.store(true, std::memory_order_release);
    return error;
  }
  if (!exchange->waits) return 0;
  return driver_->wait_value(stream_, address(exchange->done), exchange->generation,
                             kWaitGreaterEqual);
}

std::string CudaStream::enqueue(Exchange* exchange, const CudaCopies& operands,
                                std::function<void()> work, bool waits,
                                const CudaCopies& results) {
  std::lock_guard<std::mutex> order(enqueue_mutex_);
  const CurrentContext context(*driver_, stream_);
  ++exchange->generation;
  exchange->work = std::move(work);
  exchange->waits = waits;
  // After an error the exchange is given up, because the stream may still write to it.
  int error = context.error();
  if (error == 0 && sync_ == CudaSync::kKernels) {
    error = exchange_by_kernel(exchange, operands, results);
  } else {
    if (error == 0) error = enqueue_copies(*driver_, copy_kernel_, stream_, operands);
    if (error == 0) error = call_host(exchange);
    if (error == 0) error = enqueue_copies(*driver_, copy_kernel_, stream_, results);
  }
  if (error == 0) return "";
  return "expected the CUDA stream to take host work, got " + driver_->describe(error) +
         "; look for an earlier failure on this device";
}

void CudaStream::forget(Exchange* exchange) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.erase(std::find(queue_.begin(), queue_.end(), exchange));
    queued_.fetch_sub(1, std::memory_order_relaxed);
  }
  idle_.notify_all();
}

// Returns false if the stream will not get there.
bool CudaStream::await(const Exchange* exchange) const {
  const auto ready = [&] {
    return __atomic_load_n(exchange->go, __ATOMIC_ACQUIRE) == exchange->generation;
  };
  const auto over = [&] {
    return stop_.load(std::memory_order_acquire) ||
           exchange->refused.load(std::memory_order_acquire);
  };
  const Clock::time_point start = Clock::now();
  while (true) {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
    if (over()) return false;
    const Clock::duration waited = Clock::now() - start;
    if (waited > kPatience) {
      std::this_thread::sleep_for(kLongNap);
    } else if (waited > kSpin) {
      std::this_thread::sleep_for(kShortNap);
    }
  }
}

// Where the device is faster than the program that enqueues, the next exchange comes soon.
void CudaStream::await_exchange() const {
  const Clock::time_point end = Clock::now() + kSpin;
  while (queued_.load(std::memory_order_acquire) == 0 && !stop_.load(std::memory_order_acquire) &&
         Clock::now() < end) {
    relax();
  }
}

void CudaStream::serve() {
  run_on(runtime().pool.cpus());
#if defined(__linux__)
  // Naps of microseconds would be rounded up to more than twice their length.
  prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL);
#endif
  while (true) {
    Exchange* exchange = nullptr;
    await_exchange();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_ = true;
      wake_.wait(lock, [&] { return stop_.load() || !queue_.empty(); });
      asleep_ = false;
      if (stop_.load()) return;
      exchange = queue_.front();
    }
    if (await(exchange)) {
      answer(exchange);
    } else if (exchange->refused.load(std::memory_order_acquire)) {
      forget(exchange);
    }
  }
}

void CudaStream::answer(Exchange* exchange) noexcept {
  {
    // The stream is in order, so it has passed everything that came before.
    std::lock_guard<std::mutex> lock(mutex_);
    free_.insert(free_.end(), spent_.begin(), spent_.end());
    spent_.clear();
  }
  exchange->work();
  // First of all, because the stream waits for it; the exchange cannot be taken again before it is
  // on one of the lists.
  __atomic_store_n(exchange->done, exchange->generation, __ATOMIC_RELEASE);
  exchange->work = nullptr;
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.pop_front();
  queued_.fetch_sub(1, std::memory_order_relaxed);
  (exchange->waits ? spent_ : lent_).push_back(exchange);
  idle_.notify_all();
}

bool CudaStream::drain(Clock::time_point deadline) {
  while (true) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      const auto nap = std::min(deadline, Clock::now() + kDrainNap);
      if (idle_.wait_until(lock, nap, [&] { return queue_.empty(); })) return true;
    }
    // A device that has failed never gets to the host work it was given.
    const CurrentContext context(*driver_, stream_);
    const int error = context.error() == 0 ? driver_->query_stream(stream_) : context.error();
    if ((error != 0 && error != kNotReady) || Clock::now() >= deadline) return false;
  }
}

}  // namespace fluxion
