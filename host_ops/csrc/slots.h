// The table of requests in flight, named by ticks.
//
// A tick is (slot, generation): the slot's place in a list that grows and is reused, and how often
// it has been taken. A stale or invented tick is told from a live one by the generation.
// Any thread may call anything; a claimed slot belongs to the claiming thread until released.
//
// A slot is reserved as soon as a program is enqueued, perhaps many layers ahead of its data. The
// request that does the work, with all of its memory, is lent to it only from submit to collect: so a
// program has one however far it runs ahead, and finds it as the layer before has left it, in the
// caches.

#ifndef FLUXION_SLOTS_H_
#define FLUXION_SLOTS_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "tasks.h"

namespace fluxion {

struct Slot {
  enum class State { kFree, kInFlight, kClaimed, kRetired };

  int32_t index = 0;
  int32_t generation = 0;
  State state = State::kFree;
  bool abandoned = false;
  Clock::time_point abandoned_at;
  Request* request = nullptr;  // Of the table's; null until one is lent.
  Lease lease;                 // Of what the request reads elsewhere; null if it has its own.

  void hold(const Lease& lent) {
    lease = lent;
    if (lease != nullptr) lease->store(true, std::memory_order_relaxed);
  }
  void end_lease() {
    if (lease != nullptr) lease->store(false, std::memory_order_release);
    lease = nullptr;
  }

  // Whether no thread works for it.
  bool at_rest() const { return request == nullptr || request->at_rest(); }
};

class SlotTable {
 public:
  // A slot of the caller's own, claimed, under a new generation. Throws std::bad_alloc.
  Slot* acquire();

  // Lends a claimed slot the request that was given back last. Throws std::bad_alloc.
  Request& lend(Slot* slot);

  // Hands a slot over to whoever collects it.
  void publish(Slot* slot);

  // The slot of a tick, now claimed by the caller; null unless it is in flight.
  Slot* claim(int32_t index, int32_t generation);

  // Starts the request of a tick unless it is collected already, and arranges for `action` to be
  // called when it has finished. Returns whether `action` will be called.
  bool start(int32_t index, int32_t generation, Pool* pool, std::function<void()> action);

  // Copies what is lent to the request of a tick which may not be started for long. Without memory
  // collect reports it.
  void end_loan(int32_t index, int32_t generation);

  void release(Slot* slot);

  // Gives up a claimed slot that a thread still works on. No tick finds it again; it is taken for
  // new requests once that thread has left it, for which `drain` waits.
  void retire(Slot* slot);

  // Waits until all work that was started has run (helping), or the deadline. Slots whose collect
  // has not come by then are marked abandoned: a late collect still finds them, but after a grace
  // period they may be taken for new requests. Returns how many were marked.
  int drain(Pool* pool, Clock::time_point deadline);

  // Slots submitted, neither collected nor abandoned.
  int in_flight() const;

  // Requests that were ever needed at once.
  int requests() const;

 private:
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::vector<std::unique_ptr<Request>> requests_;  // Never destroyed, like slots.
  std::vector<Request*> idle_;                      // The last one is the warmest.
};

}  // namespace fluxion

#endif  // FLUXION_SLOTS_H_
