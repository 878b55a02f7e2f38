// The C functions that host_ops/native.py calls through ctypes. None of them throws.

#include <cstdint>
#include <string>

#include "cuda_stream.h"
#include "dispatch.h"
#include "nodes.h"
#include "runtime.h"

#define FLUXION_EXPORT extern "C" __attribute__((visibility("default")))

using fluxion::runtime;

namespace {

template <typename Body>
int32_t guarded(const Body& body) noexcept {
  try {
    return body();
  } catch (...) {
    return -1;
  }
}

}  // namespace

// Raised whenever a handler's operands or one of these functions change their meaning.
FLUXION_EXPORT int32_t fluxion_interface_version() { return 6; }

FLUXION_EXPORT const char* fluxion_variant() { return fluxion::kernels().name; }

FLUXION_EXPORT const char* fluxion_variants() { return fluxion::variant_names(); }

FLUXION_EXPORT const char* fluxion_variant_problem() { return fluxion::variant_problem(); }

FLUXION_EXPORT int32_t fluxion_threads() {
  return guarded([] { return runtime().pool.threads(); });
}

FLUXION_EXPORT int32_t fluxion_cpus() {
  return guarded([] { return static_cast<int32_t>(fluxion::allowed_cpus().size()); });
}

// The CPUs of the pool's threads, as a list such as "0-3,8"; valid until this thread asks again.
FLUXION_EXPORT const char* fluxion_cpu_list() {
  thread_local std::string text;
  guarded([] {
    const auto& wanted = runtime().pool.cpus();
    text = fluxion::format_cpus(wanted.empty() ? fluxion::allowed_cpus() : wanted);
    return 0;
  });
  return text.c_str();
}

FLUXION_EXPORT int32_t fluxion_spin_us() {
  return guarded([] {
    return static_cast<int32_t>(runtime().pool.spin() / std::chrono::microseconds(1));
  });
}

// Returns 1 if that changed how long idle threads spin, which FLUXION_SPIN_US has not chosen.
FLUXION_EXPORT int32_t fluxion_stay_awake(int32_t awake) {
  return guarded([&] { return runtime().pool.stay_awake(awake != 0) ? 1 : 0; });
}

// How CUDA streams call the host and copy, such as "memops, kernel"; empty before the first call.
FLUXION_EXPORT const char* fluxion_cuda() { return fluxion::describe_cuda(); }

// Lays an array on all memory nodes in turn; returns on how many, 1 if it was left where it is.
FLUXION_EXPORT int32_t fluxion_spread(void* address, int64_t bytes) {
  return guarded([&] {
    const auto nodes = fluxion::memory_nodes();
    const bool moved = nodes.size() > 1 && fluxion::interleave(address, bytes, nodes);
    return moved ? static_cast<int32_t>(nodes.size()) : 1;
  });
}

FLUXION_EXPORT int32_t fluxion_slots_in_flight() {
  return guarded([] { return runtime().slots.in_flight(); });
}

FLUXION_EXPORT int32_t fluxion_set_threads(int32_t threads) {
  return guarded([&] {
    runtime().pool.set_threads(threads);
    return 0;
  });
}

// Returns how many requests were never collected, or -1.
FLUXION_EXPORT int32_t fluxion_drain() {
  return guarded([] {
    const fluxion::Clock::duration patience = runtime().timeout;
    fluxion::drain_cuda(fluxion::Clock::now() + patience);
    return runtime().slots.drain(&runtime().pool, fluxion::Clock::now() + patience);
  });
}

FLUXION_EXPORT int32_t fluxion_new_cancel_word() {
  return guarded([] { return runtime().cancels.create(); });
}

// Returns 1, or 0 for an unknown id.
FLUXION_EXPORT int32_t fluxion_cancel(int32_t id) {
  return guarded([&] { return runtime().cancels.cancel(id) ? 1 : 0; });
}

FLUXION_EXPORT int32_t fluxion_release_cancel_word(int32_t id) {
  return guarded([&] { return runtime().cancels.release(id) ? 1 : 0; });
}

FLUXION_EXPORT int32_t fluxion_inject_append_fault(int32_t status, int64_t after_calls) {
  return guarded([&] {
    runtime().append_fault.arm(static_cast<uint32_t>(status), after_calls);
    return 0;
  });
}

FLUXION_EXPORT int32_t fluxion_inject_collect_fault(int32_t status, int64_t after_calls) {
  return guarded([&] {
    runtime().collect_fault.arm(static_cast<uint32_t>(status), after_calls);
    return 0;
  });
}
