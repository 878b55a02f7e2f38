// One submitted request: the tasks of one layer of one step, from submit to collect.
//
// A task is one (sequence, KV head) with something to do for the host: selectable blocks and a
// boundary above 0. It runs on the pool in three stages, each cut into parts of a fixed size, so
// that few large tasks keep as many threads busy as many small ones: scoring by kScoreUnits units,
// selection by query heads, attention by chunks of up to kMaxChunkBlocks blocks. Whoever finishes
// the last part of a stage begins the next one. The chunks' states are merged in their order, some
// that follow each other first and in the end all. Scores and selections are exact integers and
// chunks depend only on the work, so the bits of the result depend neither on the number of threads
// nor on who ran what.
//
// Ownership: a request copies the small operands and only points at K, V and the summaries, which
// the caller keeps alive from start to `finished()`. Queries and a given bitmap are copied too, unless
// they are `lent`: then the caller keeps them until the next prepare, or until nobody will ask for
// the selection and no thread is in the request. It owns its results, unless prepare or `write_to`
// is told where else they go, which then is the caller's to keep until `finished()`. It is never destroyed; its
// memory is reused by the next request in the same slot.
// Threads: prepare and the results belong to one thread at a time; between start and finished()
// only the pool touches the tasks. Any thread may call `start`, `write_to`, `when_finished` and
// `abort`.

#ifndef FLUXION_TASKS_H_
#define FLUXION_TASKS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "cancel.h"
#include "kernels.h"
#include "offer.h"
#include "pool.h"
#include "types.h"

namespace fluxion {

// Units of a part of scoring. Whoever takes several parts scores them as one.
constexpr int64_t kScoreUnits = 64;
// No more units are ranked for a head sooner than another thread could take it over.
constexpr int64_t kAloneUnits = 512;

// So many chunks are merged by who ends the last of them. All by one thread would take the longer the
// more there are, while the others wait for the layer to end.
constexpr int64_t kMergedChunks = 8;

constexpr int kStages = 3;  // Scoring, selection, attention.

class Request;

struct ChunkList {
  int32_t count;
  int32_t blocks[kMaxChunkBlocks];
  uint64_t head_masks[kMaxChunkBlocks];
};

class Task : public Job {
 public:
  void prepare(Request* request, int64_t batch, int64_t kv_head);

  // Begins the first stage; returns its parts, to be queued.
  int64_t begin_first();

  // An upper bound of what the task reads; the union of the selections is not known beforehand.
  int64_t bytes() const { return bytes_; }
  int64_t index() const { return index_; }
  // Once it has finished: the `out` that it has written to.
  const float* written() const { return written_; }

  void run(int64_t first, int64_t last) noexcept override;

 private:
  enum class Stage { kScore, kSelect, kAttend };

  void plan_scoring();
  void begin(Stage stage, int64_t parts);
  void run_parts(int64_t first, int64_t last);
  void conclude();
  bool begin_next();
  int64_t selecting_parts() const;
  void queue_parts();
  void score(int64_t first_part, int64_t last_part);
  void select(int64_t part);
  void select_head(int64_t head, int64_t wanted, const int32_t* next);
  UnionArgs selections() const;
  void cut_union();
  void list(int64_t chunk, ChunkList* listed) const;
  void attend(int64_t first, int64_t last);
  void fetch_what_follows();
  void attend_chunk(int64_t chunk, const ChunkList& listed, int32_t next);
  int64_t state_size() const;
  void count_unmerged();
  void chunk_attended(int64_t chunk);
  void merge(int64_t first, int64_t stride, int64_t count);
  void finish();
  // Runs what belongs to the stage, unless the request has been stopped.
  template <typename Body>
  void guarded(const Body& body) noexcept;
  void charge(Stage stage, Clock::duration took);

