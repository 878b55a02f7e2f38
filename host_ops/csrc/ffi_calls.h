// Reads calls out of XLA's operands and results, for every platform.
//
// Operands come in the order in which host_ops/ffi.py passes them; optional ones come last and are
// announced by attributes. With `has_first_row` the first operand is int32 [1], and the cache's
// arrays have more rows than the call has sequences. Shape and dtype mistakes are errors of the program and fail the call;
// mistakes in values become a status, because values are only known while the program runs.
// After a mistake `in.ok()` is false, and the call must not be used.

#ifndef FLUXION_FFI_CALLS_H_
#define FLUXION_FFI_CALLS_H_

#include "calls.h"
#include "ffi_operands.h"

namespace fluxion {

AppendCall read_append(Operands& in, bool has_summaries, bool has_first_row = false);
SubmitCall read_submit(Operands& in, bool has_summaries, bool has_bitmap, float scale,
                       bool has_first_row = false);
CollectCall read_collect(Operands& in, bool has_summaries, bool return_selection,
                         bool has_first_row = false, bool delivered = false);

// Does nothing: tells the framework that an array may change in place before this call, seen by
// what takes the result, and not after it.
ffi::Error keep(ffi::RemainingArgs args, ffi::RemainingRets rets);

// An exception (only std::bad_alloc of an error text is conceivable) must not cross the C border.
template <typename Body>
ffi::Error guarded(const Body& body) noexcept {
  try {
    return body();
  } catch (...) {
    return ffi::Error::Internal("fluxion: out of memory in a handler");
  }
}

}  // namespace fluxion

#endif  // FLUXION_FFI_CALLS_H_
