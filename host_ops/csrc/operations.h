// append, submit and collect on plain arrays: everything but the framework's calling convention.
//
// Shapes and dtypes have been checked by the caller; values have not. Nothing throws; whatever
// goes wrong comes back as status bits. Any thread may call anything; a tick is collected once.

#ifndef FLUXION_OPERATIONS_H_
#define FLUXION_OPERATIONS_H_

#include <cstdint>
#include <functional>

#include "types.h"

namespace fluxion {

// Writes blocks now (prefill). Returns the status; nothing is written unless it is kOk.
uint32_t append(const Geometry& geometry, const CacheView& cache, const FlushView& flush) noexcept;

struct Slot;

// The first half of a submit: takes a slot and names it, tick = (slot, generation). Null if there
// is no memory; then the tick says so, and collect reports it.
Slot* reserve(int32_t tick[2]) noexcept;

// The second half, once the values are known: prepares the tasks of `work` and hands the slot over
// to collect. Nothing happens without a slot. With a lease, q, q8 and bitmap are not copied but lent
// to the slot, if they are needed, until it has been collected and no thread reads them any more.
void fill(Slot* slot, const Geometry& geometry, const WorkView& work, const CacheView& cache,
          float scale, const Lease& lease = nullptr, Results results = {}) noexcept;

// Instead of `fill`: hands a slot without tasks over to collect, which answers with `status`.
void refuse(Slot* slot, uint32_t status) noexcept;

// Gives a reserved slot back that will not be filled; it may be null.
void give_back(Slot* slot) noexcept;

// Both halves at once. With `lent`, q and q8 are read where they are until the tick has been collected,
// or until the action that `start` was given is called, or `start` returned false: whichever is first.
// Results that are given are where collect will want them, and are written by then.
void submit(const Geometry& geometry, const WorkView& work, const CacheView& cache, float scale,
            int32_t tick[2], bool lent = false, Results results = {}) noexcept;

// Lets the pool begin the tasks of a tick. Returns whether the program has to be kept alive, with
// the memory of its cache, until `action` is called: from then on nobody reads the cache before
// collect. Without worker threads nothing begins before collect, and false is returned.
bool start(const int32_t tick[2], std::function<void()> action) noexcept;

// What `CollectOut::times` holds, in seconds; the names are those of TIMES in host_ops/types.py.
enum Time {
  kWaited,    // collect waited or helped, until the last task was done
  kBusy,      // threads worked, summed over them; contains the next three
  kSpan,      // from submit to the end of the last task
  kScored,    // scoring, summed over threads
  kSelected,  // selection, summed over threads
  kAttended,  // attention, summed over threads
  kOwn,       // submit and collect themselves, without waiting: copies in and out, the flush
  kCovered,   // at least one thread worked; of the span, the rest is handing over
  kScoring,   // from start to the end of the last scores, or 0
  kTimes,
};

// Where collect writes. All of it is written on every path.
struct CollectOut {
  float* out;              // [B, N, H]
  float* lse;              // [B, N]
  int32_t* status;         // [1]
  float* times;            // [kTimes]
  int32_t* blocks_read;    // [B, K]
  int32_t* units_scanned;  // [B, K]
  uint32_t* selection;     // [B, N, W], or null
  bool delivered = false;  // Whether `out` and `lse` are those that submit was given.
};

// Begins the tasks of a tick if `start` has not, helps with them and waits for them, then writes
// `flush` into the cache.
//
// With any status but kOk the flush is not written and the attention state is that of an empty
// set. `status` is what the caller has found, kNotInPlace if the framework has copied the cache; a
// cache that lies elsewhere than at submit counts as copied as well, because the tasks may have read
// memory that was reused.
//
// Tasks that end meanwhile write straight to `out`, unless `may_leave`. A tick of a submit that was given
// results is invalid where they have not been `delivered`.
//
// A task past its time is cut off at its next part and waited for, unless `may_leave`: then a
// thread that is stuck is left behind with its slot. It may still read the cache until `drain` has
// waited for it, so this is for callers that would otherwise hold up a device.
void collect(const int32_t tick[2], const Geometry& geometry, const CacheView& cache,
             const FlushView& flush, uint32_t status, const CollectOut& out,
             bool may_leave = false) noexcept;

}  // namespace fluxion

#endif  // FLUXION_OPERATIONS_H_
