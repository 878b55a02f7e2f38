#include "runtime.h"

#include <pthread.h>

#include <cstdlib>

namespace fluxion {
namespace {

constexpr double kDefaultTimeout_s = 300.0;

std::atomic<Runtime*> current{nullptr};

// Workers must not run while the process takes its memory down.
void at_exit() {
  Runtime* instance = current.load(std::memory_order_acquire);
  if (instance != nullptr) instance->pool.set_threads(1);
}

// The next use creates a new runtime; the old one is never touched again.
void after_fork_in_child() { current.store(nullptr, std::memory_order_release); }

// Runs when the library is loaded, while no thread of ours exists.
struct Hooks {
  Hooks() {
    std::atexit(at_exit);
    pthread_atfork(nullptr, nullptr, after_fork_in_child);
  }
};
const Hooks hooks;

}  // namespace

Runtime& runtime() {
  Runtime* instance = current.load(std::memory_order_acquire);
  if (instance != nullptr) return *instance;
  Runtime* fresh = new Runtime();
  if (current.compare_exchange_strong(instance, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *instance;
}

Clock::duration default_timeout() {
  double seconds = kDefaultTimeout_s;
  const char* text = std::getenv("FLUXION_TIMEOUT_S");
  if (text != nullptr && *text != '\0') {
    char* end = nullptr;
    const double wanted = std::strtod(text, &end);
    if (*end == '\0' && wanted > 0.0 && wanted < 1e9) seconds = wanted;
  }
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

}  // namespace fluxion
