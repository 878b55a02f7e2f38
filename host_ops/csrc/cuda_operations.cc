#include "cuda_operations.h"

namespace fluxion {
namespace {

constexpr int64_t kAlignment = 64;

int64_t padded(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The arrays of each call to be staged, with their sizes in bytes.

// Where blocks go comes first: what they are is not looked at in rows that write none.
template <typename Each>
void each_flush(const Geometry& g, FlushView& flush, Each&& each) {
  const int64_t tasks = g.batch * g.kv_heads;
  const int64_t block_bytes = g.block_elements() * element_bytes(g.dtype);
  each(flush.first_block, g.batch * 4);
  each(flush.num_blocks, g.batch * 4);
  each(flush.k, tasks * flush.capacity * block_bytes);
  each(flush.v, tasks * flush.capacity * block_bytes);
  each(flush.summaries, tasks * flush.capacity * 2 * g.head_dim);
  each(flush.shift, tasks * g.head_dim * 4);
}

template <typename Each>
void each_operand(AppendCall& call, Each&& each) {
  each(call.rows.first, 4);
  each_flush(call.g, call.flush, each);
}

template <typename Each>
void each_result(AppendCall& call, Each&& each) {
  each(call.status, 4);
}

template <typename Each>
void each_operand(SubmitCall& call, Each&& each) {
  const Geometry& g = call.g;
  const int64_t tasks = g.batch * g.kv_heads;
  const int64_t rows = g.batch * g.heads;
  each(call.rows.first, 4);
  each(call.work.q, rows * g.head_dim * 4);
  each(call.work.host_blocks, g.batch * 4);
  each(call.work.boundary, tasks * 4);
  each(call.work.status, 4);
  each(call.cancel, 4);
  if (call.work.bitmap != nullptr) {
    each(call.work.bitmap, rows * g.words() * 4);
    return;
  }
  each(call.work.q8, rows * g.head_dim);
  each(call.work.granularity, tasks * 4);
  each(call.work.k_units, rows * 4);
  each(call.work.shared, tasks * 4);
}

template <typename Each>
void each_result(SubmitCall& call, Each&& each) {
  each(call.tick, 8);
}

template <typename Each>
void each_operand(CollectCall& call, Each&& each) {
  each(call.rows.first, 4);
  each(call.tick, 8);
  each_flush(call.g, call.flush, each);
}

template <typename Each>
void each_result(CollectCall& call, Each&& each) {
  const Geometry& g = call.g;
  const int64_t tasks = g.batch * g.kv_heads;
  const int64_t rows = g.batch * g.heads;
  each(call.out.out, rows * g.head_dim * 4);
  each(call.out.lse, rows * 4);
  each(call.out.status, 4);
  each(call.out.times, kTimes * 4);
  each(call.out.blocks_read, tasks * 4);
  each(call.out.units_scanned, tasks * 4);
  each(call.out.selection, rows * g.words() * 4);
}

// Whether the operands behind this one are looked at only in the rows where it is not 0. In most steps
// no block leaves any row, while prefill writes to nearly all.
template <typename Call>
bool is_gate(const Call&, const void*) {
  return false;
}
bool is_gate(const CollectCall& call, const void* operand) {
  return operand == call.flush.num_blocks;
}

// A call whose arrays lie in the staging memory of an exchange, with the copies to and from there.
template <typename Call>
struct Staged {
  Call call;
  Exchange* exchange = nullptr;
  CudaCopies operands;
  CudaCopies results;
  std::string problem;
};

template <typename Call>
Staged<Call> stage(CudaStream& stream, const Call& call) {
  Staged<Call> staged;
  staged.call = call;
  int64_t bytes = 0;
  const auto measure = [&](auto*& field, int64_t size) {
    if (field != nullptr) bytes += padded(size);
  };
  each_operand(staged.call, measure);
  each_result(staged.call, measure);
  staged.exchange = stream.acquire(bytes, &staged.problem);
  if (staged.exchange == nullptr) return staged;
  char* next = staged.exchange->staging;
  const auto place = [&](auto*& field, int64_t size) {
    using Field = std::remove_reference_t<decltype(field)>;
    void* const here = next;
    next += padded(size);
    field = static_cast<Field>(here);
    return here;
  };
  each_operand(staged.call, [&](auto*& field, int64_t size) {
    if (field == nullptr) return;
    const void* const device = field;
    staged.operands.add(place(field, size), device, size);
    if (is_gate(call, device)) staged.operands.add_gate(device, size / 4);
  });
  each_result(staged.call, [&](auto*& field, int64_t size) {
    if (field == nullptr) return;
    void* const device = field;
    staged.results.add(device, place(field, size), size);
  });
  return staged;
}

std::string check_host(const CudaStream& stream, const CacheView& cache) {
  for (const void* array : {static_cast<const void*>(cache.k), static_cast<const void*>(cache.v),
                            static_cast<const void*>(cache.summaries)}) {
    if (array == nullptr || !stream.driver().on_device(array)) continue;
    return "expected a cache in pinned host memory, got one in device memory; put it there with "
           "memory_kind=\"pinned_host\" and give jax.jit out_shardings of that kind, as "
           "fluxion_jax.jit does";
  }
  return "";
}

std::string check_in_place(const CudaStream& stream, const CacheView& cache,
                           const CacheView& result) {
  if (!same_place(cache, result)) {
    return "expected the cache to be updated in place, got another buffer for the result; donate "
           "the cache, as fluxion_jax.jit does";
  }
  return check_host(stream, cache);
}

}  // namespace

std::string enqueue_append(CudaStream& stream, AppendCall call) {
  std::string problem = check_in_place(stream, call.cache, call.result);
  if (!problem.empty()) return problem;
  auto staged = stage(stream, call);
  if (staged.exchange == nullptr) return staged.problem;
  const auto work = [c = staged.call]() mutable {
    const bool found = choose_rows(c.g, c.rows, &c.cache);
    *c.status = found ? append(c.g, c.cache, c.flush) : static_cast<int32_t>(kInvalid);
  };
  return stream.enqueue(staged.exchange, staged.operands, work, true, staged.results);
}

std::string enqueue_submit(CudaStream& stream, SubmitCall call) {
  std::string problem = check_host(stream, call.cache);
  if (!problem.empty()) return problem;
  auto staged = stage(stream, call);
  if (staged.exchange == nullptr) return staged.problem;
  // The tick is known already, and travels with the operands.
  Slot* slot = reserve(staged.call.tick);
  for (int i = 0; i < staged.results.count; ++i) {
    staged.operands.items[staged.operands.count++] = staged.results.items[i];
  }
  const auto work = [c = staged.call, slot, lease = staged.exchange->lease]() mutable {
    c.work.cancel = *c.cancel;
    if (choose_rows(c.g, c.rows, &c.cache)) {
      fill(slot, c.g, c.work, c.cache, c.scale, lease);
    } else {
      refuse(slot, kInvalid);
    }
    start(c.tick, nullptr);
  };
  problem = stream.enqueue(staged.exchange, staged.operands, work, false, {});
  if (!problem.empty()) give_back(slot);
  return problem;
}

std::string enqueue_collect(CudaStream& stream, CollectCall call) {
  std::string problem = check_in_place(stream, call.cache, call.result);
  if (!problem.empty()) return problem;
  auto staged = stage(stream, call);
  if (staged.exchange == nullptr) return staged.problem;
  const auto work = [c = staged.call]() mutable {
    const bool found = choose_rows(c.g, c.rows, &c.cache);
    collect(c.tick, c.g, c.cache, c.flush, found ? kOk : kInvalid, c.out, true);
  };
  return stream.enqueue(staged.exchange, staged.operands, work, true, staged.results);
}

}  // namespace fluxion
