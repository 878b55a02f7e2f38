#include "operations.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>

#include "append.h"
#include "fetch.h"
#include "runtime.h"

namespace fluxion {
namespace {

// The slot of a tick that carries a status instead of naming a slot.
constexpr int32_t kFailedSlot = -1;

// Of a lender who does not look at it. Made when the library is loaded, for later there may be no
// memory.
const Lease unseen_lease = std::make_shared<std::atomic<bool>>(false);

// How long a part of a task may take to notice that it has been cut off.
constexpr auto kCutOff = std::chrono::seconds(1);

float seconds(Clock::duration duration) { return std::chrono::duration<float>(duration).count(); }

void write_empty(const Geometry& g, const CollectOut& out) {
  std::fill_n(out.out, g.batch * g.heads * g.head_dim, 0.0f);
  std::fill_n(out.lse, g.batch * g.heads, -std::numeric_limits<float>::infinity());
  std::fill_n(out.blocks_read, g.batch * g.kv_heads, 0);
  std::fill_n(out.units_scanned, g.batch * g.kv_heads, 0);
  if (out.selection != nullptr) {
    std::fill_n(out.selection, g.batch * g.heads * g.words(), uint32_t{0});
  }
}

// Asks for what collect reads and writes behind the tasks.
void fetch_results(const Request& request, const FlushView& flush, const CollectOut& out) {
  fetch(flush.first_block, 1);
  fetch(flush.num_blocks, 1);
  fetch(out.times, 4 * kTimes);
  if (request.status() == kOk) request.fetch_results({out.out, out.lse});
}

void write_results(const Request& request, const CollectOut& out) {
  request.write_results({out.out, out.lse});
  std::copy(request.blocks_read().begin(), request.blocks_read().end(), out.blocks_read);
  std::copy(request.units_scanned().begin(), request.units_scanned().end(), out.units_scanned);
  if (out.selection != nullptr) request.write_selection(out.selection);
}

void read_times(const Request& request, float times[kTimes]) {
  times[kBusy] = static_cast<float>(request.busy_s());
  times[kSpan] = static_cast<float>(request.span_s());
  times[kCovered] = static_cast<float>(request.covered_s());
  times[kScoring] = static_cast<float>(request.scoring_s());
  times[kScored] = static_cast<float>(request.scored_s());
  times[kSelected] = static_cast<float>(request.selected_s());
  times[kAttended] = static_cast<float>(request.attended_s());
}

// A task past its time is cut off at its next part. Returns whether every task has finished.
bool finish(Runtime& run, Request& request, bool may_leave) {
  request.start(&run.pool);
  const Clock::duration patience = run.timeout.load(std::memory_order_relaxed);
  if (run.pool.help(request.left(), Clock::now() + patience)) return true;
  request.abort(kTimeout);
  const auto last = may_leave ? Clock::now() + kCutOff : Clock::time_point::max();
  return run.pool.help(request.left(), last);
}

uint32_t check_collect(const Request& request, const Geometry& geometry, const CacheView& cache,
                       const FlushView& flush) {
  uint32_t status = request.status() | validate_flush(geometry, flush);
  if (!(request.geometry() == geometry)) status |= kInvalid;
  const CacheView& seen = request.cache();
  const bool moved = seen.k != cache.k || seen.v != cache.v || seen.summaries != cache.summaries;
  return moved ? status | kNotInPlace : status;
}

}  // namespace

uint32_t append(const Geometry& geometry, const CacheView& cache, const FlushView& flush) noexcept {
  uint32_t status = validate_flush(geometry, flush);
  try {
    Runtime& run = runtime();
    status |= run.append_fault.next();
    if (status == kOk) write_flush(geometry, cache, flush, &run.pool);
  } catch (...) {
    return kInternal;
  }
  return status;
}

Slot* reserve(int32_t tick[2]) noexcept {
  tick[0] = kFailedSlot;
  tick[1] = kInternal;
  try {
    Slot* slot = runtime().slots.acquire();
    tick[0] = slot->index;
    tick[1] = slot->generation;
    return slot;
  } catch (...) {
    return nullptr;
  }
}

void fill(Slot* slot, const Geometry& geometry, const WorkView& work, const CacheView& cache,
          float scale, const Lease& lease, Results results) noexcept {
  if (slot == nullptr) return;
  const Clock::time_point start = Clock::now();
  Runtime& run = runtime();
  try {
    Request& request = run.slots.lend(slot);
    CancelWord cancel = work.cancel == 0 ? nullptr : run.cancels.find(work.cancel);
    const bool cancel_known = work.cancel == 0 || cancel != nullptr;
    const bool lent = lease != nullptr;
    request.prepare(geometry, work, cache, scale, std::move(cancel), cancel_known, lent, results);
    slot->hold(lease);
  } catch (...) {
    // Without a request at all, collect says the same.
    if (slot->request != nullptr) slot->request->refuse(kInternal);
  }
  if (slot->request != nullptr) slot->request->submit_s = seconds(Clock::now() - start);
  run.slots.publish(slot);
}

void refuse(Slot* slot, uint32_t status) noexcept {
  if (slot == nullptr) return;
  Runtime& run = runtime();
  try {
    Request& request = run.slots.lend(slot);
    request.refuse(status);
    request.submit_s = 0.0;
  } catch (...) {
    // As above.
  }
  run.slots.publish(slot);
}

void give_back(Slot* slot) noexcept {
  if (slot != nullptr) runtime().slots.release(slot);
}

void submit(const Geometry& geometry, const WorkView& work, const CacheView& cache, float scale,
            int32_t tick[2], bool lent, Results results) noexcept {
  Slot* slot = reserve(tick);
  if (slot == nullptr) return;
  // A bitmap is read once more by collect, which may come much later, and so are queries where there
  // are no workers.
  lent = lent && work.bitmap == nullptr && runtime().pool.threads() > 1;
  fill(slot, geometry, work, cache, scale, lent ? unseen_lease : nullptr, results);
}

bool start(const int32_t tick[2], std::function<void()> action) noexcept {
  try {
    Runtime& run = runtime();
    // Queued parts that no worker takes would be run by the collect of some other program, at a
    // time when this one may have failed and given its memory back.
    if (run.pool.threads() < 2) {
      // Who would wait for the action now keeps nothing for it.
      if (action) run.slots.end_loan(tick[0], tick[1]);
      return false;
    }
    const bool started = run.slots.start(tick[0], tick[1], &run.pool, std::move(action));
    // The workers begin with the first push, and the system may have refused all of them; or they
    // have been sent home meanwhile. The program waits for `action` before it collects.
    while (started && run.pool.threads() < 2 && run.pool.run_some()) {
    }
    return started;
  } catch (...) {
    return false;
  }
}

void collect(const int32_t tick[2], const Geometry& geometry, const CacheView& cache,
             const FlushView& flush, uint32_t status, const CollectOut& out,
             bool may_leave) noexcept {
  const Clock::time_point start = Clock::now();
  float times[kTimes] = {};
  try {
    Runtime& run = runtime();
    status |= run.collect_fault.next();
    Slot* slot = tick[0] < 0 ? nullptr : run.slots.claim(tick[0], tick[1]);
    if (slot == nullptr) {
      status |= tick[0] == kFailedSlot && tick[1] == kInternal ? kInternal : kInvalid;
    } else if (slot->request == nullptr) {
      status |= kInternal;
      run.slots.release(slot);
    } else {
      Request& request = *slot->request;
      // Nobody may write there who could be left behind, or whose results are of another size.
      const bool fits = !may_leave && request.geometry() == geometry;
      if (fits) {
        request.write_to({out.out, out.lse});
      } else if (request.at_rest()) {
        // What submit was given may be gone.
        request.keep_results();
      }
      if (request.delivers() && !out.delivered) status |= kInvalid;
      const Clock::time_point claimed = Clock::now();
      const bool finished = finish(run, request, may_leave);
      times[kWaited] = seconds(Clock::now() - claimed);
      times[kOwn] = static_cast<float>(request.submit_s);
      if (finished) {
        fetch_results(request, flush, out);
        read_times(request, times);
        status |= check_collect(request, geometry, cache, flush);
        if (status == kOk) {
          write_results(request, out);
          write_flush(geometry, cache, flush, &run.pool);
        }
        run.slots.release(slot);
      } else {
        status |= request.status();
        run.slots.retire(slot);
      }
    }
  } catch (...) {
    status |= kInternal;
  }
  if (status != kOk) write_empty(geometry, out);
  times[kOwn] += seconds(Clock::now() - start) - times[kWaited];
  std::copy_n(times, kTimes, out.times);
  *out.status = static_cast<int32_t>(status);
}

}  // namespace fluxion
