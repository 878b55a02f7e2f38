// The XLA FFI handlers of the CPU backend. Thin: read the call, run operations.h.

#include <algorithm>
#include <cstring>

#include "ffi_calls.h"

namespace fluxion {
namespace {

void move(void* to, const void* from, int64_t bytes) {
  if (to != from) std::memcpy(to, from, bytes);
}

// Where the framework wants the cache elsewhere, it is copied there, so that the result is a valid
// cache; returns whether everything was in place.
bool settle(const Geometry& g, const Rows& rows, CacheView* cache, const CacheView& result) {
  const bool in_place = same_place(*cache, result);
  const int64_t bytes = rows.total * g.kv_heads * g.task_elements() * element_bytes(g.dtype);
  move(result.k, cache->k, bytes);
  move(result.v, cache->v, bytes);
  move(result.summaries, cache->summaries,
       rows.total * g.kv_heads * g.summary_rows() * 2 * g.head_dim);
  *cache = result;
  return in_place;
}

// Names no slot: collect answers that the call was invalid.
constexpr int32_t kNoTick[2] = {-1, 0};

ffi::Error append_handler(ffi::RemainingArgs args, ffi::RemainingRets rets, bool has_summaries,
                          bool has_first_row) {
  return guarded([&] {
    Operands in(args, rets);
    AppendCall call = read_append(in, has_summaries, has_first_row);
    if (!in.ok()) return in.error();
    const bool in_place = settle(call.g, call.rows, &call.cache, call.result);
    const bool found = choose_rows(call.g, call.rows, &call.cache);
    *call.status = !in_place ? kNotInPlace
                   : found   ? append(call.g, call.cache, call.flush)
                             : static_cast<int32_t>(kInvalid);
    return ffi::Error::Success();
  });
}

// Completes when nobody reads the cache and what is lent any more. The framework keeps a program that
// failed, and its memory, until then; without this the workers might read memory that is no longer
// there. Where the tasks are not begun, collect begins them.
ffi::Future submit_impl(ffi::RemainingArgs args, ffi::RemainingRets rets, bool has_summaries,
                        bool has_bitmap, float scale, bool has_first_row, bool begins) {
  ffi::Promise done;
  ffi::Future future(done);
  Operands in(args, rets);
  SubmitCall call = read_submit(in, has_summaries, has_bitmap, scale, has_first_row);
  if (!in.ok()) {
    done.SetError(in.error());
    return future;
  }
  call.work.cancel = *call.cancel;
  if (choose_rows(call.g, call.rows, &call.cache)) {
    submit(call.g, call.work, call.cache, call.scale, call.tick, begins, call.results);
  } else {
    std::copy_n(kNoTick, 2, call.tick);
  }
  const bool begun = begins && start(call.tick, [done]() mutable { done.SetAvailable(); });
  if (!begun) done.SetAvailable();
  return future;
}

// Made when the library is loaded, because without memory no future can be made later.
const ffi::Promise out_of_memory = [] {
  ffi::Promise promise;
  promise.SetError(ffi::Error::Internal("fluxion: out of memory in a handler"));
  return promise;
}();

ffi::Future submit_handler(ffi::RemainingArgs args, ffi::RemainingRets rets, bool has_summaries,
                           bool has_bitmap, float scale, bool has_first_row, bool begins) {
  try {
    return submit_impl(args, rets, has_summaries, has_bitmap, scale, has_first_row, begins);
  } catch (...) {
    return ffi::Future(out_of_memory);
  }
}

ffi::Error collect_handler(ffi::RemainingArgs args, ffi::RemainingRets rets, bool has_summaries,
                           bool return_selection, bool has_first_row, bool delivered) {
  return guarded([&] {
    Operands in(args, rets);
    CollectCall call =
        read_collect(in, has_summaries, return_selection, has_first_row, delivered);
    if (!in.ok()) return in.error();
    call.out.delivered = delivered;
    if (delivered) {
      move(call.out.out, call.given.out, 4 * call.g.batch * call.g.heads * call.g.head_dim);
      move(call.out.lse, call.given.lse, 4 * call.g.batch * call.g.heads);
    }
    const bool in_place = settle(call.g, call.rows, &call.cache, call.result);
    const bool found = choose_rows(call.g, call.rows, &call.cache);
    const uint32_t status = !in_place ? kNotInPlace : found ? kOk : kInvalid;
    collect(call.tick, call.g, call.cache, call.flush, status, call.out);
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace fluxion

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_append_cpu, fluxion::append_handler,
                              xla::ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("has_summaries")
                                  .Attr<bool>("has_first_row"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_submit_cpu, fluxion::submit_handler,
                              xla::ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("has_summaries")
                                  .Attr<bool>("has_bitmap")
                                  .Attr<float>("scale")
                                  .Attr<bool>("has_first_row")
                                  .Attr<bool>("begins"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_collect_cpu, fluxion::collect_handler,
                              xla::ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("has_summaries")
                                  .Attr<bool>("return_selection")
                                  .Attr<bool>("has_first_row")
                                  .Attr<bool>("delivered"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_keep_cpu, fluxion::keep,
                              xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets());

#pragma GCC visibility pop
