// Threads started while it lives leave signals alone, except those that their own faults raise.

#ifndef FLUXION_SIGNALS_H_
#define FLUXION_SIGNALS_H_

#include <pthread.h>

#include <csignal>

namespace fluxion {

class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace fluxion

#endif  // FLUXION_SIGNALS_H_
