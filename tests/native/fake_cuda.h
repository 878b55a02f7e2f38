// A CUDA driver without a device: each stream is a thread that executes what it was given, in order.
//
// It has what the library calls of the driver, and faults to order. Memory of the device is ordinary
// memory; what lies in `device_memory` counts as the device's own. Streams belong to the test.

#ifndef FLUXION_TESTS_FAKE_CUDA_H_
#define FLUXION_TESTS_FAKE_CUDA_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda_driver.h"

namespace fluxion_tests {

class FakeStream {
 public:
  FakeStream();
  // Executes the rest.
  ~FakeStream();

  void push(std::function<void()> operation);
  // Executes nothing until `go_on`.
  void pause();
  void go_on();
  // Returns once everything pushed so far has been executed.
  void synchronize();
  // To be called by an operation that waits: whether the stream is being taken down.
  bool ending() const { return ending_; }
  // Executed by an exchange's kernel between its operands' copies and its signal.
  std::function<void()> before_signal;

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> operations_;
  bool busy_ = false;
  bool paused_ = false;
  std::atomic<bool> ending_{false};
  std::thread thread_;
};

struct FakeFaults {
  // Calls of the driver, other than those about contexts and errors, that still succeed; -1: all.
  std::atomic<int> calls_left{-1};
  std::atomic<bool> no_kernels{false};
  std::atomic<bool> no_memory_operations{false};
  std::atomic<bool> failed_device{false};
};

FakeFaults& fake_faults();

// Where memory counts as the device's own.
void set_device_memory(const void* first, int64_t bytes);

// Writes `to` over `from`, as many bytes, wherever these lie in pinned memory; returns in how many
// places.
int replace_pinned(const void* from, const void* to, int64_t bytes);

fluxion::CudaDriver fake_driver();

}  // namespace fluxion_tests

#endif  // FLUXION_TESTS_FAKE_CUDA_H_
