// Operands that are lent to a request: which they are, and how long they stay as they are.

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "cuda_steps.h"
#include "runtime.h"
#include "stuck.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

// Rows with and without work, selections beyond the host blocks, and a boundary before them.
Case ragged_case() {
  Case c = make_case({3, 4, 2, 24, 72, DType::kFloat32}, 7);
  c.host_blocks = {35, 72, 0};
  c.boundary = {72, 20, 72, 0, 72, 72};
  return c;
}

// The same with all queries the other way round.
Case negated(Case c) {
  for (float& x : c.q) x = -x;
  for (int8_t& x : c.q8) x = static_cast<int8_t>(-x);
  return c;
}

Result result_of(Case c) { return run(c); }

std::vector<uint32_t> random_bitmap(const Geometry& g) {
  std::mt19937 rng(11);
  return integers<uint32_t>(rng, g.batch * g.heads * g.words(), 0, UINT32_MAX);
}

Lease make_lease() { return std::make_shared<std::atomic<bool>>(false); }

// What a request does whose operands change behind submit from `before` to `after`.
Result changed_meanwhile(Case before, const Case& after, const uint32_t* bitmap, const Lease& lease) {
  WorkView work = before.work();
  work.bitmap = bitmap;
  int32_t tick[2];
  fill(reserve(tick), before.g, work, before.cache(), before.scale, lease);
  before.q = after.q;
  before.q8 = after.q8;
  if (lease != nullptr) CHECK(lease->load());
  const Result r = collect_tick(before, tick);
  CHECK_EQ(r.status, 0);
  if (lease != nullptr) CHECK(!lease->load());
  return r;
}

// Whether the stream takes this exchange for others; those are never used.
bool is_reused(CudaStream& stream, const Exchange* exchange) {
  std::string problem;
  bool reused = false;
  for (int i = 0; i < 30; ++i) reused |= stream.acquire(exchange->capacity, &problem) == exchange;
  return reused;
}

// A submit whose exchange is known.
struct Lent {
  Lent(Device& on, Case& c, const CacheView& cache) {
    const int64_t bytes = 4 * static_cast<int64_t>(c.q.size());
    std::string problem;
    exchange = on.stream.acquire(bytes, &problem);
    CudaCopies operands;
    operands.add(exchange->staging, c.q.data(), bytes);
    Slot* slot = reserve(tick);
    const auto work = [this, slot, cache, &c] {
      WorkView view = c.work();
      view.q = reinterpret_cast<const float*>(exchange->staging);
      fill(slot, c.g, view, cache, c.scale, exchange->lease);
      start(tick, nullptr);
    };
    CHECK_EQ(on.stream.enqueue(exchange, operands, work, false, {}), "");
    on.fake.synchronize();
    CHECK(on.stream.drain(Clock::time_point::max()));
  }

  Exchange* exchange = nullptr;
  int32_t tick[2];
};

}  // namespace

TEST(what_is_lent_is_read_where_it_lies_and_everything_else_is_copied) {
  runtime().pool.set_threads(1);
  const Case c = ragged_case();
  const Case other = negated(c);
  const Result want = result_of(c);
  const Result want_other = result_of(other);
  CHECK(!same_bits(want, want_other));
  CHECK(same_bits(changed_meanwhile(c, other, nullptr, nullptr), want));
  CHECK(same_bits(changed_meanwhile(c, other, nullptr, make_lease()), want_other));
  // Memory of a copy that came before must not be taken for the next.
  CHECK(same_bits(changed_meanwhile(c, other, nullptr, nullptr), want));
}

TEST(what_a_submit_lends_may_go_when_start_does_not_begin) {
  const Case c = ragged_case();
  const Case other = negated(c);
  const Result want = result_of(c);
  const Result want_other = result_of(other);
  // Of workers there are some at submit, and perhaps none at start.
  for (const int at_submit : {1, 3}) {
    for (const bool starts : {false, true}) {
      runtime().pool.set_threads(at_submit);
      Case mine = c;
      int32_t tick[2];
      submit(mine.g, mine.work(), mine.cache(), mine.scale, tick, true);
      runtime().pool.set_threads(1);
      if (starts) CHECK(!start(tick, [] {}));
      mine.q = other.q;
      mine.q8 = other.q8;
      const Result r = collect_tick(mine, tick);
      CHECK_EQ(r.status, 0);
      CHECK(same_bits(r, at_submit > 1 && !starts ? want_other : want));
    }
  }
  // With workers nobody reads them once the action has been called.
  runtime().pool.set_threads(3);
  Case mine = c;
  int32_t tick[2];
  submit(mine.g, mine.work(), mine.cache(), mine.scale, tick, true);
  std::atomic<bool> ended{false};
  if (start(tick, [&] { ended = true; })) {
    while (!ended) std::this_thread::yield();
  }
  mine.q = other.q;
  mine.q8 = other.q8;
  CHECK(same_bits(collect_tick(mine, tick), want));
}

