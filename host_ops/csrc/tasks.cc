#include "tasks.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "selection.h"

namespace fluxion {
namespace {

// Memory of a thread that runs tasks; it grows to the largest task seen and stays.
struct Scratch {
  std::vector<float> attention;
  std::vector<int32_t> scores;
  std::vector<int16_t> split_queries;
  SelectionScratch selection;
};

Scratch& scratch() {
  thread_local Scratch instance;
  return instance;
}

template <typename T>
T* grown(std::vector<T>* memory, int64_t count) {
  if (static_cast<int64_t>(memory->size()) < count) memory->resize(count);
  return memory->data();
}

int64_t elapsed_ns(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

}  // namespace

void Task::prepare(Request* request, int64_t batch, int64_t kv_head) {
  request_ = request;
  batch_ = batch;
  kv_head_ = kv_head;
  chunks_ = -1;
  chunks_left_.store(0, std::memory_order_relaxed);
  blocks_.clear();
  head_masks_.clear();
}

void Task::run(int64_t part) noexcept {
  const Clock::time_point start = Clock::now();
  const bool selecting = chunks_ < 0;
  if (!request_->stopped()) {
    try {
      if (selecting) {
        select();
      } else {
        attend(part);
      }
    } catch (...) {
      request_->fail(kInternal);
    }
  }
  const int64_t took = elapsed_ns(start);
  request_->busy_ns_.fetch_add(took, std::memory_order_relaxed);
  if (selecting) {
    request_->select_ns_.fetch_add(took, std::memory_order_relaxed);
    if (chunks_ <= 0 || request_->stopped()) return finish();
    chunks_left_.store(chunks_, std::memory_order_relaxed);
    request_->pool_->push(this, chunks_);
  } else if (chunks_left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    merge();
    finish();
  }
}

void Task::finish() { request_->task_finished(); }

void Task::select() {
  const Geometry& g = request_->geometry_;
  if (!request_->has_bitmap_) score_and_select();
  collect_union();
  const int64_t count = static_cast<int64_t>(blocks_.size());
  request_->blocks_read_[batch_ * g.kv_heads + kv_head_] = static_cast<int32_t>(count);
  const int64_t chunks = (count + kChunkBlocks - 1) / kChunkBlocks;
  grown(&partials_, chunks * g.group() * (g.head_dim + 2));
  chunks_ = chunks;
}

void Task::score_and_select() {
  const Geometry& g = request_->geometry_;
  const int64_t task = batch_ * g.kv_heads + kv_head_;
  const int64_t group = g.group();
  const int64_t first_head = batch_ * g.heads + kv_head_ * group;
  const int64_t host_blocks = request_->host_blocks_[batch_];
  const int64_t ratio = request_->granularity_[task] / kBlockTokens;
  const int level = ratio == 1 ? 0 : ratio == 2 ? 1 : ratio == 4 ? 2 : 3;
  const int64_t units = (host_blocks + ratio - 1) / ratio;

  // Nothing to rank where every head wants nothing, or every head wants all.
  const int32_t* wanted = request_->k_units_.data() + first_head;
  uint32_t* words = request_->bitmap_.data() + first_head * g.words();
  const auto [least, most] = std::minmax_element(wanted, wanted + group);
  if (*most <= 0) return;
  Scratch& memory = scratch();
  if (*least >= units) {
    for (int64_t h = 0; h < group; ++h) {
      select_top(nullptr, units, units, ratio, host_blocks, words + h * g.words(),
                 memory.selection);
    }
    return;
  }
  int32_t* scores = grown(&memory.scores, group * units);
  ScoreArgs args;
  args.q8 = request_->q8_.data() + first_head * g.head_dim;
  args.rows = request_->cache_.summaries +
              (task * g.summary_rows() + level_offset(g.blocks, level)) * 2 * g.head_dim;
  args.count = units;
  args.group = static_cast<int32_t>(group);
  args.head_dim = static_cast<int32_t>(g.head_dim);
  args.scratch = grown(&memory.split_queries, group * 2 * g.head_dim);
  args.scores = scores;
  args.stride = units;
  kernels().score(args);
  request_->units_scanned_[task] = static_cast<int32_t>(units);

  if (request_->shared_[task] == 0) {
    for (int64_t h = 0; h < group; ++h) {
      select_top(scores + h * units, units, wanted[h], ratio, host_blocks, words + h * g.words(),
                 memory.selection);
    }
    return;
  }
  for (int64_t h = 1; h < group; ++h) {
    for (int64_t u = 0; u < units; ++u) {
      scores[u] = std::max(scores[u], scores[h * units + u]);
    }
  }
  select_top(scores, units, *std::max_element(wanted, wanted + group), ratio, host_blocks, words,
             memory.selection);
  for (int64_t h = 1; h < group; ++h) std::copy_n(words, g.words(), words + h * g.words());
}

void Task::collect_union() {
  const Geometry& g = request_->geometry_;
  const int64_t group = g.group();
  const int64_t limit = std::min(request_->boundary_[batch_ * g.kv_heads + kv_head_],
                                 request_->host_blocks_[batch_]);
  const uint32_t* rows =
      request_->bitmap_.data() + (batch_ * g.heads + kv_head_ * group) * g.words();
  for (int64_t w = 0; w * 32 < limit; ++w) {
    const uint32_t inside = limit - w * 32 >= 32 ? ~uint32_t{0} : (uint32_t{1} << (limit % 32)) - 1;
    uint32_t any = 0;
    for (int64_t h = 0; h < group; ++h) any |= rows[h * g.words() + w];
    for (any &= inside; any != 0; any &= any - 1) {
      const int bit = __builtin_ctz(any);
      uint64_t mask = 0;
      for (int64_t h = 0; h < group; ++h) {
        mask |= static_cast<uint64_t>(rows[h * g.words() + w] >> bit & 1) << h;
      }
      blocks_.push_back(static_cast<int32_t>(w * 32 + bit));
      head_masks_.push_back(mask);
    }
  }
}

float* Task::partial(int64_t chunk) {
  const Geometry& g = request_->geometry_;
  return partials_.data() + chunk * g.group() * (g.head_dim + 2);
}

void Task::attend(int64_t chunk) {
  const Geometry& g = request_->geometry_;
  const int64_t group = g.group();
  const int64_t first = chunk * kChunkBlocks;
  const int64_t count = std::min<int64_t>(kChunkBlocks, blocks_.size() - first);
  const int64_t offset = (batch_ * g.kv_heads + kv_head_) * g.task_elements();
  const int64_t bytes = element_bytes(g.dtype);
  AttendArgs args;
  args.k = static_cast<const char*>(request_->cache_.k) + offset * bytes;
  args.v = static_cast<const char*>(request_->cache_.v) + offset * bytes;
  args.q = request_->q_.data() + (batch_ * g.heads + kv_head_ * group) * g.head_dim;
  args.blocks = blocks_.data() + first;
  args.head_masks = head_masks_.data() + first;
  args.count = static_cast<int32_t>(count);
  args.group = static_cast<int32_t>(group);
  args.head_dim = static_cast<int32_t>(g.head_dim);
  args.scale = request_->scale_;
  args.scratch = grown(&scratch().attention, group * count * kBlockTokens);
  args.m = partial(chunk);
  args.l = args.m + group;
  args.acc = args.l + group;
  (g.dtype == DType::kFloat32 ? kernels().attend_f32 : kernels().attend_bf16)(args);
}

// Adds up the partials in chunk order. A weight of 0 still multiplies, so that a NaN survives.
void Task::merge() {
  if (request_->stopped()) return;
  const Geometry& g = request_->geometry_;
  const int64_t group = g.group();
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  for (int64_t h = 0; h < group; ++h) {
    const int64_t row = batch_ * g.heads + kv_head_ * group + h;
    float* out = request_->out_.data() + row * g.head_dim;
    float top = minus_infinity;
    for (int64_t c = 0; c < chunks_; ++c) top = std::max(top, partial(c)[h]);
    float sum = 0.0f;
    for (int64_t c = 0; c < chunks_; ++c) {
      const float* part = partial(c);
      const float* acc = part + 2 * group + h * g.head_dim;
      const float weight = part[h] == minus_infinity ? 0.0f : std::exp(part[h] - top);
      sum += weight * part[group + h];
      for (int64_t i = 0; i < g.head_dim; ++i) out[i] += weight * acc[i];
    }
    if (sum == 0.0f) continue;
    for (int64_t i = 0; i < g.head_dim; ++i) out[i] /= sum;
    request_->lse_[row] = top + std::log(sum);
  }
}

}  // namespace fluxion
