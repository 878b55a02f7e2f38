// submit, start and collect together, as a program calls them.

#include <algorithm>
#include <atomic>
#include <thread>

#include "check.h"
#include "guarded.h"
#include "requests.h"
#include "runtime.h"
#include "stuck.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

// Tasks of 30 chunks.
const Geometry kLarge{2, 6, 2, 64, 320, DType::kBFloat16};

Case large_case(uint32_t seed = 0) {
  Case c = make_case(kLarge, seed);
  select_all(&c);
  return c;
}

}  // namespace

TEST(requests_attend_to_their_selection) {
  for (const Geometry& g : {Geometry{2, 6, 3, 24, 40, DType::kFloat32},
                            Geometry{3, 14, 2, 64, 136, DType::kBFloat16},
                            Geometry{1, 4, 4, 256, 8, DType::kFloat32}}) {
    for (uint32_t seed = 0; seed < 3; ++seed) {
      Case c = make_case(g, seed);
      const Result r = run(c);
      CHECK_EQ(r.status, 0);
      check_result(r, c);
    }
  }
  Case c = large_case();
  const Result r = run(c);
  check_result(r, c);
  CHECK_EQ(r.blocks_read[0], 320);
}

TEST(results_have_the_same_bits_for_any_number_of_threads) {
  Case attending = make_case(kLarge, 5);
  // One task whose scoring and selection have several parts, and one where a group ranks once.
  Case scoring = make_case({2, 4, 1, 8, 1160, DType::kBFloat16}, 5);
  scoring.granularity = {16, 16};
  scoring.shared = {0, 1};
  scoring.host_blocks = {1160, 1155};
  // One task of chunks of all sizes, whose heads are ranked by several threads.
  Case long_one = make_case({1, 4, 1, 8, 2304, DType::kBFloat16}, 5);
  long_one.granularity = {16};
  long_one.host_blocks = {2300};
  long_one.k_units = {2000, 700, 5, 1200};
  CHECK(long_one.host_blocks[0] > kAloneUnits);
  const int64_t chunks = chunks_of(2000);
  CHECK_EQ(chunk_begin(chunks) - chunk_begin(chunks - 1), kMaxChunkBlocks);
  for (Case* c : {&attending, &scoring, &long_one}) {
    c->boundary.assign(c->boundary.size(), static_cast<int32_t>(c->g.blocks));
    runtime().pool.set_threads(1);
    const Result alone = run(*c);
    check_result(alone, *c);
    for (const int threads : {2, 3, 7}) {
      runtime().pool.set_threads(threads);
      for (int round = 0; round < 5; ++round) CHECK(same_bits(run(*c), alone));
    }
  }
}

TEST(a_given_bitmap_is_used_and_cut_at_the_host_blocks) {
  Case c = make_case({1, 2, 1, 16, 40, DType::kFloat32});
  c.host_blocks = {35};
  c.boundary = {40};
  WorkView work = c.work();
  const std::vector<uint32_t> bitmap = {0xffffffff, 0xffffffff, 0x00000001, 0xfffffff0};
  work.bitmap = bitmap.data();
  int32_t tick[2];
  submit(c.g, work, c.cache(), c.scale, tick);
  const Result r = collect_tick(c, tick);
  CHECK_EQ(r.status, 0);
  check_result(r, c);
  CHECK_EQ(r.blocks_read[0], 35);
  CHECK_EQ(r.units_scanned[0], 0);
  CHECK_EQ(r.selection[1], 0x7u);
  CHECK_EQ(r.selection[3], 0x0u);
}

TEST(ticks_are_collected_once_and_invented_ones_are_refused) {
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  int32_t tick[2];
  submit(c.g, c.work(), c.cache(), c.scale, tick);
  CHECK_EQ(collect_tick(c, tick).status, 0);
  const int32_t invented[][2] = {{tick[0], tick[1]}, {tick[0], tick[1] + 1}, {-5, 1},
                                 {INT32_MAX, 1},     {INT32_MIN, 1},         {tick[0], 0}};
  for (const auto& bad : invented) {
    const Result r = collect_tick(c, bad);
    CHECK_EQ(r.status, static_cast<int32_t>(kInvalid));
    CHECK(is_empty(r));
    CHECK(!start(bad, [] {}));
  }
}

TEST(a_stale_tick_does_not_take_the_next_request_of_its_slot) {
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  int32_t stale[2];
  int32_t tick[2];
  submit(c.g, c.work(), c.cache(), c.scale, stale);
  CHECK_EQ(collect_tick(c, stale).status, 0);
  submit(c.g, c.work(), c.cache(), c.scale, tick);
  CHECK_EQ(tick[0], stale[0]);
  CHECK_EQ(collect_tick(c, stale).status, static_cast<int32_t>(kInvalid));
  CHECK(!start(stale, [] {}));
  CHECK_EQ(collect_tick(c, tick).status, 0);
}

