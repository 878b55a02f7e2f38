#include "slots.h"

#include <limits>

namespace fluxion {
namespace {

// An abandoned slot whose program is only slow must survive at least as long as such a program is
// let live; programs that failed are rare enough for their slots to wait.
constexpr auto kGrace = std::chrono::minutes(10);

}  // namespace

Slot* SlotTable::acquire() {
  std::lock_guard<std::mutex> lock(mutex_);
  Slot* taken = nullptr;
  const Clock::time_point now = Clock::now();
  for (const auto& slot : slots_) {
    const bool expired = slot->state == Slot::State::kInFlight && slot->abandoned &&
                         slot->at_rest() && now - slot->abandoned_at > kGrace;
    const bool left = slot->state == Slot::State::kRetired && slot->at_rest();
    if (slot->state == Slot::State::kFree || expired || left) {
      taken = slot.get();
      break;
    }
  }
  if (taken == nullptr) {
    auto slot = std::make_unique<Slot>();
    slot->index = static_cast<int32_t>(slots_.size());
    slots_.push_back(std::move(slot));
    taken = slots_.back().get();
  }
  taken->generation =
      taken->generation == std::numeric_limits<int32_t>::max() ? 1 : taken->generation + 1;
  taken->state = Slot::State::kClaimed;
  taken->abandoned = false;
  taken->end_lease();
  return taken;
}

Request& SlotTable::lend(Slot* slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (slot->request != nullptr) return *slot->request;
  if (idle_.empty()) {
    requests_.push_back(std::make_unique<Request>());
    idle_.push_back(requests_.back().get());
    // So that nothing allocates when one is given back.
    idle_.reserve(requests_.size());
  }
  slot->request = idle_.back();
  idle_.pop_back();
  return *slot->request;
}

void SlotTable::publish(Slot* slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  slot->state = Slot::State::kInFlight;
}

Slot* SlotTable::claim(int32_t index, int32_t generation) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (index < 0 || index >= static_cast<int64_t>(slots_.size())) return nullptr;
  Slot* slot = slots_[index].get();
  if (slot->state != Slot::State::kInFlight || slot->generation != generation) return nullptr;
  slot->state = Slot::State::kClaimed;
  slot->abandoned = false;
  return slot;
}

bool SlotTable::start(int32_t index, int32_t generation, Pool* pool,
                      std::function<void()> action) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (index < 0 || index >= static_cast<int64_t>(slots_.size())) return false;
  Slot* slot = slots_[index].get();
  if (slot->state != Slot::State::kInFlight || slot->generation != generation) return false;
  if (slot->request == nullptr) return false;
  // Held together, so that no collect can come between and give the slot to another request.
  // Begun first, because others wait for it.
  slot->request->start(pool);
  return slot->request->when_finished(std::move(action));
}

void SlotTable::end_loan(int32_t index, int32_t generation) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (index < 0 || index >= static_cast<int64_t>(slots_.size())) return;
  Slot* slot = slots_[index].get();
  if (slot->state != Slot::State::kInFlight || slot->generation != generation) return;
  if (slot->request == nullptr) return;
  if (slot->lease == nullptr) return;
  try {
    slot->request->end_loan();
  } catch (...) {
    slot->request->refuse(kInternal);
  }
  slot->end_lease();
}

void SlotTable::release(Slot* slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  slot->state = Slot::State::kFree;
  slot->end_lease();
  if (slot->request != nullptr) idle_.push_back(slot->request);
  slot->request = nullptr;
}

void SlotTable::retire(Slot* slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  slot->state = Slot::State::kRetired;
}

int SlotTable::drain(Pool* pool, Clock::time_point deadline) {
  // Neither slots nor requests are ever destroyed, so their pointers outlive the lock.
  struct Pending {
    Slot* slot;
    int32_t generation;
    Request* request;
  };
  std::vector<Pending> pending;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& slot : slots_) {
      const bool submitted = slot->state == Slot::State::kInFlight && !slot->abandoned;
      if (submitted || !slot->at_rest()) {
        pending.push_back({slot.get(), slot->generation, slot->request});
      }
    }
  }
  int marked = 0;
  for (const auto& [slot, generation, request] : pending) {
    if (request != nullptr && !request->at_rest()) pool->help(request->left(), deadline);
    std::lock_guard<std::mutex> lock(mutex_);
    if (slot->state != Slot::State::kInFlight || slot->generation != generation) continue;
    slot->abandoned = true;
    slot->abandoned_at = Clock::now();
    ++marked;
  }
  return marked;
}

int SlotTable::in_flight() const {
  std::lock_guard<std::mutex> lock(mutex_);
  int count = 0;
  for (const auto& slot : slots_) {
    count += slot->state == Slot::State::kInFlight && !slot->abandoned;
  }
  return count;
}

int SlotTable::requests() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int>(requests_.size());
}

}  // namespace fluxion
