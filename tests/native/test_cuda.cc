// The operations on a stream of a driver without a device.

#include <string>
#include <thread>

#include "check.h"
#include "cuda_operations.h"
#include "fake_cuda.h"
#include "requests.h"
#include "runtime.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

const CudaDriver& driver() {
  static const CudaDriver fake = fake_driver();
  return fake;
}

// A stream and what belongs to it; results are complete after `synchronize`.
struct Device {
  explicit Device(CudaSync sync = CudaSync::kMemoryOperations) : stream(&driver(), &fake, sync) {}
  FakeStream fake;
  CudaStream stream;
};

// One layer's step, as a program enqueues it: its operands are written by the stream itself, just
// before, and overwritten just after.
struct Step {
  explicit Step(const Case& from) : c(from), device(from) {
    const Geometry& g = c.g;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    r.out.assign(g.batch * g.heads * g.head_dim, nan);
    r.lse.assign(g.batch * g.heads, nan);
    r.blocks_read.assign(g.batch * g.kv_heads, -1);
    r.units_scanned.assign(g.batch * g.kv_heads, -1);
    r.selection.assign(g.batch * g.heads * g.words(), 0xdeadbeef);
    spoil();
  }

  void spoil() {
    device.q.assign(c.q.size(), 1e9f);
    device.q8.assign(c.q8.size(), 1);
    device.host_blocks.assign(c.host_blocks.size(), -1);
    device.boundary.assign(c.boundary.size(), 1);
    device.num_blocks.assign(c.num_blocks.size(), -1);
    device_tick[0] = device_tick[1] = -7;
  }

  std::string submit_on(Device& on) {
    on.fake.push([this] {
      device.q = c.q;
      device.q8 = c.q8;
      device.host_blocks = c.host_blocks;
      device.boundary = c.boundary;
    });
    SubmitCall call;
    call.g = c.g;
    call.cache = c.cache();
    call.work = device.work();
    call.cancel = &cancel;
    call.scale = c.scale;
    call.tick = device_tick;
    return enqueue_submit(on.stream, call);
  }

  std::string collect_on(Device& on) {
    on.fake.push([this] { device.num_blocks = c.num_blocks; });
    CollectCall call;
    call.g = c.g;
    call.cache = call.result = c.cache();
    call.flush = device.flush();
    call.tick = device_tick;
    call.out = {r.out.data(),         r.lse.data(),           &r.status,
                r.times,              r.blocks_read.data(),   r.units_scanned.data(),
                r.selection.data()};
    const std::string problem = enqueue_collect(on.stream, call);
    on.fake.push([this] { spoil(); });
    return problem;
  }

  void run_on(Device& on) {
    CHECK_EQ(submit_on(on), "");
    CHECK_EQ(collect_on(on), "");
  }

  Case c;
  Case device;
  int32_t cancel = 0;
  int32_t device_tick[2];
  Result r;
};

Case small_case(uint32_t seed = 0) { return make_case({2, 4, 2, 24, 72, DType::kFloat32}, seed); }

void check_step(const Step& step, const Case& c) {
  CHECK_EQ(step.r.status, 0);
  check_result(step.r, c);
}

// Several steps enqueued before the first can run, and many more behind.
void check_device(Device& on) {
  const Case c = small_case();
  std::vector<std::unique_ptr<Step>> steps;
  on.fake.pause();
  for (int i = 0; i < 12; ++i) {
    steps.push_back(std::make_unique<Step>(small_case(i % 3)));
    steps.back()->run_on(on);
  }
  CHECK_EQ(steps[0]->r.status, -1);
  on.fake.go_on();
  on.fake.synchronize();
  for (int i = 0; i < 12; ++i) check_step(*steps[i], small_case(i % 3));
  for (int i = 0; i < 12; ++i) CHECK(same_bits(steps[i]->r, steps[i % 3]->r));
  CHECK(on.stream.drain(Clock::time_point::max()));
}

void reset_faults() {
  fake_faults().calls_left = -1;
  fake_faults().no_kernels = fake_faults().no_memory_operations = false;
  fake_faults().failed_device = false;
}

}  // namespace

TEST(a_stream_runs_steps_ahead_of_their_data_in_every_mode) {
  runtime().pool.set_threads(3);
  for (const CudaSync sync : {CudaSync::kMemoryOperations, CudaSync::kHostFunctions}) {
    for (const bool no_kernels : {false, true}) {
      fake_faults().no_kernels = no_kernels;
      Device on(sync);
      reset_faults();
      CHECK(on.stream.sync() == sync);
      CHECK_EQ(on.stream.has_copy_kernel(), !no_kernels);
      check_device(on);
    }
  }
}

TEST(a_stream_without_memory_operations_uses_host_functions) {
  fake_faults().no_memory_operations = true;
  Device on;
  reset_faults();
  CHECK(on.stream.sync() == CudaSync::kHostFunctions);
  check_device(on);
}

