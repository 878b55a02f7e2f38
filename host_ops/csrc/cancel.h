// Cancel words: flags a Python thread can raise while a compiled program runs.
//
// A word is named by a positive id, which travels through the program as data. Work that was
// submitted under an id keeps the word alive, so releasing an id while work runs is harmless.
// Any thread may call anything.

#ifndef FLUXION_CANCEL_H_
#define FLUXION_CANCEL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace fluxion {

using CancelWord = std::shared_ptr<std::atomic<bool>>;

class CancelTable {
 public:
  int32_t create() {
    std::lock_guard<std::mutex> lock(mutex_);
    const int32_t id = next_++;
    words_[id] = std::make_shared<std::atomic<bool>>(false);
    return id;
  }

  // The word of `id`, or null for an unknown id.
  CancelWord find(int32_t id) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = words_.find(id);
    return found == words_.end() ? nullptr : found->second;
  }

  // Returns false for an unknown id.
  bool cancel(int32_t id) {
    const CancelWord word = find(id);
    if (word != nullptr) word->store(true, std::memory_order_release);
    return word != nullptr;
  }

  bool release(int32_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    return words_.erase(id) > 0;
  }

 private:
  mutable std::mutex mutex_;
  int32_t next_ = 1;
  std::unordered_map<int32_t, CancelWord> words_;
};

}  // namespace fluxion

#endif  // FLUXION_CANCEL_H_
