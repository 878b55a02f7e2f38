// The one pool, slot table and cancel table of the process.
//
// Created at first use and never destroyed; its threads are stopped at exit. After a fork the child
// gets a new one: its parent's threads do not exist there and may have died holding a lock, so the
// old one is left alone. Ticks and cancel words of the parent are unknown in the child.

#ifndef FLUXION_RUNTIME_H_
#define FLUXION_RUNTIME_H_

#include <atomic>
#include <cstdint>

#include "cancel.h"
#include "cpus.h"
#include "pool.h"
#include "slots.h"

namespace fluxion {

// A test seam: one call of an operation is made to fail.
class Fault {
 public:
  // Lets `after_calls` calls pass and adds `status` to the next; kOk disarms.
  void arm(uint32_t status, int64_t after_calls) {
    status_.store(status, std::memory_order_relaxed);
    countdown_.store(status == kOk ? 0 : after_calls + 1, std::memory_order_release);
  }

  // To be called by every call; returns the status to add.
  uint32_t next() {
    if (countdown_.load(std::memory_order_acquire) <= 0) return kOk;
    return countdown_.fetch_sub(1, std::memory_order_acq_rel) == 1
               ? status_.load(std::memory_order_relaxed)
               : uint32_t{kOk};
  }

 private:
  std::atomic<uint32_t> status_{0};
  std::atomic<int64_t> countdown_{0};
};

// FLUXION_TIMEOUT_S if it is a positive number, otherwise 300 seconds.
Clock::duration default_timeout();

struct Runtime {
  Pool pool{default_threads(), wanted_cpus(), default_spin()};
  // How long a collect waits before it gives up.
  std::atomic<Clock::duration> timeout{default_timeout()};
  SlotTable slots;
  CancelTable cancels;
  Fault append_fault;
  Fault collect_fault;
};

Runtime& runtime();

}  // namespace fluxion

#endif  // FLUXION_RUNTIME_H_
