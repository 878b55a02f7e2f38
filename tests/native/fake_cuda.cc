#include "fake_cuda.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda_copy.h"

using fluxion::CudaCopy;
using fluxion::CudaDriver;

namespace fluxion_tests {
namespace {

constexpr int kFailed = 999;
constexpr int kUnsupported = 801;
constexpr int kNotReady = 600;

std::atomic<const char*> device_first{nullptr};
std::atomic<int64_t> device_bytes{0};

bool fails() {
  FakeFaults& faults = fake_faults();
  if (faults.failed_device) return true;
  if (faults.calls_left < 0) return false;
  return faults.calls_left-- <= 0;
}

int push(CudaDriver::Stream stream, std::function<void()> operation) {
  if (fails()) return kFailed;
  static_cast<FakeStream*>(stream)->push(std::move(operation));
  return 0;
}

void copy_bytes(uint64_t to, uint64_t from, size_t bytes) {
  if (bytes == 0) return;
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
}

// Never given back, as by the library; static, so that it does not count as a leak.
struct Pinned {
  std::mutex mutex;
  std::deque<std::vector<char>> all;
};

Pinned& pinned() {
  static Pinned memory;
  return memory;
}

int copy(uint64_t to, uint64_t from, size_t bytes, CudaDriver::Stream stream) {
  return push(stream, [=] { copy_bytes(to, from, bytes); });
}

void wait_for(const FakeStream* stream, uint64_t address, uint32_t value) {
  const auto* word = reinterpret_cast<const uint32_t*>(address);
  const auto reached = [&] {
    return static_cast<int32_t>(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) >= 0;
  };
  while (!reached() && !stream->ending()) std::this_thread::yield();
}

int launch_kernel(CudaDriver::Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                  unsigned, CudaDriver::Stream stream, void** arguments, void**) {
  // Like the driver, reads the arguments now.
  fluxion::CudaCopies operands, results;
  std::memcpy(operands.items, arguments[0], sizeof operands.items);
  std::memcpy(results.items, arguments[1], sizeof results.items);
  const uint32_t open_units = *static_cast<const uint32_t*>(arguments[3]);
  const uint32_t gate_words = *static_cast<const uint32_t*>(arguments[5]);
  const uint64_t gate = *static_cast<const uint64_t*>(arguments[6]);
  const uint64_t signalled = *static_cast<const uint64_t*>(arguments[7]);
  const uint64_t awaited = *static_cast<const uint64_t*>(arguments[8]);
  const uint32_t value = *static_cast<const uint32_t*>(arguments[9]);
  auto* fake = static_cast<FakeStream*>(stream);
  return push(stream, [=] {
    const auto* words = reinterpret_cast<const uint32_t*>(gate);
    const bool closed = gate != 0 && std::all_of(words, words + gate_words, [](uint32_t word) {
      return word == 0;
    });
    uint64_t units = 0;
    for (const CudaCopy& entry : operands.items) {
      if (!closed || units < open_units) copy_bytes(entry.to, entry.from, 4 * entry.words);
      units += (entry.words + 3) / 4;
    }
    if (fake->before_signal) fake->before_signal();
    if (signalled != 0) {
      __atomic_store_n(reinterpret_cast<uint32_t*>(signalled), value, __ATOMIC_RELEASE);
    }
    if (awaited != 0) wait_for(fake, awaited, value);
    for (const CudaCopy& entry : results.items) copy_bytes(entry.to, entry.from, 4 * entry.words);
  });
}

int write_value(CudaDriver::Stream stream, uint64_t address, uint32_t value, unsigned) {
  if (fake_faults().no_memory_operations) return kUnsupported;
  return push(stream, [=] {
    __atomic_store_n(reinterpret_cast<uint32_t*>(address), value, __ATOMIC_RELEASE);
  });
}

int wait_value(CudaDriver::Stream stream, uint64_t address, uint32_t value, unsigned) {
  auto* fake = static_cast<FakeStream*>(stream);
  return push(stream, [=] { wait_for(fake, address, value); });
}

}  // namespace

FakeStream::FakeStream() : thread_([this] { run(); }) {}

FakeStream::~FakeStream() {
  go_on();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void FakeStream::push(std::function<void()> operation) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    operations_.push_back(std::move(operation));
  }
  changed_.notify_all();
}

void FakeStream::pause() {
  std::lock_guard<std::mutex> lock(mutex_);
  paused_ = true;
}

void FakeStream::go_on() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    paused_ = false;
  }
  changed_.notify_all();
}

void FakeStream::synchronize() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return operations_.empty() && !busy_; });
}

void FakeStream::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return ending_ || (!paused_ && !operations_.empty()); });
    if (operations_.empty()) return;
    const std::function<void()> operation = std::move(operations_.front());
    operations_.pop_front();
    busy_ = true;
    lock.unlock();
    operation();
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

FakeFaults& fake_faults() {
  static FakeFaults faults;
  return faults;
}

void set_device_memory(const void* first, int64_t bytes) {
  device_first = static_cast<const char*>(first);
  device_bytes = bytes;
}

int replace_pinned(const void* from, const void* to, int64_t bytes) {
  const auto* sought = static_cast<const char*>(from);
  int places = 0;
  std::lock_guard<std::mutex> lock(pinned().mutex);
  for (std::vector<char>& memory : pinned().all) {
    auto found = memory.begin();
    while ((found = std::search(found, memory.end(), sought, sought + bytes)) != memory.end()) {
      std::memcpy(&*found, to, bytes);
      found += bytes;
      ++places;
    }
  }
  return places;
}

CudaDriver fake_driver() {
  CudaDriver driver;
  driver.stream_context = [](CudaDriver::Stream, CudaDriver::Context* context) {
    *context = nullptr;
    return fake_faults().failed_device ? kFailed : 0;
  };
  driver.push_context = [](CudaDriver::Context) { return 0; };
  driver.pop_context = [](CudaDriver::Context*) { return 0; };
  driver.copy = copy;
  driver.query_stream = [](CudaDriver::Stream) {
    return fake_faults().failed_device ? kFailed : kNotReady;
  };
  driver.launch_host_function = [](CudaDriver::Stream stream, void (*call)(void*), void* data) {
    return push(stream, [=] { call(data); });
  };
  driver.allocate_host = [](void** memory, size_t bytes, unsigned) {
    if (fails()) return kFailed;
    std::lock_guard<std::mutex> lock(pinned().mutex);
    pinned().all.emplace_back(bytes + 64);
    const auto address = reinterpret_cast<uintptr_t>(pinned().all.back().data());
    *memory = reinterpret_cast<void*>((address + 63) / 64 * 64);
    return 0;
  };
  driver.pointer_attribute = [](void* type, int, uint64_t pointer) {
    const uint64_t offset = pointer - reinterpret_cast<uint64_t>(device_first.load());
    *static_cast<unsigned*>(type) = offset < static_cast<uint64_t>(device_bytes) ? 2 : 1;
    return 0;
  };
  driver.error_string = [](int, const char** text) {
    *text = "a fault to order";
    return 0;
  };
  driver.load_module = [](CudaDriver::Module* module, const void*) {
    *module = module;
    return fake_faults().no_kernels ? kUnsupported : 0;
  };
  driver.get_function = [](CudaDriver::Function* function, CudaDriver::Module, const char*) {
    *function = function;
    return 0;
  };
  driver.launch_kernel = launch_kernel;
  driver.write_value = write_value;
  driver.wait_value = wait_value;
  return driver;
}

}  // namespace fluxion_tests