TEST(generations_of_a_stream_wrap_around) {
  for (const uint32_t first : {0xfffffffdu, 0x7ffffffdu}) {
    Device on;
    on.fake.synchronize();
    on.stream.set_generation(first);
    for (int i = 0; i < 8; ++i) {
      Step step(small_case());
      step.run_on(on);
      on.fake.synchronize();
      check_step(step, small_case());
    }
  }
}

TEST(a_stream_writes_the_flush_and_appends) {
  Device on;
  Step step(small_case());
  step.c.num_blocks = {1, 1};
  step.c.first_block = step.device.first_block = {3, 71};
  Case want = step.c;
  const Result wanted = run(want);
  step.run_on(on);
  on.fake.synchronize();
  CHECK(same_bits(step.r, wanted));
  CHECK(step.c.k == want.k && step.c.v == want.v && step.c.summaries == want.summaries);

  Case appended = small_case();
  appended.num_blocks = {1, 1};
  Case plain = appended;
  CHECK_EQ(append(plain.g, plain.cache(), plain.flush()), uint32_t{kOk});
  int32_t status = -1;
  AppendCall call;
  call.g = appended.g;
  call.cache = call.result = appended.cache();
  call.flush = appended.flush();
  call.status = &status;
  CHECK_EQ(enqueue_append(on.stream, call), "");
  on.fake.synchronize();
  CHECK_EQ(status, 0);
  CHECK(appended.k == plain.k && appended.v == plain.v && appended.summaries == plain.summaries);
}

TEST(a_stream_needs_no_more_memory_however_far_it_runs_ahead) {
  Device on;
  Step step(small_case());
  std::thread late([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    on.fake.go_on();
  });
  on.fake.pause();
  for (int i = 0; i < 600; ++i) step.run_on(on);
  late.join();
  on.fake.synchronize();
  check_step(step, small_case());
  const int64_t bytes = on.stream.staging_bytes();
  CHECK(bytes < (int64_t{8} << 20));
  for (int i = 0; i < 100; ++i) step.run_on(on);
  on.fake.synchronize();
  CHECK_EQ(on.stream.staging_bytes(), bytes);
}

TEST(streams_of_several_programs_do_not_meet) {
  runtime().pool.set_threads(2);
  Device shared;
  std::vector<std::thread> programs;
  for (uint32_t seed = 0; seed < 3; ++seed) {
    programs.emplace_back([seed, &shared] {
      Device own;
      for (int i = 0; i < 10; ++i) {
        Step step(small_case(seed));
        // Two programs that one stream is shared by, too.
        Device& on = i % 2 == 0 ? own : shared;
        step.run_on(on);
        on.fake.synchronize();
        check_step(step, small_case(seed));
      }
    });
  }
  for (std::thread& program : programs) program.join();
}

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
  for (const CudaSync sync : {CudaSync::kMemoryOperations, CudaSync::kHostFunctions}) {
    Device on(sync);
    Step warm(small_case());
    warm.run_on(on);
    on.fake.synchronize();
    const int before = runtime().slots.in_flight();
    for (int calls = 0; calls < 6; ++calls) {
      Step step(small_case());
      fake_faults().calls_left = calls;
      const std::string submitted = step.submit_on(on);
      const std::string collected = step.collect_on(on);
      reset_faults();
      CHECK(!submitted.empty() || !collected.empty() || calls >= 5);
      for (const std::string& problem : {submitted, collected}) {
        CHECK(problem.empty() || problem.find("a fault to order") != std::string::npos);
      }
      on.fake.synchronize();
      // As a program does that fails between submit and collect, before its cache goes.
      CHECK(on.stream.drain(Clock::now() + std::chrono::seconds(20)));
      runtime().slots.drain(&runtime().pool, Clock::time_point::max());
    }
    CHECK(runtime().slots.in_flight() <= before);
    Step last(small_case());
    last.run_on(on);
    on.fake.synchronize();
    check_step(last, small_case());
  }
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

TEST(staging_memory_is_reused_once_the_stream_has_got_to_the_next_exchange) {
  Device on;
  std::string problem;
  Exchange* first = on.stream.acquire(64, &problem);
  CHECK_EQ(on.stream.enqueue(first, {}, [] {}, true, {}), "");
  on.fake.synchronize();
  CHECK(on.stream.drain(Clock::time_point::max()));
  // The stream may still copy its results.
  std::vector<Exchange*> others;
  for (int i = 0; i < 40; ++i) {
    others.push_back(on.stream.acquire(64, &problem));
    CHECK(others.back() != first);
  }
  CHECK_EQ(on.stream.enqueue(others[0], {}, [] {}, true, {}), "");
  on.fake.synchronize();
  CHECK(on.stream.drain(Clock::time_point::max()));
  bool reused = false;
  for (int i = 0; i < 40; ++i) reused |= on.stream.acquire(64, &problem) == first;
  CHECK(reused);
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