  alignas(kLineBytes) Request* request_ = nullptr;
  int64_t batch_ = 0;
  int64_t kv_head_ = 0;
  int64_t index_ = 0;                    // Among all (sequence, KV head).
  int64_t bytes_ = 0;
  int64_t ratio_ = 1;                    // Blocks of a unit.
  int64_t units_ = 0;
  int64_t most_wanted_ = 0;              // By any head of the group.
  bool shared_ = false;                  // One ranking for the whole group.
  bool ranked_ = false;                  // Whether there is anything to score.
  Stage stage_ = Stage::kSelect;
  int64_t parts_ = 0;
  std::vector<int32_t> scores_;          // [G, units]; row 0 becomes the maximum where shared.
  const float* written_ = nullptr;
  int64_t union_blocks_ = 0;             // In the union of the group's selections.
  std::vector<ChunkStart> chunks_;       // Of that union.
  std::vector<float> states_;            // Per chunk: m [G], l [G], acc [G, H].
  std::vector<int32_t> unmerged_;        // Chunks not yet attended to, of each kMergedChunks.
  // Written by all who work on the task, unlike what lies before.
  alignas(kLineBytes) std::atomic<int64_t> parts_left_{0};
  std::atomic<int64_t> stage_ns_[kStages] = {};
};

// The time in which any of several threads works. Every change between none and some is added with
// its time, so no thread reads what another one wrote. The clock is read within the time that counts,
// so what is measured is never longer than what was; a thread that is put aside between the clock and
// the count makes it shorter.
class CoveredTime {
 public:
  void reset() { ns_.store(0, std::memory_order_relaxed); }

  // Before work and after it, by any thread; each returns when that was.
  Clock::time_point enter() {
    const bool first = working_.fetch_add(1, std::memory_order_relaxed) == 0;
    const Clock::time_point now = Clock::now();
    if (first) ns_.fetch_sub(now.time_since_epoch().count(), std::memory_order_relaxed);
    return now;
  }
  Clock::time_point leave() {
    const Clock::time_point now = Clock::now();
    const bool last = working_.fetch_sub(1, std::memory_order_relaxed) == 1;
    if (last) ns_.fetch_add(now.time_since_epoch().count(), std::memory_order_relaxed);
    return now;
  }

  // While nobody works.
  double seconds() const {
    return 1e-9 * std::max<int64_t>(0, ns_.load(std::memory_order_relaxed));
  }

 private:
  static_assert(std::is_same<Clock::period, std::nano>::value, "");

  std::atomic<int64_t> working_{0};
  std::atomic<int64_t> ns_{0};
};

class Request {
 public:
  // Copies the operands, but for those that are `lent`, and checks their values. Returns kOk or
  // kInvalid; in the latter case there are no tasks. Where `results` are given, everything is written
  // there and nothing is left to be written. May throw std::bad_alloc.
  uint32_t prepare(const Geometry& geometry, const WorkView& work, const CacheView& cache,
                   float scale, CancelWord cancel, bool cancel_known, bool lent = false,
                   Results results = {});

  // Before start: copies what is lent. May throw std::bad_alloc.
  void end_loan();

  // Instead of prepare, or after it threw: there are no tasks, and the status is this one.
  void refuse(uint32_t status);

  // From now on tasks put their results there, whether or not some have finished before: so most
  // results go where they are wanted, although the tasks may be under way. Once a request. Of one that
  // delivers and has been started nothing changes.
  void write_to(Results results);
  // Where nobody else keeps memory for the results any more. Before start.
  void keep_results() { results_.store(&own_, std::memory_order_release); }
  // Whether all results go where prepare was told.
  bool delivers() const { return delivers_; }
  // Once finished: puts the results there that are not yet, or asks for both their places first.
  void write_results(const Results& results) const;
  void fetch_results(const Results& results) const;

  // Queues the tasks, the first time it is called after prepare. Does not throw.
  void start(Pool* pool) noexcept;

  // Arranges for `action` to be called by the thread that finishes the last task, after which
  // nobody reads K, V and the summaries. Returns false, and never calls it, if that was already
  // so. One action per request.
  bool when_finished(std::function<void()> action);

  // Before start: whether there is nothing to do.
  bool finished() const { return left_.load(std::memory_order_acquire) == 0; }
  const std::atomic<int64_t>& left() const { return left_; }

  // Whether no thread works on it: not started, or finished.
  bool at_rest() const { return !started_.load(std::memory_order_acquire) || finished(); }

  // Makes the remaining parts return without work, and adds `status`.
  void abort(uint32_t status) { fail(status); }