TEST(a_given_bitmap_is_never_lent_by_a_submit) {
  runtime().pool.set_threads(3);
  const Case c = ragged_case();
  auto bitmap = random_bitmap(c.g);
  Case mine = c;
  const Result want = changed_meanwhile(c, c, bitmap.data(), nullptr);
  WorkView work = mine.work();
  work.bitmap = bitmap.data();
  int32_t tick[2];
  submit(mine.g, work, mine.cache(), mine.scale, tick, true);
  std::fill(bitmap.begin(), bitmap.end(), 0u);
  CHECK(same_bits(collect_tick(mine, tick), want));
}

TEST(a_lent_bitmap_selects_what_a_copied_one_does) {
  const Case c = ragged_case();
  const auto bitmap = random_bitmap(c.g);
  const Result copied = changed_meanwhile(c, c, bitmap.data(), nullptr);
  const Result lent = changed_meanwhile(c, c, bitmap.data(), make_lease());
  CHECK(same_bits(lent, copied));
  check_result(lent, c);
  for (int64_t row = 0; row < c.g.batch * c.g.heads; ++row) {
    const int64_t task = row / c.g.group();
    const int64_t batch = row / c.g.heads;
    const int64_t limit = c.boundary[task] > 0 ? c.host_blocks[batch] : 0;
    for (int64_t i = 0; i < 32 * c.g.words(); ++i) {
      const int64_t word = row * c.g.words() + i / 32;
      const bool want = i < limit && (bitmap[word] >> i % 32 & 1);
      CHECK_EQ(lent.selection[word] >> i % 32 & 1, uint32_t{want});
    }
  }
}

TEST(a_stream_lends_its_staging_memory_to_a_submit) {
  for (const CudaSync sync :
       {CudaSync::kMemoryOperations, CudaSync::kKernels, CudaSync::kHostFunctions}) {
    for (const bool given : {false, true}) {
      // Nothing begins before collect.
      runtime().pool.set_threads(1);
      Device on(sync);
      Step step(ragged_case());
      const auto bitmap = random_bitmap(step.c.g);
      const std::vector<uint32_t> all(bitmap.size(), 0xffffffffu);
      if (given) step.bitmap = bitmap.data();
      CHECK_EQ(step.submit_on(on), "");
      on.fake.synchronize();
      CHECK(on.stream.drain(Clock::time_point::max()));
      Case want = negated(step.c);
      CHECK(replace_pinned(step.c.q.data(), want.q.data(), 4 * want.q.size()) > 0);
      if (given) {
        CHECK(replace_pinned(bitmap.data(), all.data(), 4 * all.size()) > 0);
      } else {
        CHECK(replace_pinned(step.c.q8.data(), want.q8.data(), want.q8.size()) > 0);
      }
      CHECK_EQ(step.collect_on(on), "");
      on.fake.synchronize();
      CHECK_EQ(step.r.status, 0);
      const Result wanted = changed_meanwhile(want, want, given ? all.data() : nullptr, nullptr);
      CHECK(same_bits(step.r, wanted));
    }
  }
}