TEST(bad_values_are_refused_before_any_read) {
  const auto status = [](const std::function<void(Case&)>& spoil) {
    Case c = make_case({2, 4, 2, 16, 16, DType::kFloat32});
    c.host_blocks = {16, 16};
    c.boundary.assign(4, 16);
    spoil(c);
    const Result r = run(c);
    CHECK(r.status == 0 || is_empty(r));
    return r.status;
  };
  CHECK_EQ(status([](Case&) {}), 0);
  CHECK_EQ(status([](Case& c) { c.host_blocks[1] = 17; }), 1);
  CHECK_EQ(status([](Case& c) { c.host_blocks[1] = -1; }), 1);
  CHECK_EQ(status([](Case& c) { c.granularity[3] = 48; }), 1);
  CHECK_EQ(status([](Case& c) { c.granularity[3] = 0; }), 1);
  CHECK_EQ(status([](Case& c) { c.first_block[0] = 16, c.num_blocks[0] = 1; }), 1);
  CHECK_EQ(status([](Case& c) { c.k_units.assign(8, INT32_MAX); }), 0);
  CHECK_EQ(status([](Case& c) { c.k_units.assign(8, INT32_MIN); }), 0);
  CHECK_EQ(status([](Case& c) { c.boundary.assign(4, INT32_MAX); }), 0);
  CHECK_EQ(status([](Case& c) { c.boundary.assign(4, INT32_MIN); }), 0);
}

TEST(a_failed_collect_writes_no_flush) {
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  c.num_blocks = {1};
  const Stored before = c.k;
  int32_t tick[2];
  submit(c.g, c.work(), c.cache(), c.scale, tick);
  const Result copied = collect_tick(c, tick, kNotInPlace);
  CHECK_EQ(copied.status, static_cast<int32_t>(kNotInPlace));
  CHECK(is_empty(copied));
  CHECK(c.k == before);
  CHECK_EQ(run(c).status, 0);
  CHECK_EQ(c.k.at(0), c.flush_k.at(0));
}

TEST(a_cache_that_moved_between_submit_and_collect_is_noticed) {
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  int32_t tick[2];
  submit(c.g, c.work(), c.cache(), c.scale, tick);
  Case copy = c;
  CHECK_EQ(collect_tick(copy, tick).status, static_cast<int32_t>(kNotInPlace));
}

TEST(cancel_words_stop_work_and_unknown_ones_are_refused) {
  Case c = large_case();
  CancelTable& cancels = runtime().cancels;
  const int32_t word = cancels.create();
  CHECK_EQ(run(c, word).status, 0);
  CHECK(cancels.cancel(word));
  const Result r = run(c, word);
  CHECK_EQ(r.status, static_cast<int32_t>(kCancelled));
  CHECK(is_empty(r));
  CHECK(cancels.release(word));
  CHECK(!cancels.release(word));
  CHECK(!cancels.cancel(word));
  CHECK_EQ(run(c, word).status, static_cast<int32_t>(kInvalid));
}

TEST(a_collect_that_takes_too_long_ends_with_a_status) {
  Case c = large_case();
  runtime().pool.set_threads(1);
  const Result r = [&] {
    const ShortTimeout now;
    return run(c);
  }();
  CHECK_EQ(r.status, static_cast<int32_t>(kTimeout));
  CHECK(is_empty(r));
  CHECK_EQ(run(c).status, 0);
}

TEST(a_thread_that_is_stuck_is_left_behind_with_its_slot) {
  runtime().pool.set_threads(2);
  runtime().slots.drain(&runtime().pool, Clock::time_point::max());
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  select_all(&c);
  const auto keys = guard(c.k);
  const CacheView cache{keys->as<void>(), c.v.data(), c.summaries.data()};
  const Stuck stuck(keys.get());
  int32_t tick[2];
  submit(c.g, c.work(), cache, c.scale, tick);
  CHECK(start(tick, [] {}));
  Stuck::await();
  const Result left = [&] {
    const ShortTimeout now;
    return collect_tick(c, tick, kOk, true);
  }();
  CHECK_EQ(left.status, static_cast<int32_t>(kTimeout));
  CHECK(is_empty(left));
  CHECK_EQ(collect_tick(c, tick).status, static_cast<int32_t>(kInvalid));
  CHECK_EQ(runtime().slots.in_flight(), 0);
  // The stuck thread keeps its slot; a drain waits for it.
  int32_t next[2];
  submit(c.g, c.work(), c.cache(), c.scale, next);
  CHECK(next[0] != tick[0]);
  CHECK_EQ(collect_tick(c, next).status, 0);
  Stuck::let_go();
  runtime().slots.drain(&runtime().pool, Clock::time_point::max());
  submit(c.g, c.work(), c.cache(), c.scale, next);
  CHECK_EQ(next[0], tick[0]);
  CHECK_EQ(next[1], tick[1] + 1);
  const Result r = collect_tick(c, next);
  CHECK_EQ(r.status, 0);
  check_result(r, c);
}

