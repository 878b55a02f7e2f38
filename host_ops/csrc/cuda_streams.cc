// The streams of the process. As with runtime.cc, a child after a fork begins with none.

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "cpus.h"
#include "cuda_stream.h"
#include "runtime.h"

namespace fluxion {
namespace {

constexpr int kFreeCpus = 2;

struct Streams {
  std::mutex mutex;
  std::unordered_map<CudaDriver::Stream, std::unique_ptr<CudaStream>> by_name;
};

std::atomic<Streams*> current{nullptr};

Streams& streams() {
  Streams* instance = current.load(std::memory_order_acquire);
  if (instance != nullptr) return *instance;
  Streams* fresh = new Streams();
  if (current.compare_exchange_strong(instance, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *instance;
}

// Couriers must not run while the process takes its memory down. The driver may still call host
// functions, so the streams themselves stay.
void at_exit() {
  Streams* instance = current.load(std::memory_order_acquire);
  if (instance == nullptr) return;
  std::lock_guard<std::mutex> lock(instance->mutex);
  for (auto& [name, stream] : instance->by_name) {
    if (stream != nullptr && stream->sync() != CudaSync::kHostFunctions) stream.reset();
  }
}

void after_fork_in_child() { current.store(nullptr, std::memory_order_release); }

struct Hooks {
  Hooks() {
    std::atexit(at_exit);
    pthread_atfork(nullptr, nullptr, after_fork_in_child);
  }
};
const Hooks hooks;

void prepare_pool() {
  Pool& pool = runtime().pool;
  pool.stay_awake(true);
  const char* chosen = std::getenv("FLUXION_NUM_THREADS");
  if (chosen != nullptr && *chosen != '\0') return;
  if (pool.threads() != default_threads()) return;
  pool.set_threads(std::max(1, default_threads() - kFreeCpus));
}

}  // namespace

CudaSync wanted_cuda_sync() {
  const char* wanted = std::getenv("FLUXION_CUDA_SYNC");
  if (wanted != nullptr && std::strcmp(wanted, "hostfunc") == 0) return CudaSync::kHostFunctions;
  if (wanted != nullptr && std::strcmp(wanted, "memops") == 0) return CudaSync::kMemoryOperations;
  if (wanted != nullptr && std::strcmp(wanted, "kernel") == 0) return CudaSync::kKernels;
  const char* blocking = std::getenv("CUDA_LAUNCH_BLOCKING");
  const bool simple = blocking != nullptr && *blocking != '\0' && std::strcmp(blocking, "0") != 0;
  return simple ? CudaSync::kHostFunctions : CudaSync::kKernels;
}

CudaStream& cuda_stream(const CudaDriver* driver, CudaDriver::Stream stream) {
  Streams& all = streams();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (all.by_name.empty()) prepare_pool();
  auto& found = all.by_name[stream];
  if (found == nullptr) {
    found = std::make_unique<CudaStream>(driver, stream, wanted_cuda_sync());
  }
  return *found;
}

const char* describe_cuda() {
  Streams* instance = current.load(std::memory_order_acquire);
  if (instance == nullptr) return "";
  std::lock_guard<std::mutex> lock(instance->mutex);
  for (const auto& [name, stream] : instance->by_name) {
    if (stream == nullptr) continue;
    if (stream->sync() == CudaSync::kKernels) return "kernels";
    if (stream->sync() == CudaSync::kHostFunctions) {
      return stream->has_copy_kernel() ? "hostfunc, kernel" : "hostfunc, memcpy";
    }
    return stream->has_copy_kernel() ? "memops, kernel" : "memops, memcpy";
  }
  return "";
}

bool drain_cuda(Clock::time_point deadline) {
  Streams* instance = current.load(std::memory_order_acquire);
  if (instance == nullptr) return true;
  std::vector<CudaStream*> all;
  {
    std::lock_guard<std::mutex> lock(instance->mutex);
    for (const auto& [name, stream] : instance->by_name) {
      if (stream != nullptr) all.push_back(stream.get());
    }
  }
  bool drained = true;
  for (CudaStream* stream : all) drained &= stream->drain(deadline);
  return drained;
}

}  // namespace fluxion
