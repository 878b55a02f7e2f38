#include "tasks.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "fetch.h"
#include "selection.h"

namespace fluxion {
namespace {

// Memory of a thread that runs tasks; it grows to the largest task seen and stays.
struct Scratch {
  std::vector<float> attention;
  std::vector<uint8_t> split_queries;
  std::vector<int32_t> selection;
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

// Scores that are fetched before they are ranked: as many as stay in the nearest cache.
constexpr int64_t kFetchedUnits = 4096;

int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

void Task::prepare(Request* request, int64_t batch, int64_t kv_head) {
  request_ = request;
  batch_ = batch;
  kv_head_ = kv_head;
  index_ = batch * request->geometry_.kv_heads + kv_head;
  union_blocks_ = 0;
  written_ = nullptr;
  for (auto& stage : stage_ns_) stage.store(0, std::memory_order_relaxed);
  const Geometry& g = request->geometry_;
  int64_t blocks = std::min(request->boundary_[index_], request->host_blocks_[batch]);
  ranked_ = false;
  if (!request->has_bitmap_) {
    plan_scoring();
    const int32_t* wanted = request->k_units_.data() + batch * g.heads + kv_head * g.group();
    int64_t most_read = 0;
    for (int64_t h = 0; h < g.group(); ++h) most_read += std::max<int64_t>(wanted[h], 0) * ratio_;
    blocks = std::min(blocks, most_read);
  }
  const int64_t scored = ranked_ ? units_ * 2 * g.head_dim : 0;
  bytes_ = scored + blocks * 2 * g.block_elements() * element_bytes(g.dtype);
}

// Nothing is ranked where every head wants nothing, or every head wants all.
void Task::plan_scoring() {
  const Geometry& g = request_->geometry_;
  ratio_ = request_->granularity_[index_] / kBlockTokens;
  units_ = parts_of(request_->host_blocks_[batch_], ratio_);
  shared_ = request_->shared_[index_] != 0;
  const int32_t* wanted = request_->k_units_.data() + batch_ * g.heads + kv_head_ * g.group();
  const auto [least, most] = std::minmax_element(wanted, wanted + g.group());
  most_wanted_ = *most;
  ranked_ = *most > 0 && *least < units_;
  if (!ranked_) return;
  request_->units_scanned_[index_] = static_cast<int32_t>(units_);
  grown(&scores_, g.group() * units_);
}

int64_t Task::begin_first() {
  begin(ranked_ ? Stage::kScore : Stage::kSelect, ranked_ ? parts_of(units_, kScoreUnits) : 1);
  return parts_;
}

void Task::begin(Stage stage, int64_t parts) {
  stage_ = stage;
  parts_ = parts;
  parts_left_.store(parts, std::memory_order_relaxed);
}

template <typename Body>
void Task::guarded(const Body& body) noexcept {
  if (request_->stopped()) return;
  try {
    body();
  } catch (...) {
    request_->fail(kInternal);
  }
}

void Task::charge(Stage stage, Clock::duration took) {
  const std::chrono::nanoseconds ns(took);
  stage_ns_[static_cast<int>(stage)].fetch_add(ns.count(), std::memory_order_relaxed);
}

// Runs the parts and, as long as this thread alone has to do with the task, what follows. Then one
// stage ends and the next one begins at the same look at the clock.
void Task::run(int64_t first, int64_t last) noexcept {
  CoveredTime& covered = request_->covered_;
  Clock::time_point since = covered.enter();
  while (true) {
    const int64_t done = last - first;
    guarded([&] { run_parts(first, last); });
    if (parts_left_.load(std::memory_order_acquire) != done) {
      // Whoever comes last goes on, and then the task may be another one.
      charge(stage_, covered.leave() - since);
      if (parts_left_.fetch_sub(done, std::memory_order_acq_rel) != done) return;
      since = covered.enter();
    }
    guarded([&] { conclude(); });
    const Stage ended = stage_;
    const bool more = begin_next();
    const bool alone = more && (parts_ <= 1 || request_->pool_->threads() == 1);
    const Clock::time_point now = alone ? Clock::now() : covered.leave();
    charge(ended, now - since);
    if (ended == Stage::kScore) request_->task_scored(now);
    if (!more) return request_->task_finished(stage_ns_);
    first = 0;
    last = parts_;
    since = now;
    if (alone) continue;
    // Others are still to find out that there are parts, so the first one is begun here.
    last = 1;
    queue_parts();
    since = covered.enter();
  }
}

void Task::run_parts(int64_t first, int64_t last) {
  if (stage_ == Stage::kScore) return score(first, last);
  if (stage_ == Stage::kAttend) return attend(first, last);
  for (int64_t part = first; part < last && !request_->stopped(); ++part) select(part);
}

// What belongs to a stage, behind all of its parts.
void Task::conclude() {
  if (stage_ == Stage::kSelect) cut_union();
  if (stage_ == Stage::kAttend) finish();
}

// Returns whether there is a stage left. One of no parts has only to be concluded.
bool Task::begin_next() {
  if (stage_ == Stage::kAttend || request_->stopped()) return false;
  if (stage_ == Stage::kScore) {
    begin(Stage::kSelect, selecting_parts());
  } else {
    begin(Stage::kAttend, chunks_of(union_blocks_));
  }
  return true;
}

// The heads are ranked by as many threads if these would else find nothing to do, as when the last
// task of a request has been scored. Otherwise by one, which reads a head's scores while it ranks
// the head before.
int64_t Task::selecting_parts() const {
  const Pool& pool = *request_->pool_;
  const bool alone = shared_ || units_ <= kAloneUnits || pool.queued() >= pool.threads();
  return alone ? 1 : request_->geometry_.group();
}

// All but the first.
void Task::queue_parts() {
  // Others wait for what a selection leads to. Chunks of all tasks are one piece of work: only those
  // that end the layer need to be taken one by one.
  const bool selects = stage_ == Stage::kSelect;
  request_->pool_->push(this, parts_, selects ? Turn::kNext : Turn::kLast, !selects, 1);
}

// Consecutive parts are scored as one.
void Task::score(int64_t first_part, int64_t last_part) {
  const Geometry& g = request_->geometry_;
  const int64_t group = g.group();
  const int64_t first = first_part * kScoreUnits;
  const int level = ratio_ == 1 ? 0 : ratio_ == 2 ? 1 : ratio_ == 4 ? 2 : 3;
  const int64_t row = index_ * g.summary_rows() + level_offset(g.blocks, level) + first;
  ScoreArgs args;
  args.q8 = request_->q8_ + (batch_ * g.heads + kv_head_ * group) * g.head_dim;
  args.rows = request_->cache_.summaries + row * 2 * g.head_dim;
  args.count = std::min(last_part * kScoreUnits, units_) - first;
  args.group = static_cast<int32_t>(group);
  args.head_dim = static_cast<int32_t>(g.head_dim);
  args.scratch = grown(&scratch().split_queries, group * 2 * g.head_dim);
  args.scores = scores_.data() + first;
  args.stride = units_;
  kernels().score(args);
  if (shared_) kernels().fold_heads(args);
}

void Task::select(int64_t part) {
  if (request_->has_bitmap_) return;
  const Geometry& g = request_->geometry_;
  const int64_t group = g.group();
  // Other threads have written them; of the next head's scores the kernel takes care.
  if (ranked_) fetch(scores_.data() + part * units_, 4 * std::min(units_, kFetchedUnits));
  if (ranked_ && shared_) {
    select_head(0, most_wanted_, nullptr);
    uint32_t* words =
        request_->own_bitmap_.data() + (batch_ * g.heads + kv_head_ * group) * g.words();
    for (int64_t h = 1; h < group; ++h) std::copy_n(words, g.words(), words + h * g.words());
    return;
  }
  const int32_t* wanted = request_->k_units_.data() + batch_ * g.heads + kv_head_ * group;
  if (parts_ > 1) return select_head(part, wanted[part], nullptr);
  for (int64_t h = 0; h < group; ++h) {
    const int32_t* next = ranked_ && h + 1 < group ? scores_.data() + (h + 1) * units_ : nullptr;
    select_head(h, wanted[h], next);
  }
}

void Task::select_head(int64_t head, int64_t wanted, const int32_t* next) {
  const Geometry& g = request_->geometry_;
  const int64_t row = batch_ * g.heads + kv_head_ * g.group() + head;
  const int32_t* scores = ranked_ ? scores_.data() + head * units_ : nullptr;
  uint32_t* words = request_->own_bitmap_.data() + row * g.words();
  const int64_t blocks = request_->host_blocks_[batch_];
  select_top(kernels(), scores, units_, wanted, ratio_, blocks, next, words, &scratch().selection);
  const int64_t written = parts_of(blocks, 32);
  std::fill_n(words + written, g.words() - written, 0);
}

UnionArgs Task::selections() const {
  const Geometry& g = request_->geometry_;
  UnionArgs args;
  args.rows = request_->bitmap_ + (batch_ * g.heads + kv_head_ * g.group()) * g.words();
  args.stride = g.words();
  args.group = static_cast<int32_t>(g.group());
  args.limit = std::min(request_->boundary_[index_], request_->host_blocks_[batch_]);
  return args;
}

void Task::cut_union() {
  const UnionArgs args = selections();
  ChunkStart* const starts = grown(&chunks_, chunks_of(args.limit) + kMoreStarts);
  union_blocks_ = kernels().find_chunks(args, starts);
  request_->blocks_read_[index_] = static_cast<int32_t>(union_blocks_);
  // One at least, so that there is memory for it to lie in.
  grown(&states_, std::max<int64_t>(chunks_of(union_blocks_), 1) * state_size());
  count_unmerged();
}

int64_t Task::state_size() const {
  return request_->geometry_.group() * (request_->geometry_.head_dim + 2);
}

void Task::count_unmerged() {
  const int64_t chunks = chunks_of(union_blocks_);
  int32_t* const unmerged = grown(&unmerged_, parts_of(chunks, kMergedChunks));
  for (int64_t first = 0; first < chunks; first += kMergedChunks) {
    unmerged[first / kMergedChunks] =
        static_cast<int32_t>(std::min(kMergedChunks, chunks - first));
  }
}

void Task::list(int64_t chunk, ChunkList* listed) const {
  const int64_t end = std::min(chunk_begin(chunk + 1), union_blocks_);
  listed->count = static_cast<int32_t>(end - chunk_begin(chunk));
  kernels().list_chunk(selections(), chunks_[chunk], listed->count, listed->blocks,
                       listed->head_masks);
}

// Parts are chunks from the last to the first, which are the smallest.
void Task::attend(int64_t first, int64_t last) {
  if (first == last) return;  // Nothing was selected.
  ChunkList lists[2];
  list(parts_ - 1 - first, &lists[first % 2]);
  for (int64_t part = first; part < last && !request_->stopped(); ++part) {
    const int64_t chunk = parts_ - 1 - part;
    ChunkList& after = lists[(part + 1) % 2];
    if (part + 1 < last) list(chunk - 1, &after);
    if (chunk == 0) fetch_what_follows();
    attend_chunk(chunk, lists[part % 2], part + 1 < last ? after.blocks[0] : -1);
    chunk_attended(chunk);
  }
}

// Asks for what is needed behind the chunk that is begun last.
void Task::fetch_what_follows() {
  const Geometry& g = request_->geometry_;
  const int64_t row = batch_ * g.heads + kv_head_ * g.group();
  const Results results = *request_->results_.load(std::memory_order_acquire);
  fetch_to_write(results.out + row * g.head_dim, 4 * g.group() * g.head_dim);
  fetch_to_write(results.lse + row, 4 * g.group());
  request_->fetch_state(row);
}

void Task::attend_chunk(int64_t chunk, const ChunkList& listed, int32_t next) {
  const Geometry& g = request_->geometry_;
  const int64_t group = g.group();
  const int64_t offset = index_ * g.task_elements();
  const int64_t bytes = element_bytes(g.dtype);
  AttendArgs args;
  args.k = static_cast<const char*>(request_->cache_.k) + offset * bytes;
  args.v = static_cast<const char*>(request_->cache_.v) + offset * bytes;
  args.q = request_->q_ + (batch_ * g.heads + kv_head_ * group) * g.head_dim;
  args.blocks = listed.blocks;
  args.head_masks = listed.head_masks;
  args.count = listed.count;
  args.next = next;
  args.group = static_cast<int32_t>(group);
  args.head_dim = static_cast<int32_t>(g.head_dim);
  args.scale = request_->scale_;
  args.scratch = grown(&scratch().attention, group * listed.count * kBlockTokens);
  args.m = states_.data() + chunk * state_size();
  args.l = args.m + group;
  args.acc = args.l + group;
  kernels().attend[static_cast<int>(g.dtype)](args);
}

void Task::chunk_attended(int64_t chunk) {
  const int64_t together = chunk / kMergedChunks;
  if (__atomic_sub_fetch(&unmerged_[together], 1, __ATOMIC_ACQ_REL) > 0) return;
  const int64_t first = together * kMergedChunks;
  merge(first, 1, std::min(kMergedChunks, parts_ - first));
}

// Merges the states of `count` chunks from `first` on, each `stride` behind the one before, into the
// first of them.
void Task::merge(int64_t first, int64_t stride, int64_t count) {
  if (count < 2) return;
  MergeArgs args;
  args.states = states_.data() + first * state_size();
  args.stride = stride * state_size();
  args.count = static_cast<int32_t>(count);
  args.group = static_cast<int32_t>(request_->geometry_.group());
  args.head_dim = static_cast<int32_t>(request_->geometry_.head_dim);
  kernels().merge(args);
}

// The state of all chunks, if there are any, becomes the result.
void Task::finish() {
  const Geometry& g = request_->geometry_;
  const int64_t group = g.group();
  const int64_t first_row = batch_ * g.heads + kv_head_ * group;
  const Results results = *request_->results_.load(std::memory_order_acquire);
  written_ = results.out;
  if (written_ == request_->own_.out) request_->kept_.fetch_add(1, std::memory_order_relaxed);
  float* out = results.out + first_row * g.head_dim;
  float* lse = results.lse + first_row;
  merge(0, kMergedChunks, parts_of(parts_, kMergedChunks));
  const float* m = states_.data();
  const float* l = m + group;
  const float* acc = l + group;
  for (int64_t h = 0; h < group; ++h) {
    const bool nothing = parts_ == 0 || l[h] == 0.0f;
    lse[h] = nothing ? -std::numeric_limits<float>::infinity() : m[h] + std::log(l[h]);
    // What nothing weighs is 0 or not a number, and that survives.
    const float divisor = nothing ? 1.0f : l[h];
    for (int64_t i = h * g.head_dim; i < (h + 1) * g.head_dim; ++i) {
      out[i] = parts_ == 0 ? 0.0f : acc[i] / divisor;
    }
  }
}

}  // namespace fluxion