// The layers behind one whose tasks are not done would copy their operands over its own.
TEST(a_stream_leaves_alone_what_a_stuck_step_reads) {
  for (const CudaSync sync :
       {CudaSync::kMemoryOperations, CudaSync::kKernels, CudaSync::kHostFunctions}) {
    runtime().pool.set_threads(2);
    Device on(sync);
    // Warm, so that exchanges of this size are there.
    Step warm(small_case());
    select_all(&warm.c);
    warm.run_on(on);
    on.fake.synchronize();
    Step first(small_case(1));
    select_all(&first.c);
    const auto keys = guard(first.c.k);
    const CacheView cache{keys->as<void>(), first.c.v.data(), first.c.summaries.data()};
    const Stuck stuck(keys.get());
    first.instead = &cache;
    CHECK_EQ(first.submit_on(on), "");
    Stuck::await();
    std::vector<std::unique_ptr<Step>> others;
    for (uint32_t seed = 2; seed < 40; ++seed) {
      others.push_back(std::make_unique<Step>(small_case(seed)));
      CHECK_EQ(others.back()->submit_on(on), "");
    }
    on.fake.synchronize();
    CHECK(on.stream.drain(Clock::time_point::max()));
    Stuck::let_go();
    CHECK_EQ(first.collect_on(on), "");
    on.fake.synchronize();
    check_step(first, first.c);
    for (const auto& step : others) {
      CHECK_EQ(step->collect_on(on), "");
      on.fake.synchronize();
      check_step(*step, step->c);
    }
  }
}

TEST(staging_memory_stays_lent_until_its_tick_is_collected) {
  for (const int threads : {1, 2}) {
    runtime().pool.set_threads(threads);
    Device on;
    Case c = small_case();
    const Lent lent(on, c, c.cache());
    CHECK(!is_reused(on.stream, lent.exchange));
    CHECK_EQ(collect_tick(c, lent.tick).status, 0);
    CHECK(is_reused(on.stream, lent.exchange));
  }
}

TEST(staging_memory_stays_lent_where_a_program_fails_before_it_collects) {
  runtime().pool.set_threads(2);
  Case c = small_case();
  int32_t tick[2];
  {
    Device on;
    const Lent lent(on, c, c.cache());
    std::copy_n(lent.tick, 2, tick);
    runtime().slots.drain(&runtime().pool, Clock::time_point::max());
    CHECK(!is_reused(on.stream, lent.exchange));
    // Others go on.
    Step step(small_case(1));
    step.run_on(on);
    on.fake.synchronize();
    check_step(step, small_case(1));
  }
  // Later than the stream itself.
  const Result r = collect_tick(c, tick);
  CHECK_EQ(r.status, 0);
  check_result(r, c);
}

TEST(staging_memory_stays_lent_while_a_thread_is_stuck_behind_a_timeout) {
  runtime().pool.set_threads(2);
  runtime().slots.drain(&runtime().pool, Clock::time_point::max());
  Device on;
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  select_all(&c);
  const auto keys = guard(c.k);
  const CacheView cache{keys->as<void>(), c.v.data(), c.summaries.data()};
  const Stuck stuck(keys.get());
  const Lent lent(on, c, cache);
  Stuck::await();
  const Result left = [&] {
    const ShortTimeout now;
    return collect_tick(c, lent.tick, kOk, true);
  }();
  CHECK_EQ(left.status, static_cast<int32_t>(kTimeout));
  // Neither now nor once other requests have come and gone.
  CHECK(!is_reused(on.stream, lent.exchange));
  CHECK_EQ(run(c).status, 0);
  CHECK(!is_reused(on.stream, lent.exchange));
  Stuck::let_go();
  runtime().slots.drain(&runtime().pool, Clock::time_point::max());
  // The slot is taken again.
  CHECK_EQ(run(c).status, 0);
  CHECK(is_reused(on.stream, lent.exchange));
}

// However much of it is lent, by programs that have yet to enqueue their collects.
TEST(staging_memory_that_is_lent_holds_up_nobody) {
  const Clock::duration before = runtime().timeout;
  runtime().timeout = std::chrono::seconds(10);
  Device on;
  std::vector<Exchange*> lent;
  std::string problem;
  for (int i = 0; i < 300; ++i) {
    Exchange* exchange = on.stream.acquire(64, &problem);
    if (exchange == nullptr) break;
    CHECK(std::find(lent.begin(), lent.end(), exchange) == lent.end());
    const auto work = [=] { *exchange->lease = true; };
    CHECK_EQ(on.stream.enqueue(exchange, {}, work, false, {}), "");
    lent.push_back(exchange);
  }
  on.fake.synchronize();
  CHECK(on.stream.drain(Clock::time_point::max()));
  const int64_t bytes = on.stream.staging_bytes();
  for (Exchange* exchange : lent) *exchange->lease = false;
  for (int i = 0; i < 300 && problem.empty(); ++i) on.stream.acquire(64, &problem);
  CHECK_EQ(problem, "");
  CHECK_EQ(on.stream.staging_bytes(), bytes);
  runtime().timeout = before;
}
