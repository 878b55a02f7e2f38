// The XLA FFI handlers of the CPU backend. Thin: check shapes and dtypes, call operations.h.
//
// Operands come in the order in which host_ops/ffi.py passes them; optional ones come last and are
// announced by attributes. Shape and dtype mistakes are errors of the program and fail the call;
// mistakes in values become a status, because values are only known while the program runs.

#include <cstring>

#include "ffi_operands.h"
#include "operations.h"

namespace fluxion {
namespace {

using ffi::DataType;

// Reads k and v, the next two operands, and sets the sizes they tell. Queries tell `heads`.
void read_cache(Operands& in, Geometry* g, CacheView* cache, DataType* dtype) {
  g->batch = in.peek_arg(0, 0);
  g->kv_heads = in.peek_arg(0, 1);
  g->blocks = in.peek_arg(0, 2);
  g->head_dim = in.peek_arg(0, 4);
  *dtype = in.peek_dtype();
  g->dtype = *dtype == DataType::BF16 ? DType::kBFloat16 : DType::kFloat32;
  if (*dtype != DataType::BF16 && *dtype != DataType::F32) {
    in.fail("k: expected bfloat16 or float32, got another dtype; cast the cache");
  }
  if (g->kv_heads < 1 || g->blocks < 8 || g->blocks % 8 != 0 || g->head_dim < 8 ||
      g->head_dim % 8 != 0 || g->head_dim > kMaxHeadDim || g->blocks > INT32_MAX) {
    in.fail("k: expected [B, K, P, 16, H] with P a positive multiple of 8 and H a multiple of 8 up "
            "to 256, got P " + std::to_string(g->blocks) + " and H " +
            std::to_string(g->head_dim) + "; choose another layout");
  }
  cache->k = const_cast<void*>(
      in.arg("k", *dtype, {g->batch, g->kv_heads, g->blocks, kBlockTokens, g->head_dim}));
  cache->v = const_cast<void*>(
      in.arg("v", *dtype, {g->batch, g->kv_heads, g->blocks, kBlockTokens, g->head_dim}));
}

void read_summaries(Operands& in, const Geometry& g, CacheView* cache) {
  cache->summaries = const_cast<int8_t*>(static_cast<const int8_t*>(in.arg(
      "summaries", DataType::S8, {g.batch, g.kv_heads, g.summary_rows(), 2, g.head_dim})));
}

void check_heads(Operands& in, const Geometry& g) {
  if (g.heads < 1 || g.heads % g.kv_heads != 0 || g.group() > kMaxGroup) {
    in.fail("q: expected N a multiple of K = " + std::to_string(g.kv_heads) + " with at most " +
            std::to_string(kMaxGroup) + " query heads to a KV head, got N = " +
            std::to_string(g.heads) + "; use implementation=\"xla\" for larger groups");
  }
}

template <typename T>
const T* as(const void* data) {
  return static_cast<const T*>(data);
}

FlushView read_flush(Operands& in, const Geometry& g, DataType dtype) {
  FlushView flush;
  flush.capacity = in.peek_arg(0, 2);
  const int64_t m = flush.capacity;
  flush.k = in.arg("flush.k", dtype, {g.batch, g.kv_heads, m, kBlockTokens, g.head_dim});
  flush.v = in.arg("flush.v", dtype, {g.batch, g.kv_heads, m, kBlockTokens, g.head_dim});
  flush.summaries = as<int8_t>(
      in.arg("flush.summaries", DataType::S8, {g.batch, g.kv_heads, m, 2, g.head_dim}));
  flush.shift =
      as<int32_t>(in.arg("flush.shift", DataType::S32, {g.batch, g.kv_heads, g.head_dim}));
  flush.first_block = as<int32_t>(in.arg("flush.first_block", DataType::S32, {g.batch}));
  flush.num_blocks = as<int32_t>(in.arg("flush.num_blocks", DataType::S32, {g.batch}));
  return flush;
}

// Reads the results that alias k and v. Where the framework gave them other memory, the cache is
// copied there, so that the result is a valid cache; returns whether everything was in place.
bool settle_cache(Operands& in, const Geometry& g, DataType dtype, CacheView* cache) {
  const std::initializer_list<int64_t> dims = {g.batch, g.kv_heads, g.blocks, kBlockTokens,
                                               g.head_dim};
  void* k = in.ret("k", dtype, dims);
  void* v = in.ret("v", dtype, dims);
  if (!in.ok()) return false;
  const int64_t bytes =
      g.batch * g.kv_heads * g.task_elements() * element_bytes(g.dtype);
  const bool in_place = k == cache->k && v == cache->v;
  if (k != cache->k) std::memcpy(k, cache->k, bytes);
  if (v != cache->v) std::memcpy(v, cache->v, bytes);
  cache->k = k;
  cache->v = v;
  return in_place;
}

bool settle_summaries(Operands& in, const Geometry& g, CacheView* cache) {
  void* result = in.ret("summaries", DataType::S8,
                        {g.batch, g.kv_heads, g.summary_rows(), 2, g.head_dim});
  if (!in.ok()) return false;
  const bool in_place = result == cache->summaries;
  const int64_t bytes = g.batch * g.kv_heads * g.summary_rows() * 2 * g.head_dim;
  if (!in_place) std::memcpy(result, cache->summaries, bytes);
  cache->summaries = static_cast<int8_t*>(result);
  return in_place;
}

ffi::Error append_impl(ffi::RemainingArgs args, ffi::RemainingRets rets, bool has_summaries) {
  Operands in(args, rets);
  Geometry g;
  CacheView cache;
  DataType dtype;
  read_cache(in, &g, &cache, &dtype);
  const FlushView flush = read_flush(in, g, dtype);
  if (has_summaries) read_summaries(in, g, &cache);
  bool in_place = settle_cache(in, g, dtype, &cache);
  int32_t* status = static_cast<int32_t*>(in.ret("status", DataType::S32, {1}));
  if (has_summaries) in_place &= settle_summaries(in, g, &cache);
  if (!in.ok()) return in.error();
  *status = in_place ? append(g, cache, flush) : kNotInPlace;
  return ffi::Error::Success();
}

ffi::Error submit_impl(ffi::RemainingArgs args, ffi::RemainingRets rets, bool has_summaries,
                       bool has_bitmap, float scale) {
  Operands in(args, rets);
  Geometry g;
  CacheView cache;
  DataType dtype;
  read_cache(in, &g, &cache, &dtype);
  g.heads = in.peek_arg(0, 1);
  if (in.ok()) check_heads(in, g);
  if (!in.ok()) return in.error();
  WorkView work;
  work.q = as<float>(in.arg("q", DataType::F32, {g.batch, g.heads, g.head_dim}));
  work.q8 = as<int8_t>(in.arg("q8", DataType::S8, {g.batch, g.heads, g.head_dim}));
  work.granularity = as<int32_t>(in.arg("granularity", DataType::S32, {g.batch, g.kv_heads}));
  work.k_units = as<int32_t>(in.arg("k_units", DataType::S32, {g.batch, g.heads}));
  work.shared = as<int32_t>(in.arg("shared", DataType::S32, {g.batch, g.kv_heads}));
  work.host_blocks = as<int32_t>(in.arg("host_blocks", DataType::S32, {g.batch}));
  work.boundary = as<int32_t>(in.arg("boundary", DataType::S32, {g.batch, g.kv_heads}));
  const int32_t* cancel = as<int32_t>(in.arg("cancel", DataType::S32, {1}));
  if (has_summaries) read_summaries(in, g, &cache);
  if (has_bitmap) {
    work.bitmap =
        as<uint32_t>(in.arg("bitmap", DataType::U32, {g.batch, g.heads, g.words()}));
  }
  if (!has_summaries && !has_bitmap) {
    in.fail("expected summaries or a bitmap, got neither; pass Work.bitmap if the summaries are "
            "on the device");
  }
  int32_t* tick = static_cast<int32_t*>(in.ret("tick", DataType::S32, {2}));
  if (!in.ok()) return in.error();
  work.cancel = *cancel;
  submit(g, work, cache, scale, tick);
  return ffi::Error::Success();
}

// Completes when nobody reads the cache any more. The framework keeps a program that failed, and
// its memory, until then; without this the workers might read memory that is no longer there.
ffi::Future start_impl(ffi::RemainingArgs args, ffi::RemainingRets rets) {
  ffi::Promise done;
  ffi::Future future(done);
  Operands in(args, rets);
  const int32_t* tick = as<int32_t>(in.arg("tick", DataType::S32, {2}));
  int32_t* begun = static_cast<int32_t*>(in.ret("begun", DataType::S32, {1}));
  if (!in.ok()) {
    done.SetError(in.error());
    return future;
  }
  *begun = 1;
  if (!start(tick, [done]() mutable { done.SetAvailable(); })) done.SetAvailable();
  return future;
}

ffi::Error collect_impl(ffi::RemainingArgs args, ffi::RemainingRets rets, bool has_summaries,
                        bool return_selection) {
  Operands in(args, rets);
  Geometry g;
  CacheView cache;
  DataType dtype;
  read_cache(in, &g, &cache, &dtype);
  g.heads = in.peek_ret(2, 1);
  if (in.ok()) check_heads(in, g);
  if (!in.ok()) return in.error();
  const int32_t* tick = as<int32_t>(in.arg("tick", DataType::S32, {2}));
  const FlushView flush = read_flush(in, g, dtype);
  if (has_summaries) read_summaries(in, g, &cache);
  bool in_place = settle_cache(in, g, dtype, &cache);
  CollectOut out{};
  out.out = static_cast<float*>(in.ret("out", DataType::F32, {g.batch, g.heads, g.head_dim}));
  out.lse = static_cast<float*>(in.ret("lse", DataType::F32, {g.batch, g.heads}));
  out.status = static_cast<int32_t*>(in.ret("status", DataType::S32, {1}));
  out.times = static_cast<float*>(in.ret("times", DataType::F32, {kTimes}));
  out.blocks_read =
      static_cast<int32_t*>(in.ret("blocks_read", DataType::S32, {g.batch, g.kv_heads}));
  out.units_scanned =
      static_cast<int32_t*>(in.ret("units_scanned", DataType::S32, {g.batch, g.kv_heads}));
  if (has_summaries) in_place &= settle_summaries(in, g, &cache);
  if (return_selection) {
    out.selection =
        static_cast<uint32_t*>(in.ret("selection", DataType::U32, {g.batch, g.heads, g.words()}));
  }
  if (!in.ok()) return in.error();
  collect(tick, g, cache, flush, in_place, out);
  return ffi::Error::Success();
}

// An exception (only std::bad_alloc of an error text is conceivable) must not cross the C border.
template <typename... Args>
ffi::Error guarded(ffi::Error (*impl)(Args...), Args... args) {
  try {
    return impl(args...);
  } catch (...) {
    return ffi::Error::Internal("fluxion: out of memory in a handler");
  }
}

ffi::Error append_handler(ffi::RemainingArgs args, ffi::RemainingRets rets, bool has_summaries) {
  return guarded(append_impl, args, rets, has_summaries);
}

ffi::Error submit_handler(ffi::RemainingArgs args, ffi::RemainingRets rets, bool has_summaries,
                          bool has_bitmap, float scale) {
  return guarded(submit_impl, args, rets, has_summaries, has_bitmap, scale);
}

// Made when the library is loaded, because without memory no future can be made later.
const ffi::Promise out_of_memory = [] {
  ffi::Promise promise;
  promise.SetError(ffi::Error::Internal("fluxion: out of memory in a handler"));
  return promise;
}();

ffi::Future start_handler(ffi::RemainingArgs args, ffi::RemainingRets rets) {
  try {
    return start_impl(args, rets);
  } catch (...) {
    return ffi::Future(out_of_memory);
  }
}

ffi::Error collect_handler(ffi::RemainingArgs args, ffi::RemainingRets rets, bool has_summaries,
                           bool return_selection) {
  return guarded(collect_impl, args, rets, has_summaries, return_selection);
}

}  // namespace
}  // namespace fluxion

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_append_cpu, fluxion::append_handler,
                              xla::ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("has_summaries"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_submit_cpu, fluxion::submit_handler,
                              xla::ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("has_summaries")
                                  .Attr<bool>("has_bitmap")
                                  .Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_start_cpu, fluxion::start_handler,
                              xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_collect_cpu, fluxion::collect_handler,
                              xla::ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("has_summaries")
                                  .Attr<bool>("return_selection"));

#pragma GCC visibility pop
