// Arrays that notice what happens beside them, with and without a sanitizer.
//
// An array ends where a page begins that must not be touched, so that a read or write behind it ends
// the process. The rest of its first page holds a pattern that `intact` looks for. `freeze` makes a
// write to the array itself end the process, too, and `seal` any access.

#ifndef FLUXION_TESTS_GUARDED_H_
#define FLUXION_TESTS_GUARDED_H_

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cases.h"

namespace fluxion_tests {

class Guarded {
 public:
  explicit Guarded(int64_t bytes, const void* contents = nullptr) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    inside_ = std::max<int64_t>((bytes + page - 1) / page, 1) * page;
    whole_ = inside_ + 2 * page;
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, whole_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    first_ = base_ + page;
    data_ = first_ + inside_ - bytes;
    mprotect(first_, inside_, PROT_READ | PROT_WRITE);
    std::memset(first_, kPattern, inside_);
    if (contents != nullptr && bytes > 0) std::memcpy(data_, contents, bytes);
  }
  ~Guarded() { munmap(base_, whole_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

  void freeze() { mprotect(first_, inside_, PROT_READ); }
  void seal() { mprotect(first_, inside_, PROT_NONE); }
  void thaw() { mprotect(first_, inside_, PROT_READ | PROT_WRITE); }

  bool intact() const {
    return std::all_of(first_, data_, [](uint8_t byte) { return byte == kPattern; });
  }

 private:
  static constexpr uint8_t kPattern = 0xA5;

  int64_t inside_ = 0;
  int64_t whole_ = 0;
  uint8_t* base_ = nullptr;
  uint8_t* first_ = nullptr;
  uint8_t* data_ = nullptr;
};

template <typename T>
std::unique_ptr<Guarded> guard(const std::vector<T>& values) {
  return std::make_unique<Guarded>(static_cast<int64_t>(values.size() * sizeof(T)), values.data());
}

inline std::unique_ptr<Guarded> guard(const Stored& values) {
  return values.dtype == DType::kFloat32 ? guard(values.floats) : guard(values.halves);
}

}  // namespace fluxion_tests

#endif  // FLUXION_TESTS_GUARDED_H_
