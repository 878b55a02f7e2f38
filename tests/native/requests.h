// Runs a case through submit, start and collect, as a program does, and checks what comes back.

#ifndef FLUXION_TESTS_REQUESTS_H_
#define FLUXION_TESTS_REQUESTS_H_

#include <algorithm>
#include <atomic>
#include <thread>

#include "cases.h"
#include "check.h"
#include "operations.h"

namespace fluxion_tests {

struct Result {
  std::vector<float> out, lse;
  int32_t status = -1;
  float times[kTimes];
  std::vector<int32_t> blocks_read, units_scanned;
  std::vector<uint32_t> selection;
};

inline Result collect_tick(Case& c, const int32_t tick[2], uint32_t status = kOk,
                           bool may_leave = false) {
  const Geometry& g = c.g;
  Result r;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  r.out.assign(g.batch * g.heads * g.head_dim, nan);
  r.lse.assign(g.batch * g.heads, nan);
  r.blocks_read.assign(g.batch * g.kv_heads, -1);
  r.units_scanned.assign(g.batch * g.kv_heads, -1);
  r.selection.assign(g.batch * g.heads * g.words(), 0xdeadbeef);
  collect(tick, g, c.cache(), c.flush(), status,
          {r.out.data(), r.lse.data(), &r.status, r.times, r.blocks_read.data(),
           r.units_scanned.data(), r.selection.data()},
          may_leave);
  return r;
}

inline Result run(Case& c, int32_t cancel = 0) {
  WorkView work = c.work();
  work.cancel = cancel;
  int32_t tick[2];
  submit(c.g, work, c.cache(), c.scale, tick);
  std::atomic<bool> finished{false};
  const bool held = start(tick, [&] { finished = true; });
  Result r = collect_tick(c, tick);
  while (held && !finished) std::this_thread::yield();
  return r;
}

inline bool is_empty(const Result& r) {
  return std::all_of(r.out.begin(), r.out.end(), [](float x) { return x == 0.0f; }) &&
         std::all_of(r.lse.begin(), r.lse.end(), [](float x) { return std::isinf(x) && x < 0; });
}

inline bool same_bits(const Result& a, const Result& b) {
  return std::memcmp(a.out.data(), b.out.data(), a.out.size() * sizeof(float)) == 0 &&
         std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * sizeof(float)) == 0 &&
         a.selection == b.selection && a.blocks_read == b.blocks_read;
}

inline std::set<int32_t> selected(const Result& r, const Geometry& g, int64_t row, int32_t below) {
  std::set<int32_t> blocks;
  for (int32_t i = 0; i < std::min<int64_t>(below, g.blocks); ++i) {
    if (r.selection[row * g.words() + i / 32] >> (i % 32) & 1) blocks.insert(i);
  }
  return blocks;
}

// Attention of the selected blocks below the boundary. Which they are is tested against NumPy.
inline void check_result(const Result& r, const Case& c) {
  const Geometry& g = c.g;
  for (int64_t b = 0; b < g.batch; ++b) {
    for (int64_t n = 0; n < g.heads; ++n) {
      const int64_t row = b * g.heads + n;
      const int32_t boundary = c.boundary[b * g.kv_heads + n / g.group()];
      const std::set<int32_t> whole = selected(r, g, row, static_cast<int32_t>(g.blocks));
      CHECK(whole.empty() || (boundary > 0 && *whole.rbegin() < c.host_blocks[b]));
      const State want = attend_plainly(c, b, n, selected(r, g, row, boundary));
      CHECK_CLOSE(r.lse[row], want.lse, 3e-6);
      for (int64_t i = 0; i < g.head_dim; ++i) {
        CHECK_CLOSE(r.out[row * g.head_dim + i], want.out[i], 3e-6);
      }
    }
  }
}

}  // namespace fluxion_tests

#endif  // FLUXION_TESTS_REQUESTS_H_
