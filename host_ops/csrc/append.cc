#include "append.h"

#include <algorithm>
#include <cstring>

namespace fluxion {
namespace {

// Below this a hand-over to another thread costs more than the copy.
constexpr int64_t kParallelBytes = int64_t{1} << 20;
constexpr int32_t kLargestShift = 8;  // Shifts any int8 to -1 or 0, like every larger one.

// Rows of one granularity: [rows, 2, H], lo then hi.
struct Level {
  int8_t* rows;
  int64_t head_dim;

  int8_t* lo(int64_t row) const { return rows + row * 2 * head_dim; }
  int8_t* hi(int64_t row) const { return lo(row) + head_dim; }
};

// Rounds the summaries to the coarser steps of grown exponents: lo down, hi up.
void requantise(const Level& level, int64_t rows, const int32_t* shift) {
  for (int64_t r = 0; r < rows; ++r) {
    int8_t* lo = level.lo(r);
    int8_t* hi = level.hi(r);
    for (int64_t c = 0; c < level.head_dim; ++c) {
      const int32_t s = std::min(shift[c], kLargestShift);
      lo[c] = static_cast<int8_t>(lo[c] >> s);
      hi[c] = static_cast<int8_t>(-(-hi[c] >> s));
    }
  }
}

// Puts the summary of block `block` into its unit. The first block of a unit overwrites, whatever
// an earlier tenant of the row left there.
void fold(const Level& level, int64_t block, int depth, const int8_t* summary) {
  const int64_t unit = block >> depth;
  int8_t* lo = level.lo(unit);
  int8_t* hi = level.hi(unit);
  if (block == unit << depth) {
    std::memcpy(lo, summary, 2 * level.head_dim);
    return;
  }
  for (int64_t c = 0; c < level.head_dim; ++c) {
    lo[c] = std::min(lo[c], summary[c]);
    hi[c] = std::max(hi[c], summary[level.head_dim + c]);
  }
}

void write_summaries(const Geometry& g, int8_t* task_rows, int64_t first, int64_t count,
                     const int8_t* summaries, const int32_t* shift, bool grown) {
  for (int depth = 0; depth < kLevels; ++depth) {
    const Level level{task_rows + level_offset(g.blocks, depth) * 2 * g.head_dim, g.head_dim};
    const int64_t written = (first + (int64_t{1} << depth) - 1) >> depth;
    if (grown) requantise(level, written, shift);
    for (int64_t i = 0; i < count; ++i) {
      fold(level, first + i, depth, summaries + i * 2 * g.head_dim);
    }
  }
}

bool grown(const Geometry& g, const FlushView& flush, int64_t task) {
  const int32_t* shift = flush.shift + task * g.head_dim;
  return std::any_of(shift, shift + g.head_dim, [](int32_t s) { return s > 0; });
}

// One grown channel has every summary of its task rewritten, which takes far longer than the blocks.
int64_t requantised_bytes(const Geometry& g, const FlushView& flush) {
  int64_t bytes = 0;
  for (int64_t task = 0; task < g.batch * g.kv_heads; ++task) {
    const int64_t b = task / g.kv_heads;
    if (flush.num_blocks[b] == 0 || !grown(g, flush, task)) continue;
    bytes += level_offset(flush.first_block[b], kLevels) * 2 * g.head_dim;
  }
  return bytes;
}

// Writes the blocks of one (sequence, KV head).
void write_task(const Geometry& g, const CacheView& cache, const FlushView& flush, int64_t task) {
  const int64_t b = task / g.kv_heads;
  const int64_t first = flush.first_block[b];
  const int64_t count = flush.num_blocks[b];
  if (count == 0) return;
  const int64_t block_bytes = g.block_elements() * element_bytes(g.dtype);
  const int64_t to = (task * g.blocks + first) * block_bytes;
  const int64_t from = task * flush.capacity * block_bytes;
  std::memcpy(static_cast<char*>(cache.k) + to, static_cast<const char*>(flush.k) + from,
              count * block_bytes);
  std::memcpy(static_cast<char*>(cache.v) + to, static_cast<const char*>(flush.v) + from,
              count * block_bytes);
  if (cache.summaries == nullptr) return;
  write_summaries(g, cache.summaries + task * g.summary_rows() * 2 * g.head_dim, first, count,
                  flush.summaries + task * flush.capacity * 2 * g.head_dim,
                  flush.shift + task * g.head_dim, grown(g, flush, task));
}

class FlushJob : public Job {
 public:
  FlushJob(const Geometry& geometry, const CacheView& cache, const FlushView& flush, Pool* pool)
      : geometry_(geometry), cache_(cache), flush_(flush), pool_(pool) {}

  void run(int64_t first, int64_t last) noexcept override {
    for (int64_t task = first; task < last; ++task) write_task(geometry_, cache_, flush_, task);
    Pool* pool = pool_;
    const int64_t done = last - first;
    if (left_.fetch_sub(done, std::memory_order_acq_rel) == done) pool->notify_done();
  }

  void run_all() {
    const int64_t parts = geometry_.batch * geometry_.kv_heads;
    left_.store(parts, std::memory_order_release);
    pool_->push(this, parts);
    pool_->help(left_, Clock::time_point::max());
  }

 private:
  const Geometry& geometry_;
  const CacheView& cache_;
  const FlushView& flush_;
  Pool* pool_;
  std::atomic<int64_t> left_{0};
};

}  // namespace

uint32_t validate_flush(const Geometry& g, const FlushView& flush) {
  const int64_t shifts = g.kv_heads * g.head_dim;
  for (int64_t b = 0; b < g.batch; ++b) {
    const int64_t first = flush.first_block[b];
    const int64_t count = flush.num_blocks[b];
    if (count < 0 || count > flush.capacity) return kInvalid;
    // Most steps write nothing, and then reading the shifts is all that a flush would cost.
    if (count == 0) continue;
    if (first < 0 || first + count > g.blocks) return kInvalid;
    const int32_t* shift = flush.shift + b * shifts;
    if (std::any_of(shift, shift + shifts, [](int32_t s) { return s < 0; })) return kInvalid;
  }
  return kOk;
}

void write_flush(const Geometry& geometry, const CacheView& cache, const FlushView& flush,
                 Pool* pool) noexcept {
  int64_t blocks = 0;
  for (int64_t b = 0; b < geometry.batch; ++b) blocks += flush.num_blocks[b];
  if (blocks == 0) return;
  int64_t bytes =
      blocks * geometry.kv_heads * geometry.block_elements() * element_bytes(geometry.dtype);
  if (cache.summaries != nullptr) bytes += requantised_bytes(geometry, flush);
  if (bytes >= kParallelBytes) {
    FlushJob(geometry, cache, flush, pool).run_all();
    return;
  }
  for (int64_t task = 0; task < geometry.batch * geometry.kv_heads; ++task) {
    write_task(geometry, cache, flush, task);
  }
}

}  // namespace fluxion