TEST(a_reserved_slot_is_collected_once_it_is_filled) {
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  int32_t tick[2];
  Slot* slot = reserve(tick);
  CHECK_EQ(collect_tick(c, tick).status, static_cast<int32_t>(kInvalid));
  fill(slot, c.g, c.work(), c.cache(), c.scale);
  CHECK_EQ(collect_tick(c, tick).status, 0);
  Slot* again = reserve(tick);
  CHECK(again == slot);
  give_back(again);
  CHECK_EQ(collect_tick(c, tick).status, static_cast<int32_t>(kInvalid));
}

TEST(a_slot_to_which_nothing_was_lent_ends_in_an_error) {
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  int32_t tick[2];
  runtime().slots.publish(reserve(tick));
  CHECK(!start(tick, [] {}));
  const Result r = collect_tick(c, tick);
  CHECK_EQ(r.status, static_cast<int32_t>(kInternal));
  CHECK(is_empty(r));
  CHECK_EQ(run(c).status, 0);
}

TEST(a_refused_request_says_why) {
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  CHECK_EQ(run(c).status, 0);
  int32_t tick[2];
  Slot* slot = reserve(tick);
  runtime().slots.lend(slot).refuse(kInternal);
  runtime().slots.publish(slot);
  const Result r = collect_tick(c, tick);
  CHECK_EQ(r.status, static_cast<int32_t>(kInternal));
  CHECK(is_empty(r));
}

TEST(an_injected_fault_hits_one_collect) {
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  runtime().collect_fault.arm(kInternal, 1);
  CHECK_EQ(run(c).status, 0);
  CHECK_EQ(run(c).status, static_cast<int32_t>(kInternal));
  CHECK_EQ(run(c).status, 0);
}

TEST(work_runs_between_start_and_collect) {
  runtime().pool.set_threads(2);
  Case c = large_case();
  int32_t tick[2];
  submit(c.g, c.work(), c.cache(), c.scale, tick);
  std::atomic<bool> finished{false};
  if (start(tick, [&] { finished = true; })) {
    while (!finished) std::this_thread::yield();
  }
  const Result r = collect_tick(c, tick);
  CHECK_EQ(r.status, 0);
  CHECK(r.times[kBusy] > 0.0f && r.times[kSpan] > 0.0f);
  check_result(r, c);
}

TEST(a_program_is_told_of_its_end_where_the_system_refuses_threads) {
  Pool& pool = runtime().pool;
  pool.set_threads(4);
  Case c = large_case();
  int32_t tick[2];
  submit(c.g, c.work(), c.cache(), c.scale, tick);
  // No address space has room for such a stack.
  pthread_attr_t usual;
  pthread_attr_t huge;
  pthread_getattr_default_np(&usual);
  pthread_attr_init(&huge);
  pthread_attr_setstacksize(&huge, size_t{1} << 47);
  pthread_setattr_default_np(&huge);
  std::atomic<bool> finished{false};
  const bool held = start(tick, [&] { finished = true; });
  pthread_setattr_default_np(&usual);
  CHECK(held);
  CHECK(finished);
  CHECK_EQ(pool.threads(), 1);
  const Result r = collect_tick(c, tick);
  CHECK_EQ(r.status, 0);
  check_result(r, c);
  pthread_attr_destroy(&huge);
  pthread_attr_destroy(&usual);
  pool.set_threads(2);
}

TEST(drain_waits_and_gives_up_what_nobody_collects) {
  runtime().pool.set_threads(2);
  Case c = large_case();
  const int before = runtime().slots.in_flight();
  int32_t tick[2];
  submit(c.g, c.work(), c.cache(), c.scale, tick);
  start(tick, [] {});
  CHECK_EQ(runtime().slots.in_flight(), before + 1);
  CHECK_EQ(runtime().slots.drain(&runtime().pool, Clock::time_point::max()), before + 1);
  CHECK_EQ(runtime().slots.in_flight(), 0);
  // Too late to be expected, but not lost.
  CHECK_EQ(collect_tick(c, tick).status, 0);
}

TEST(threads_with_their_own_caches_do_not_meet) {
  runtime().pool.set_threads(3);
  std::vector<std::thread> programs;
  for (uint32_t seed = 0; seed < 3; ++seed) {
    programs.emplace_back([seed] {
      Case c = make_case({2, 4, 2, 24, 72, DType::kFloat32}, seed);
      const Result first = run(c);
      check_result(first, c);
      for (int round = 0; round < 40; ++round) {
        // Several in flight, collected in another order.
        int32_t ticks[3][2];
        for (auto& tick : ticks) submit(c.g, c.work(), c.cache(), c.scale, tick);
        for (auto& tick : ticks) start(tick, [] {});
        for (const int i : {1, 2, 0}) CHECK(same_bits(collect_tick(c, ticks[i]), first));
      }
    });
  }
  for (std::thread& program : programs) program.join();
}
