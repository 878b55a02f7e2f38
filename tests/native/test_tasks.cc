#include "tasks.h"

#include <thread>

#include "cases.h"
#include "check.h"

using namespace fluxion;
using namespace fluxion_tests;

TEST(largest_tasks_are_begun_first) {
  // Ragged in every respect: lengths, budgets, granularities and boundaries.
  Case c = make_case({4, 8, 4, 16, 136, DType::kFloat32}, 1);
  c.boundary.assign(c.boundary.size(), 136);
  c.host_blocks = {100, 8, 136, 50};
  Request request;
  CHECK_EQ(request.prepare(c.g, c.work(), c.cache(), c.scale, nullptr, true), uint32_t{kOk});
  CHECK_EQ(request.tasks(), 16);
  for (int64_t i = 1; i < request.tasks(); ++i) {
    CHECK(request.task(i - 1).bytes() >= request.task(i).bytes());
  }
  CHECK(request.task(0).bytes() > request.task(15).bytes());
}

TEST(chunks_grow_and_cover_everything_once) {
  CHECK_EQ(chunk_begin(0), 0);
  int64_t before = 0;
  for (int64_t chunk = 0; chunk < 100; ++chunk) {
    const int64_t size = chunk_begin(chunk + 1) - chunk_begin(chunk);
    CHECK(size >= before && size >= kMinChunkBlocks && size <= kMaxChunkBlocks);
    before = size;
    CHECK_EQ(chunks_of(chunk_begin(chunk)), chunk);
    CHECK_EQ(chunks_of(chunk_begin(chunk) + 1), chunk + 1);
    CHECK_EQ(chunks_of(chunk_begin(chunk + 1) - 1), chunk + 1);
  }
  CHECK_EQ(before, kMaxChunkBlocks);
}

TEST(covered_time_counts_moments_once_and_gaps_not_at_all) {
  CoveredTime covered;
  covered.reset();
  const auto pause = [] { std::this_thread::sleep_for(std::chrono::milliseconds(5)); };
  const auto start = covered.enter();
  pause();
  covered.enter();
  pause();
  covered.leave();
  pause();
  const auto end = covered.leave();
  pause();
  const auto again = covered.enter();
  pause();
  const auto last = covered.leave();
  const std::chrono::duration<double> want = (end - start) + (last - again);
  CHECK_CLOSE(covered.seconds(), want.count(), 1e-12);
  CHECK(want.count() >= 0.02);
  CHECK(std::chrono::duration<double>(last - start).count() >= want.count() + 0.005);
}

TEST(covered_time_of_many_threads_is_no_longer_than_what_passes) {
  CoveredTime covered;
  const auto come_and_go = [&] {
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] {
        for (int j = 0; j < 20000; ++j) {
          covered.enter();
          covered.leave();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  };
  covered.reset();
  const auto start = Clock::now();
  come_and_go();
  const std::chrono::duration<double> passed = Clock::now() - start;
  CHECK(covered.seconds() >= 0.0);
  CHECK(covered.seconds() <= passed.count());

  // While one thread works throughout, the others change nothing.
  covered.reset();
  const auto entered = covered.enter();
  come_and_go();
  const std::chrono::duration<double> within = covered.leave() - entered;
  CHECK_CLOSE(covered.seconds(), within.count(), 1e-12);
}