  // Valid once finished.
  uint32_t status() const { return status_.load(std::memory_order_acquire); }
  const Geometry& geometry() const { return geometry_; }
  // In the order in which they are begun.
  const Task& task(int64_t i) const { return *tasks_[i]; }
  int64_t tasks() const { return task_count_; }
  const CacheView& cache() const { return cache_; }
  void write_selection(uint32_t* selection) const;                   // [B, N, W]
  const std::vector<int32_t>& blocks_read() const { return blocks_read_; }      // [B, K]
  const std::vector<int32_t>& units_scanned() const { return units_scanned_; }  // [B, K]
  double scored_s() const { return 1e-9 * stage_ns_[0].load(std::memory_order_relaxed); }
  double selected_s() const { return 1e-9 * stage_ns_[1].load(std::memory_order_relaxed); }
  double attended_s() const { return 1e-9 * stage_ns_[2].load(std::memory_order_relaxed); }
  double submit_s = 0.0;  // Set by whoever prepares it.
  double busy_s() const { return scored_s() + selected_s() + attended_s(); }
  double covered_s() const { return covered_.seconds(); }
  double span_s() const { return 1e-9 * span_ns_; }
  double scoring_s() const { return 1e-9 * scoring_ns_.load(std::memory_order_relaxed); }

 private:
  friend class Task;

  uint32_t validate(const WorkView& work) const;
  void fetch_operands(const Geometry& g, const WorkView& work, bool lent);
  void fetch_copies(int64_t first_kept, int64_t end_kept);
  void place_queries(const WorkView& work, bool lent);
  void place_bitmap(const WorkView& work, bool lent);
  void copy_numbers(const WorkView& work);
  bool has_work(int64_t batch, int64_t kv_head) const;
  void write_nothing(int64_t batch, int64_t kv_head);
  bool keeps_results() const;
  template <typename Body>
  void each_unwritten(const Results& results, const Body& body) const;
  bool stopped();
  void fetch_state(int64_t first_row);
  void fail(uint32_t status) { status_.fetch_or(status, std::memory_order_acq_rel); }
  void task_scored(Clock::time_point when);
  void task_finished(const std::atomic<int64_t> (&stage_ns)[kStages]);

  Geometry geometry_;
  CacheView cache_;
  float scale_ = 1.0f;
  bool has_bitmap_ = false;
  bool delivers_ = false;
  CancelWord cancel_;
  Pool* pool_ = nullptr;
  Clock::time_point submitted_;
  Clock::time_point begun_;

  const float* q_ = nullptr;             // These three lie in the vectors or with the caller.
  const int8_t* q8_ = nullptr;
  const uint32_t* bitmap_ = nullptr;     // Of a given one bits from the host blocks on mean nothing.
  std::vector<float> own_q_;
  std::vector<int8_t> own_q8_;
  std::vector<uint32_t> own_bitmap_;
  std::vector<int32_t> granularity_;
  std::vector<int32_t> k_units_;
  std::vector<int32_t> shared_;
  std::vector<int32_t> host_blocks_;
  std::vector<int32_t> boundary_;

  std::vector<std::unique_ptr<Task>> tasks_;  // Grows and keeps its memory.
  int64_t task_count_ = 0;
  std::atomic<bool> started_{false};
  // What the end of a task writes lies side by side.
  alignas(kLineBytes) std::atomic<int64_t> left_{0};  // Not finished; reaches 0 under finish_mutex_.
  std::atomic<int64_t> kept_{0};  // Tasks whose results are in the request's own memory.
  std::atomic<int64_t> stage_ns_[kStages] = {};  // Of the tasks that have finished.
  std::atomic<int64_t> scoring_ns_{0};           // Of the task that was scored last.
  int64_t span_ns_ = 0;                          // Written by whoever finishes the last task.
  std::mutex finish_mutex_;
  std::function<void()> action_;         // Guarded by finish_mutex_.
  // All threads look at these before and behind each part.
  alignas(kLineBytes) std::atomic<uint32_t> status_{0};
  std::atomic<const Results*> results_{nullptr};  // One of the next two.
  Results own_;                          // The two vectors.
  Results given_;
  std::vector<float> own_out_;
  std::vector<float> own_lse_;
  std::vector<int32_t> blocks_read_;
  std::vector<int32_t> units_scanned_;
  Offer offer_;
  // By parts of tasks; written by every thread all the time, unlike what lies before.
  alignas(kLineBytes) CoveredTime covered_;
};

}  // namespace fluxion

#endif  // FLUXION_TASKS_H_
