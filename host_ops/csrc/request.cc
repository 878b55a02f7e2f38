// The request as a whole: operands in, task list, results out. The tasks themselves: tasks.cc.

#include <algorithm>
#include <limits>
#include <utility>

#include "fetch.h"
#include "tasks.h"

namespace fluxion {
namespace {

constexpr int64_t kFetchedBytes = int64_t{1} << 15;  // As much as stays in the nearest cache.

template <typename T>
void copy_array(std::vector<T>* to, const T* from, int64_t count) {
  to->assign(from, from + count);
}

// Whether the step has failed before, in another layer.
bool failed(const WorkView& work) { return work.status != nullptr && *work.status != 0; }

}  // namespace

uint32_t Request::validate(const WorkView& work) const {
  const Geometry& g = geometry_;
  if (failed(work)) return kOk;
  for (int64_t b = 0; b < g.batch; ++b) {
    if (work.host_blocks[b] < 0 || work.host_blocks[b] > g.blocks) return kInvalid;
    if (work.host_blocks[b] == 0 || work.bitmap != nullptr) continue;
    for (int64_t k = 0; k < g.kv_heads; ++k) {
      if (work.boundary[b * g.kv_heads + k] <= 0) continue;
      const int32_t unit = work.granularity[b * g.kv_heads + k];
      if (unit != 16 && unit != 32 && unit != 64 && unit != 128) return kInvalid;
    }
  }
  return kOk;
}

void Request::place_queries(const WorkView& work, bool lent) {
  const int64_t elements = geometry_.batch * geometry_.heads * geometry_.head_dim;
  if (!lent) copy_array(&own_q_, work.q, elements);
  if (!lent && !has_bitmap_) copy_array(&own_q8_, work.q8, elements);
  q_ = lent ? work.q : own_q_.data();
  q8_ = lent ? work.q8 : own_q8_.data();
}

void Request::end_loan() {
  const Geometry& g = geometry_;
  // Without tasks there may be nothing at all.
  if (task_count_ == 0 || started_.load(std::memory_order_relaxed)) return;
  if (q_ == own_q_.data()) return;
  copy_array(&own_q_, q_, g.batch * g.heads * g.head_dim);
  q_ = own_q_.data();
  if (has_bitmap_) {
    copy_array(&own_bitmap_, bitmap_, g.batch * g.heads * g.words());
    bitmap_ = own_bitmap_.data();
  } else {
    copy_array(&own_q8_, q8_, g.batch * g.heads * g.head_dim);
    q8_ = own_q8_.data();
  }
}

void Request::place_bitmap(const WorkView& work, bool lent) {
  const int64_t words = geometry_.batch * geometry_.heads * geometry_.words();
  if (!has_bitmap_) {
    own_bitmap_.resize(words);
  } else if (!lent) {
    copy_array(&own_bitmap_, work.bitmap, words);
  }
  bitmap_ = has_bitmap_ && lent ? work.bitmap : own_bitmap_.data();
}

void Request::copy_numbers(const WorkView& work) {
  const Geometry& g = geometry_;
  copy_array(&host_blocks_, work.host_blocks, g.batch);
  copy_array(&boundary_, work.boundary, g.batch * g.kv_heads);
  if (failed(work)) std::fill(host_blocks_.begin(), host_blocks_.end(), 0);
  if (has_bitmap_) return;
  copy_array(&granularity_, work.granularity, g.batch * g.kv_heads);
  copy_array(&k_units_, work.k_units, g.batch * g.heads);
  copy_array(&shared_, work.shared, g.batch * g.kv_heads);
}

bool Request::has_work(int64_t batch, int64_t kv_head) const {
  return host_blocks_[batch] != 0 && boundary_[batch * geometry_.kv_heads + kv_head] > 0;
}

// The selections of the tasks, cut at the host blocks, and nothing for groups without work.
void Request::write_selection(uint32_t* selection) const {
  const Geometry& g = geometry_;
  for (int64_t row = 0; row < g.batch * g.heads; ++row) {
    const int64_t batch = row / g.heads;
    const bool reads = has_work(batch, row % g.heads / g.group());
    const int64_t blocks = reads ? host_blocks_[batch] : 0;
    const int64_t words = (blocks + 31) / 32;
    uint32_t* written = selection + row * g.words();
    std::copy_n(bitmap_ + row * g.words(), words, written);
    if (blocks % 32 != 0) written[words - 1] &= (uint32_t{1} << blocks % 32) - 1;
    std::fill_n(written + words, g.words() - words, 0);
  }
}

// The results of a group without work; a task writes all of its own.
void Request::write_nothing(int64_t batch, int64_t kv_head) {
  const Geometry& g = geometry_;
  const int64_t row = batch * g.heads + kv_head * g.group();
  const Results results = *results_.load(std::memory_order_relaxed);
  std::fill_n(results.out + row * g.head_dim, g.group() * g.head_dim, 0.0f);
  std::fill_n(results.lse + row, g.group(), -std::numeric_limits<float>::infinity());
}

// Calls `body` with the first row of each group whose results lie elsewhere than in `results`.
template <typename Body>
void Request::each_unwritten(const Results& results, const Body& body) const {
  const Geometry& g = geometry_;
  // Asking every task takes long: other threads have written to it.
  const bool kept = kept_.load(std::memory_order_relaxed) > 0;
  for (int64_t i = 0; kept && i < task_count_; ++i) {
    if (tasks_[i]->written() != results.out) body(tasks_[i]->index() * g.group());
  }
  if (task_count_ == g.batch * g.kv_heads) return;
  for (int64_t group = 0; group < g.batch * g.kv_heads; ++group) {
    if (!has_work(group / g.kv_heads, group % g.kv_heads)) body(group * g.group());
  }
}

bool Request::keeps_results() const {
  return results_.load(std::memory_order_relaxed) == &own_;
}

void Request::fetch_results(const Results& results) const {
  if (delivers_) return;
  const int64_t rows = geometry_.batch * geometry_.heads;
  if (keeps_results()) {
    const int64_t bytes = std::min(4 * rows * geometry_.head_dim, kFetchedBytes / 2);
    fetch(own_.lse, 4 * rows);
    fetch_to_write(results.lse, 4 * rows);
    fetch(own_.out, bytes);
    fetch_to_write(results.out, bytes);
    return;
  }
  const int64_t elements = geometry_.group() * geometry_.head_dim;
  int64_t bytes = 0;
  each_unwritten(results, [&](int64_t row) {
    bytes += 4 * elements;
    if (bytes > kFetchedBytes / 2) return;
    fetch(own_.out + row * geometry_.head_dim, 4 * elements);
    fetch(own_.lse + row, 4 * geometry_.group());
    fetch_to_write(results.out + row * geometry_.head_dim, 4 * elements);
    fetch_to_write(results.lse + row, 4 * geometry_.group());
  });
}

void Request::write_results(const Results& results) const {
  if (delivers_) return;
  const int64_t group = geometry_.group();
  const int64_t head_dim = geometry_.head_dim;
  if (keeps_results()) {
    const int64_t rows = geometry_.batch * geometry_.heads;
    std::copy_n(own_.out, rows * head_dim, results.out);
    std::copy_n(own_.lse, rows, results.lse);
    return;
  }
  each_unwritten(results, [&](int64_t row) {
    std::copy_n(own_.out + row * head_dim, group * head_dim, results.out + row * head_dim);
    std::copy_n(own_.lse + row, group, results.lse + row);
  });
}

// Asks for what submit reads and writes, as far as it lies where it did the last time. Each of the
// small arrays is a miss of its own, so they come first.
void Request::fetch_operands(const Geometry& g, const WorkView& work, bool lent) {
  const int64_t rows = g.batch * g.heads;
  const int64_t tasks = g.batch * g.kv_heads;
  fetch_to_write(this, sizeof(Request));
  fetch(work.host_blocks, 4 * g.batch);
  fetch(work.boundary, 4 * tasks);
  if (work.bitmap == nullptr) {
    fetch(work.granularity, 4 * tasks);
    fetch(work.k_units, 4 * rows);
    fetch(work.shared, 4 * tasks);
  }
  // There may be many more, of a larger batch that came before.
  const int64_t made = std::min(tasks, static_cast<int64_t>(tasks_.size()));
  for (int64_t i = 0; i < made; ++i) fetch_to_write(tasks_[i].get(), sizeof(Task));
  if (!lent && static_cast<int64_t>(own_q_.size()) < rows * g.head_dim) return;
  if (!lent && work.bitmap == nullptr) fetch(work.q8, std::min(rows * g.head_dim, kFetchedBytes));
  fetch_copies(rows, rows);
}

// Asks for what the next submit will write over. Threads that still read rows [first_kept, end_kept)
// of the queries keep those, and the numbers.
void Request::fetch_copies(int64_t first_kept, int64_t end_kept) {
  for (auto* numbers : {&granularity_, &k_units_, &shared_, &host_blocks_, &boundary_, &blocks_read_,
                        &units_scanned_}) {
    const int64_t bytes = 4 * static_cast<int64_t>(numbers->size());
    if (first_kept < end_kept) {
      fetch(numbers->data(), bytes);
    } else {
      fetch_to_write(numbers->data(), bytes);
    }
  }
  const auto fetch_rows = [&](void* data, int64_t size, int64_t row_bytes) {
    char* const bytes = static_cast<char*>(data);
    const int64_t end = std::min(size, kFetchedBytes);
    fetch_to_write(bytes, std::min(first_kept * row_bytes, end));
    const int64_t behind = end_kept * row_bytes;
    if (behind < end) fetch_to_write(bytes + behind, end - behind);
  };
  const int64_t elements = static_cast<int64_t>(own_q_.size());
  fetch_rows(own_q8_.data(), static_cast<int64_t>(own_q8_.size()), geometry_.head_dim);
  fetch_rows(own_q_.data(), 4 * elements, 4 * geometry_.head_dim);
}

uint32_t Request::prepare(const Geometry& geometry, const WorkView& work, const CacheView& cache,
                          float scale, CancelWord cancel, bool cancel_known, bool lent,
                          Results results) {
  fetch_operands(geometry, work, lent);
  geometry_ = geometry;
  cache_ = cache;
  scale_ = scale;
  has_bitmap_ = work.bitmap != nullptr;
  cancel_ = std::move(cancel);
  task_count_ = 0;
  started_.store(false, std::memory_order_relaxed);
  left_.store(0, std::memory_order_relaxed);
  for (auto& stage : stage_ns_) stage.store(0, std::memory_order_relaxed);
  scoring_ns_.store(0, std::memory_order_relaxed);
  span_ns_ = 0;
  covered_.reset();
  // Meanwhile the small arrays arrive.
  place_queries(work, lent);
  const uint32_t status = cancel_known ? validate(work) : kInvalid;
  status_.store(status, std::memory_order_relaxed);
  const Geometry& g = geometry_;
  own_out_.resize(g.batch * g.heads * g.head_dim);
  own_lse_.resize(g.batch * g.heads);
  own_ = {own_out_.data(), own_lse_.data()};
  given_ = results;
  delivers_ = results.out != nullptr;
  results_.store(delivers_ ? &given_ : &own_, std::memory_order_relaxed);
  kept_.store(0, std::memory_order_relaxed);
  blocks_read_.assign(g.batch * g.kv_heads, 0);
  units_scanned_.assign(g.batch * g.kv_heads, 0);
  if (status != kOk) return status;
  copy_numbers(work);
  place_bitmap(work, lent);
  for (int64_t b = 0; b < g.batch; ++b) {
    for (int64_t k = 0; k < g.kv_heads; ++k) {
      if (!has_work(b, k)) {
        write_nothing(b, k);
        continue;
      }
      if (task_count_ == static_cast<int64_t>(tasks_.size())) {
        tasks_.push_back(std::make_unique<Task>());
      }
      tasks_[task_count_++]->prepare(this, b, k);
    }
  }
  // Largest first, so that no large task is left over when all others are done.
  std::sort(tasks_.begin(), tasks_.begin() + task_count_, [](const auto& a, const auto& b) {
    return a->bytes() != b->bytes() ? a->bytes() > b->bytes() : a->index() < b->index();
  });
  // Room for what start, which must not throw, puts there.
  offer_.clear(task_count_);
  submitted_ = Clock::now();
  left_.store(task_count_, std::memory_order_release);
  return kOk;
}

// `first_row` is the first of the task that asks, of which other threads may still read the queries.
void Request::fetch_state(int64_t first_row) {
  fetch(this, sizeof(Request));
  pool_->fetch_queue();
  // Whoever ends a layer most likely begins the next one, in the same memory.
  if (left_.load(std::memory_order_relaxed) > 1) return;
  for (int64_t i = 0; i < task_count_; ++i) fetch(tasks_[i].get(), sizeof(Task));
  fetch_copies(first_row, first_row + geometry_.group());
}

void Request::write_to(Results results) {
  if (delivers_ && started_.load(std::memory_order_acquire)) return;
  given_ = results;
  results_.store(&given_, std::memory_order_release);
}

void Request::refuse(uint32_t status) {
  task_count_ = 0;
  delivers_ = false;
  for (auto& stage : stage_ns_) stage.store(0, std::memory_order_relaxed);
  scoring_ns_.store(0, std::memory_order_relaxed);
  span_ns_ = 0;
  covered_.reset();
  started_.store(false, std::memory_order_relaxed);
  left_.store(0, std::memory_order_relaxed);
  status_.store(status, std::memory_order_release);
}

void Request::start(Pool* pool) noexcept {
  if (started_.exchange(true, std::memory_order_acq_rel)) return;
  pool_ = pool;
  begun_ = Clock::now();
  offer_.clear(task_count_);
  for (int64_t i = 0; i < task_count_; ++i) offer_.add(tasks_[i].get(), tasks_[i]->begin_first());
  pool->push_all(&offer_);
}

bool Request::when_finished(std::function<void()> action) {
  std::lock_guard<std::mutex> lock(finish_mutex_);
  if (finished()) return false;
  action_ = std::move(action);
  return true;
}

bool Request::stopped() {
  if (status_.load(std::memory_order_acquire) != kOk) return true;
  if (cancel_ == nullptr || !cancel_->load(std::memory_order_acquire)) return false;
  fail(kCancelled);
  return true;
}

void Request::task_scored(Clock::time_point when) {
  const int64_t ns = std::chrono::nanoseconds(when - begun_).count();
  int64_t last = scoring_ns_.load(std::memory_order_relaxed);
  while (last < ns && !scoring_ns_.compare_exchange_weak(last, ns, std::memory_order_relaxed)) {
  }
}

void Request::task_finished(const std::atomic<int64_t> (&stage_ns)[kStages]) {
  for (int i = 0; i < kStages; ++i) {
    const int64_t took = stage_ns[i].load(std::memory_order_relaxed);
    stage_ns_[i].fetch_add(took, std::memory_order_relaxed);
  }
  int64_t left = left_.load(std::memory_order_acquire);
  while (left > 1) {
    if (left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) return;
  }
  Pool* pool = pool_;
  std::function<void()> action;
  {
    // The request may be reused as soon as the count is 0: only its mutex is touched after that.
    std::lock_guard<std::mutex> lock(finish_mutex_);
    span_ns_ = std::chrono::nanoseconds(Clock::now() - submitted_).count();
    action.swap(action_);
    left_.store(0, std::memory_order_release);
  }
  pool->notify_done();
  // Last, because the framework may run any part of its program inside this call.
  if (action) action();
}

}  // namespace fluxion
