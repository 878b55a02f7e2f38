// Where results go: to the request's own memory, or to where collect wants them.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cases.h"
#include "check.h"
#include "requests.h"
#include "runtime.h"
#include "tasks.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

struct Arrays {
  std::vector<float> out, lse;

  explicit Arrays(const Geometry& g) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    out.assign(g.batch * g.heads * g.head_dim, nan);
    lse.assign(g.batch * g.heads, nan);
  }
  Results view() { return {out.data(), lse.data()}; }
  bool same_bits(const Arrays& other) const {
    return std::memcmp(out.data(), other.out.data(), 4 * out.size()) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), 4 * lse.size()) == 0;
  }
  int64_t written() const {
    return std::count_if(lse.begin(), lse.end(), [](float x) { return !std::isnan(x); });
  }
};

// Eight groups, of which two have no work.
Case some_case() {
  Case c = make_case({2, 12, 4, 24, 72, DType::kFloat32}, 3);
  select_all(&c);
  c.boundary[2] = c.boundary[5] = 0;
  return c;
}

// Tells where results go once so many tasks have finished, and returns them.
Arrays run(Request* request, Pool* pool, const Case& c, int64_t finished) {
  Case copy = c;
  Arrays arrays(c.g);
  CHECK_EQ(request->prepare(copy.g, copy.work(), copy.cache(), copy.scale, nullptr, true),
           uint32_t{kOk});
  const int64_t tasks = request->tasks();
  CHECK_EQ(tasks, 6);
  if (finished == 0) request->write_to(arrays.view());
  request->start(pool);
  while (request->left() > tasks - finished) pool->run_some();
  if (finished > 0) request->write_to(arrays.view());
  CHECK(pool->help(request->left(), Clock::time_point::max()));
  const int64_t group = c.g.group();
  if (pool->threads() == 1) CHECK_EQ(arrays.written(), (tasks - finished) * group);
  request->fetch_results(arrays.view());
  request->write_results(arrays.view());
  CHECK_EQ(arrays.written(), c.g.batch * c.g.heads);
  return arrays;
}

}  // namespace

TEST(results_go_where_they_are_wanted_from_any_time_on) {
  const Case c = some_case();
  Request request;
  Pool pool(1);
  const Arrays first = run(&request, &pool, c, 0);
  for (int64_t finished = 1; finished <= 6; ++finished) {
    CHECK(run(&request, &pool, c, finished).same_bits(first));
  }
  CHECK_EQ(first.out[2 * 3 * 24], 0.0f);
  CHECK(std::isinf(first.lse[2 * 3]));
}

TEST(results_of_many_threads_go_where_they_are_wanted) {
  const Case c = some_case();
  Request request;
  Pool alone(1);
  const Arrays want = run(&request, &alone, c, 0);
  Pool pool(3);
  for (int round = 0; round < 100; ++round) {
    CHECK(run(&request, &pool, c, round % 7).same_bits(want));
  }
}

TEST(results_that_nobody_wants_elsewhere_stay_with_the_request) {
  Case c = some_case();
  Request request;
  Pool pool(1);
  Arrays before = run(&request, &pool, c, 0);
  const Arrays want = before;
  // The place of the last time is not that of the next.
  before = Arrays(c.g);
  CHECK_EQ(request.prepare(c.g, c.work(), c.cache(), c.scale, nullptr, true), uint32_t{kOk});
  request.start(&pool);
  CHECK(pool.help(request.left(), Clock::time_point::max()));
  CHECK_EQ(before.written(), 0);
  request.write_results(before.view());
  CHECK(before.same_bits(want));
}

