#include "ffi_calls.h"

namespace fluxion {
namespace {

using ffi::DataType;

// Reads the first row, if it is there, and k and v, and sets the sizes they tell. Queries tell
// `heads`; the sequences of the call are counted by the operand `sequences_at` behind k.
void read_cache(Operands& in, bool has_first_row, size_t sequences_at, Geometry* g, Rows* rows,
                CacheView* cache, DataType* dtype) {
  if (has_first_row) {
    rows->first = static_cast<const int32_t*>(in.arg("first_row", DataType::S32, {1}));
  }
  rows->total = in.peek_arg(0, 0);
  g->batch = has_first_row ? in.peek_arg(sequences_at, 0) : rows->total;
  g->kv_heads = in.peek_arg(0, 1);
  g->blocks = in.peek_arg(0, 2);
  g->head_dim = in.peek_arg(0, 4);
  *dtype = in.peek_dtype();
  switch (*dtype) {
    case DataType::F32:
      g->dtype = DType::kFloat32;
      break;
    case DataType::BF16:
      g->dtype = DType::kBFloat16;
      break;
    case DataType::F16:
      g->dtype = DType::kFloat16;
      break;
    default:
      in.fail("k: expected bfloat16, float16 or float32, got another dtype; cast the cache");
  }
  if (g->kv_heads < 1 || g->blocks < 8 || g->blocks % 8 != 0 || g->head_dim < 8 ||
      g->head_dim % 8 != 0 || g->head_dim > kMaxHeadDim || g->blocks > INT32_MAX) {
    in.fail("k: expected [B, K, P, 16, H] with P a positive multiple of 8 and H a multiple of 8 up "
            "to 256, got P " + std::to_string(g->blocks) + " and H " +
            std::to_string(g->head_dim) + "; choose another layout");
  }
  if (g->batch > rows->total) {
    in.fail("k: expected at least as many rows as sequences, got " + std::to_string(rows->total) +
            " for " + std::to_string(g->batch) + "; pass the arrays of all layers");
  }
  cache->k = const_cast<void*>(
      in.arg("k", *dtype, {rows->total, g->kv_heads, g->blocks, kBlockTokens, g->head_dim}));
  cache->v = const_cast<void*>(
      in.arg("v", *dtype, {rows->total, g->kv_heads, g->blocks, kBlockTokens, g->head_dim}));
}

void read_summaries(Operands& in, const Geometry& g, const Rows& rows, CacheView* cache) {
  cache->summaries = const_cast<int8_t*>(static_cast<const int8_t*>(in.arg(
      "summaries", DataType::S8, {rows.total, g.kv_heads, g.summary_rows(), 2, g.head_dim})));
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

// Whether the cache is among the results. Where it is not, the call changes it in place unseen, and
// a fluxion_keep before and one after it tell the framework.
bool returns_cache(const Operands& in) { return in.rank_of_ret() == 5; }

// Reads the results that alias k and v.
void read_result(Operands& in, const Geometry& g, const Rows& rows, DataType dtype,
                 CacheView* result) {
  const std::initializer_list<int64_t> dims = {rows.total, g.kv_heads, g.blocks, kBlockTokens,
                                               g.head_dim};
  result->k = in.ret("k", dtype, dims);
  result->v = in.ret("v", dtype, dims);
}

void read_result_summaries(Operands& in, const Geometry& g, const Rows& rows, CacheView* result) {
  result->summaries = static_cast<int8_t*>(in.ret(
      "summaries", DataType::S8, {rows.total, g.kv_heads, g.summary_rows(), 2, g.head_dim}));
}

}  // namespace

AppendCall read_append(Operands& in, bool has_summaries, bool has_first_row) {
  AppendCall call;
  Geometry& g = call.g;
  DataType dtype;
  read_cache(in, has_first_row, 2, &g, &call.rows, &call.cache, &dtype);
  call.flush = read_flush(in, g, dtype);
  if (has_summaries) read_summaries(in, g, call.rows, &call.cache);
  const bool returned = returns_cache(in);
  call.result = call.cache;
  if (returned) read_result(in, g, call.rows, dtype, &call.result);
  call.status = static_cast<int32_t*>(in.ret("status", DataType::S32, {1}));
  if (returned && has_summaries) read_result_summaries(in, g, call.rows, &call.result);
  return call;
}

SubmitCall read_submit(Operands& in, bool has_summaries, bool has_bitmap, float scale,
                       bool has_first_row) {
  SubmitCall call;
  Geometry& g = call.g;
  WorkView& work = call.work;
  DataType dtype;
  call.scale = scale;
  read_cache(in, has_first_row, 2, &g, &call.rows, &call.cache, &dtype);
  g.heads = in.peek_arg(0, 1);
  if (in.ok()) check_heads(in, g);
  if (!in.ok()) return call;
  work.q = as<float>(in.arg("q", DataType::F32, {g.batch, g.heads, g.head_dim}));
  work.q8 = as<int8_t>(in.arg("q8", DataType::S8, {g.batch, g.heads, g.head_dim}));
  work.granularity = as<int32_t>(in.arg("granularity", DataType::S32, {g.batch, g.kv_heads}));
  work.k_units = as<int32_t>(in.arg("k_units", DataType::S32, {g.batch, g.heads}));
  work.shared = as<int32_t>(in.arg("shared", DataType::S32, {g.batch, g.kv_heads}));
  work.host_blocks = as<int32_t>(in.arg("host_blocks", DataType::S32, {g.batch}));
  work.boundary = as<int32_t>(in.arg("boundary", DataType::S32, {g.batch, g.kv_heads}));
  call.cancel = as<int32_t>(in.arg("cancel", DataType::S32, {1}));
  work.status = as<int32_t>(in.arg("status", DataType::S32, {1}));
  if (has_summaries) read_summaries(in, g, call.rows, &call.cache);
  if (has_bitmap) {
    work.bitmap =
        as<uint32_t>(in.arg("bitmap", DataType::U32, {g.batch, g.heads, g.words()}));
  }
  if (!has_summaries && !has_bitmap) {
    in.fail("expected summaries or a bitmap, got neither; pass Work.bitmap if the summaries are "
            "on the device");
  }
  call.tick = static_cast<int32_t*>(in.ret("tick", DataType::S32, {2}));
  if (in.rank_of_ret() < 0) return call;
  call.results.out =
      static_cast<float*>(in.ret("out", DataType::F32, {g.batch, g.heads, g.head_dim}));
  call.results.lse = static_cast<float*>(in.ret("lse", DataType::F32, {g.batch, g.heads}));
  return call;
}

CollectCall read_collect(Operands& in, bool has_summaries, bool return_selection,
                         bool has_first_row, bool delivered) {
  CollectCall call;
  Geometry& g = call.g;
  CollectOut& out = call.out;
  DataType dtype;
  read_cache(in, has_first_row, 3, &g, &call.rows, &call.cache, &dtype);
  const bool returned = returns_cache(in);
  g.heads = in.peek_ret(returned ? 2 : 0, 1);
  if (in.ok()) check_heads(in, g);
  if (!in.ok()) return call;
  call.tick = as<int32_t>(in.arg("tick", DataType::S32, {2}));
  call.flush = read_flush(in, g, dtype);
  if (delivered) {
    // Aliased by the results of the same names.
    const auto* out_of_submit = in.arg("out", DataType::F32, {g.batch, g.heads, g.head_dim});
    call.given.out = static_cast<float*>(const_cast<void*>(out_of_submit));
    const auto* lse_of_submit = in.arg("lse", DataType::F32, {g.batch, g.heads});
    call.given.lse = static_cast<float*>(const_cast<void*>(lse_of_submit));
  }
  if (has_summaries) read_summaries(in, g, call.rows, &call.cache);
  call.result = call.cache;
  if (returned) read_result(in, g, call.rows, dtype, &call.result);
  out.out = static_cast<float*>(in.ret("out", DataType::F32, {g.batch, g.heads, g.head_dim}));
  out.lse = static_cast<float*>(in.ret("lse", DataType::F32, {g.batch, g.heads}));
  out.status = static_cast<int32_t*>(in.ret("status", DataType::S32, {1}));
  out.times = static_cast<float*>(in.ret("times", DataType::F32, {kTimes}));
  out.blocks_read =
      static_cast<int32_t*>(in.ret("blocks_read", DataType::S32, {g.batch, g.kv_heads}));
  out.units_scanned =
      static_cast<int32_t*>(in.ret("units_scanned", DataType::S32, {g.batch, g.kv_heads}));
  if (returned && has_summaries) read_result_summaries(in, g, call.rows, &call.result);
  if (return_selection) {
    out.selection =
        static_cast<uint32_t*>(in.ret("selection", DataType::U32, {g.batch, g.heads, g.words()}));
  }
  return call;
}

ffi::Error keep(ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const auto given = args.get<ffi::AnyBuffer>(0);
  auto kept = rets.get<ffi::AnyBuffer>(0);
  if (!given.has_value() || !kept.has_value()) {
    return ffi::Error::InvalidArgument("fluxion: expected an array to keep, got none; call it "
                                       "through host_ops of the same version as the library");
  }
  if (given->untyped_data() == (*kept)->untyped_data()) return ffi::Error::Success();
  return ffi::Error::Internal(
      "fluxion: expected the cache to be updated in place, got another buffer for the result; "
      "donate the cache, as fluxion_jax.jit does");
}

}  // namespace fluxion
