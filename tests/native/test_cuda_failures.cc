// What goes wrong on a stream: refusals, faults of the driver, a device that has died.

#include "cuda_steps.h"
#include "runtime.h"

using namespace fluxion;
using namespace fluxion_tests;

TEST(a_stream_refuses_a_cache_that_is_not_in_its_place) {
  Device on;
  Step step(small_case());
  set_device_memory(step.c.v.data(), 64);
  CHECK(step.submit_on(on).find("pinned host memory, got one in device") != std::string::npos);
  set_device_memory(nullptr, 0);
  CHECK_EQ(step.submit_on(on), "");
  Case other = step.c;
  CollectCall call;
  call.g = step.c.g;
  call.cache = step.c.cache();
  call.result = other.cache();
  CHECK(enqueue_collect(on.stream, call).find("updated in place") != std::string::npos);
  CHECK_EQ(step.collect_on(on), "");
  on.fake.synchronize();
  check_step(step, small_case());
}

TEST(a_stream_survives_calls_of_the_driver_that_fail) {
  for (const CudaSync sync :
       {CudaSync::kMemoryOperations, CudaSync::kHostFunctions, CudaSync::kKernels}) {
    Device on(sync);
    Step warm(small_case());
    warm.run_on(on);
    on.fake.synchronize();
    const int before = runtime().slots.in_flight();
    for (int calls = 0; calls < 6; ++calls) {
      Step step(small_case());
      fake_faults().calls_left = calls;
      const std::string submitted = step.submit_on(on);
      int32_t tick[2];
      on.fake.push([&] { std::copy_n(step.device_tick, 2, tick); });
      const std::string collected = step.collect_on(on);
      reset_faults();
      const int needed = sync == CudaSync::kKernels ? 2 : 5;
      CHECK(!submitted.empty() || !collected.empty() || calls >= needed);
      for (const std::string& problem : {submitted, collected}) {
        CHECK(problem.empty() || problem.find("a fault to order") != std::string::npos);
      }
      on.fake.synchronize();
      // As a program does that fails between submit and collect, before its cache goes.
      CHECK(on.stream.drain(Clock::now() + std::chrono::seconds(20)));
      runtime().slots.drain(&runtime().pool, Clock::time_point::max());
      // So that no other test finds it by a tick that it has made up.
      if (!collected.empty()) collect_tick(step.c, tick);
    }
    CHECK(runtime().slots.in_flight() <= before);
    Step last(small_case());
    last.run_on(on);
    on.fake.synchronize();
    check_step(last, small_case());
  }
}

TEST(a_stream_answers_a_kernel_behind_which_a_copy_fails) {
  Device on(CudaSync::kKernels);
  // Results so large that the driver copies them.
  const Case large = make_case({16, 32, 8, 128, 8, DType::kFloat32}, 0);
  Step step(large);
  CHECK_EQ(step.submit_on(on), "");
  fake_faults().calls_left = 1;
  CHECK(step.collect_on(on).find("a fault to order") != std::string::npos);
  reset_faults();
  on.fake.synchronize();
  CHECK(on.stream.drain(Clock::now() + std::chrono::seconds(20)));
  Step last(large);
  last.run_on(on);
  on.fake.synchronize();
  check_step(last, large);
}

TEST(a_stream_of_a_device_that_failed_holds_up_nobody) {
  Step step(small_case());
  {
    Device on;
    on.fake.pause();
    step.run_on(on);
    fake_faults().failed_device = true;
    const Clock::time_point start = Clock::now();
    CHECK(!on.stream.drain(Clock::time_point::max()));
    CHECK(Clock::now() - start < std::chrono::seconds(10));
    CHECK(!step.submit_on(on).empty());
    reset_faults();
  }
  runtime().slots.drain(&runtime().pool, Clock::time_point::max());
}

TEST(a_stream_that_refuses_a_submit_leaves_no_slot_behind) {
  runtime().slots.drain(&runtime().pool, Clock::time_point::max());
  Device on;
  Step step(small_case());
  step.run_on(on);
  on.fake.synchronize();
  int32_t before[2];
  int32_t after[2];
  give_back(reserve(before));
  fake_faults().calls_left = 0;
  CHECK(!step.submit_on(on).empty());
  reset_faults();
  give_back(reserve(after));
  CHECK_EQ(after[0], before[0]);
  on.fake.synchronize();
}

TEST(a_cancelled_step_of_a_stream_says_so) {
  Device on;
  Step step(small_case());
  step.cancel = runtime().cancels.create();
  step.run_on(on);
  on.fake.synchronize();
  check_step(step, small_case());
  runtime().cancels.cancel(step.cancel);
  step.run_on(on);
  on.fake.synchronize();
  CHECK_EQ(step.r.status, static_cast<int32_t>(kCancelled));
  CHECK(is_empty(step.r));
  runtime().cancels.release(step.cancel);
}

TEST(a_stream_that_ends_releases_what_waits) {
  Step step(small_case());
  FakeStream fake;
  {
    CudaStream stream(&driver(), &fake, CudaSync::kMemoryOperations);
    fake.pause();
    Exchange* exchange = nullptr;
    std::string problem;
    exchange = stream.acquire(64, &problem);
    CHECK_EQ(stream.enqueue(exchange, {}, [] {}, true, {}), "");
  }
  fake.go_on();
  fake.synchronize();
}