// What collect brings where its arrays are those of submit, or got what these held before.
Arrays delivered(const Case& c, int threads, bool starts, bool copied) {
  Case mine = c;
  Arrays arrays(c.g);
  Arrays elsewhere(c.g);
  int32_t tick[2];
  runtime().pool.set_threads(threads);
  submit(mine.g, mine.work(), mine.cache(), mine.scale, tick, true, arrays.view());
  std::atomic<bool> ended{false};
  const bool begun = starts && start(tick, [&] { ended = true; });
  while (begun && !ended) std::this_thread::yield();
  // Then the framework may look at them already.
  if (begun) CHECK_EQ(arrays.written(), c.g.batch * c.g.heads);
  if (copied) elsewhere = arrays;
  const Results results = copied ? elsewhere.view() : arrays.view();
  std::vector<int32_t> counts(2 * c.g.batch * c.g.kv_heads);
  float times[kTimes];
  int32_t status = -1;
  int32_t* const scanned = counts.data() + c.g.batch * c.g.kv_heads;
  collect(tick, mine.g, mine.cache(), mine.flush(), kOk,
          {results.out, results.lse, &status, times, counts.data(), scanned, nullptr, true});
  CHECK_EQ(status, 0);
  return copied ? elsewhere : arrays;
}

TEST(results_of_a_submit_that_was_told_where_need_no_copy) {
  const Case c = some_case();
  Request request;
  Pool alone(1);
  const Arrays want = run(&request, &alone, c, 0);
  for (const int threads : {1, 2, 3}) {
    for (const bool starts : {false, true}) {
      for (const bool copied : {false, true}) {
        for (int i = 0; i < 10; ++i) CHECK(delivered(c, threads, starts, copied).same_bits(want));
      }
    }
  }
}

TEST(results_of_a_submit_go_nowhere_if_collect_is_not_given_them) {
  const Case c = some_case();
  Case larger = make_case({2, 12, 4, 32, 72, DType::kFloat32}, 3);
  for (const int threads : {1, 3}) {
    for (const bool fits : {false, true}) {
      Case mine = c;
      Arrays arrays(c.g);
      int32_t tick[2];
      runtime().pool.set_threads(threads);
      submit(mine.g, mine.work(), mine.cache(), mine.scale, tick, true, arrays.view());
      std::atomic<bool> ended{false};
      const bool begun = start(tick, [&] { ended = true; });
      while (begun && !ended) std::this_thread::yield();
      const Arrays before = arrays;
      Case& other = fits ? mine : larger;
      const Result r = collect_tick(other, tick);
      CHECK(r.status & kInvalid);
      CHECK(is_empty(r));
      // Their memory may be another's by now.
      CHECK(arrays.same_bits(before));
    }
  }
}

TEST(results_of_a_submit_that_failed_are_those_of_an_empty_set) {
  Case c = some_case();
  c.host_blocks[1] = -1;
  Arrays arrays(c.g);
  int32_t tick[2];
  submit(c.g, c.work(), c.cache(), c.scale, tick, true, arrays.view());
  CHECK(!start(tick, [] {}));
  std::vector<int32_t> counts(2 * c.g.batch * c.g.kv_heads);
  float times[kTimes];
  int32_t status = -1;
  collect(tick, c.g, c.cache(), c.flush(), kOk,
          {arrays.out.data(), arrays.lse.data(), &status, times, counts.data(), counts.data(),
           nullptr, true});
  CHECK_EQ(status, static_cast<int32_t>(kInvalid));
  for (const float x : arrays.out) CHECK_EQ(x, 0.0f);
  for (const float x : arrays.lse) CHECK(std::isinf(x) && x < 0);
}

TEST(a_nan_that_nothing_weighs_reaches_the_result) {
  Case c = make_case({1, 2, 1, 72, 24, DType::kFloat32}, 3);
  select_all(&c);
  // Scores of minus infinity, over which there is no mass.
  for (float& x : c.q) x = 3e38f;
  for (int64_t i = 0; i < 24 * kBlockTokens * 72; ++i) c.k.set(i, -3e38f);
  c.v.set(5 * kBlockTokens * 72 + 7, std::numeric_limits<float>::quiet_NaN());
  Arrays arrays(c.g);
  Request request;
  Pool pool(1);
  CHECK_EQ(request.prepare(c.g, c.work(), c.cache(), c.scale, nullptr, true), uint32_t{kOk});
  request.write_to(arrays.view());
  request.start(&pool);
  CHECK(pool.help(request.left(), Clock::time_point::max()));
  for (int64_t h = 0; h < 2; ++h) {
    CHECK_EQ(arrays.lse[h], -std::numeric_limits<float>::infinity());
    CHECK(std::isnan(arrays.out[h * 72 + 7]));
    CHECK_EQ(arrays.out[h * 72 + 8], 0.0f);
  }
}
