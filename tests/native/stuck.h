// Threads that get stuck in a request, and callers without patience for them.

#ifndef FLUXION_TESTS_STUCK_H_
#define FLUXION_TESTS_STUCK_H_

#include <signal.h>
#include <unistd.h>

#include <atomic>

#include "guarded.h"
#include "runtime.h"

namespace fluxion_tests {

// A page whose reader is stuck until it is let go.
class Stuck {
 public:
  explicit Stuck(Guarded* page) {
    page_ = page;
    reached_ = let_go_ = false;
    page->seal();
    struct sigaction action = {};
    action.sa_handler = [](int) {
      reached_ = true;
      while (!let_go_) usleep(100);
      page_->thaw();
    };
    sigaction(SIGSEGV, &action, &before_);
  }
  ~Stuck() { sigaction(SIGSEGV, &before_, nullptr); }

  static void await() {
    while (!reached_) usleep(100);
  }
  static void let_go() { let_go_ = true; }

 private:
  static inline Guarded* page_ = nullptr;
  static inline std::atomic<bool> reached_{false};
  static inline std::atomic<bool> let_go_{false};
  struct sigaction before_ = {};
};

// Nobody waits while there is one.
class ShortTimeout {
 public:
  ShortTimeout() { runtime().timeout = Clock::duration(1); }
  ~ShortTimeout() { runtime().timeout = before_; }

 private:
  const Clock::duration before_ = runtime().timeout;
};

}  // namespace fluxion_tests

#endif  // FLUXION_TESTS_STUCK_H_
