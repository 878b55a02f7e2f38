// The operations on a stream of a driver without a device.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>

#include "cuda_steps.h"
#include "runtime.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

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

// A step that writes a block, and an append.
void check_writes(CudaSync sync) {
  Device on(sync);
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

}  // namespace

TEST(a_stream_runs_steps_ahead_of_their_data_in_every_mode) {
  runtime().pool.set_threads(3);
  for (const CudaSync wanted :
       {CudaSync::kMemoryOperations, CudaSync::kKernels, CudaSync::kHostFunctions}) {
    for (const bool no_kernels : {false, true}) {
      fake_faults().no_kernels = no_kernels;
      Device on(wanted);
      reset_faults();
      const bool instead = no_kernels && wanted == CudaSync::kKernels;
      CHECK(on.stream.sync() == (instead ? CudaSync::kMemoryOperations : wanted));
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
  for (const CudaSync sync : {CudaSync::kMemoryOperations, CudaSync::kKernels}) {
    for (const uint32_t first : {0xfffffffdu, 0x7ffffffdu}) {
      Device on(sync);
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
}

TEST(a_stream_writes_the_flush_and_appends) {
  for (const CudaSync sync : {CudaSync::kMemoryOperations, CudaSync::kKernels}) {
    check_writes(sync);
  }
}

TEST(kernels_call_the_host_with_nothing_to_copy) {
  Device on(CudaSync::kKernels);
  std::string problem;
  std::atomic<int> calls{0};
  for (const bool waits : {false, true}) {
    Exchange* exchange = on.stream.acquire(64, &problem);
    CHECK_EQ(on.stream.enqueue(exchange, {}, [&] { ++calls; }, waits, {}), "");
  }
  on.fake.synchronize();
  CHECK(on.stream.drain(Clock::time_point::max()));
  CHECK_EQ(calls.load(), 2);
}

TEST(large_arrays_are_copied_by_the_driver_in_their_turn) {
  for (const CudaSync sync : {CudaSync::kMemoryOperations, CudaSync::kKernels}) {
    Device on(sync);
    std::string problem;
    // Larger than what the kernel copies.
    std::vector<int32_t> device(200000, 1), result(200000, 0);
    const int64_t bytes = 4 * static_cast<int64_t>(device.size());
    Exchange* exchange = on.stream.acquire(bytes, &problem);
    int32_t* staged = reinterpret_cast<int32_t*>(exchange->staging);
    CudaCopies operands, results;
    operands.add(staged, device.data(), bytes);
    results.add(result.data(), staged, bytes);
    const auto work = [&] {
      for (size_t i = 0; i < device.size(); ++i) staged[i] += static_cast<int32_t>(i);
    };
    CHECK_EQ(on.stream.enqueue(exchange, operands, work, true, results), "");
    on.fake.synchronize();
    for (size_t i = 0; i < device.size(); ++i) {
      CHECK_EQ(result[i], 1 + static_cast<int32_t>(i));
    }
  }
}

TEST(a_stream_needs_no_more_memory_however_far_it_runs_ahead) {
  Device on;
  Step step(small_case());
  std::thread late([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    on.fake.go_on();
  });
  on.fake.pause();
  const int requests = runtime().slots.requests();
  for (int i = 0; i < 600; ++i) step.run_on(on);
  late.join();
  on.fake.synchronize();
  check_step(step, small_case());
  CHECK(runtime().slots.requests() <= std::max(requests, 1));
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

TEST(a_stream_copies_blocks_only_if_some_row_writes_one) {
  Device on(CudaSync::kKernels);
  std::string problem;
  // Three rows of 32 and of 16 bytes, behind what is always copied.
  std::vector<int32_t> number{7}, gate(3), wide(24), narrow(12);
  const std::vector<std::vector<int32_t>> opened = {{0, 0, 0}, {0, 2, 0}, {1, 0, -1}, {1, 1, 1}};
  for (const auto& words : opened) {
    gate = words;
    wide.assign(24, 5);
    narrow.assign(12, 6);
    Exchange* exchange = on.stream.acquire(256, &problem);
    auto* staged = reinterpret_cast<int32_t*>(exchange->staging);
    std::fill_n(staged, 64, -1);
    CudaCopies operands;
    operands.add(staged, number.data(), 4);
    operands.add(staged + 4, gate.data(), 12);
    operands.add_gate(gate.data(), 3);
    operands.add(staged + 8, wide.data(), 96);
    operands.add(staged + 32, narrow.data(), 48);
    std::vector<int32_t> seen;
    const auto work = [&] { seen.assign(staged, staged + 64); };
    CHECK_EQ(on.stream.enqueue(exchange, operands, work, true, {}), "");
    on.fake.synchronize();
    CHECK_EQ(seen[0], 7);
    for (int row = 0; row < 3; ++row) CHECK_EQ(seen[4 + row], words[row]);
    const bool writes = words != opened.front();
    for (int i = 0; i < 24; ++i) CHECK_EQ(seen[8 + i], writes ? 5 : -1);
    for (int i = 0; i < 12; ++i) CHECK_EQ(seen[32 + i], writes ? 6 : -1);
  }
}

TEST(a_flush_behind_a_gate_is_written_where_there_is_one) {
  Device on(CudaSync::kKernels);
  // Slots are reused, so that rows which write nothing find the blocks of earlier steps there.
  for (int i = 0; i < 40; ++i) {
    Step step(small_case(i % 3));
    step.c.num_blocks = {i % 2, i % 3 == 0};
    step.c.first_block = step.device.first_block = {3, 71};
    Case want = step.c;
    const Result wanted = run(want);
    step.run_on(on);
    on.fake.synchronize();
    CHECK(same_bits(step.r, wanted));
    CHECK(step.c.k == want.k && step.c.v == want.v && step.c.summaries == want.summaries);
  }
}

TEST(a_step_that_has_failed_has_no_work_for_the_host) {
  for (const CudaSync sync : {CudaSync::kMemoryOperations, CudaSync::kKernels}) {
    Device on(sync);
    Step step(small_case());
    step.failed = 4;
    step.run_on(on);
    on.fake.synchronize();
    CHECK_EQ(step.r.status, 0);
    for (const float lse : step.r.lse) CHECK(std::isinf(lse) && lse < 0);
    for (const int32_t blocks : step.r.blocks_read) CHECK_EQ(blocks, 0);
  }
}

// Then the host ranks nothing, and what it would rank by stays where it is.
TEST(a_stream_hands_over_a_selection_made_elsewhere) {
  for (const CudaSync sync : {CudaSync::kMemoryOperations, CudaSync::kKernels}) {
    Device on(sync);
    for (int i = 0; i < 3; ++i) {
      Step step(small_case());
      // On the whole of what is to be read.
      std::vector<uint32_t> bitmap(step.c.g.batch * step.c.g.heads * step.c.g.words(), 0xffffffffu);
      step.bitmap = bitmap.data();
      Case want = step.c;
      WorkView work = want.work();
      work.bitmap = bitmap.data();
      int32_t tick[2];
      submit(want.g, work, want.cache(), want.scale, tick);
      const Result wanted = collect_tick(want, tick);
      step.run_on(on);
      on.fake.synchronize();
      CHECK_EQ(step.r.status, 0);
      CHECK(same_bits(step.r, wanted));
      CHECK(std::any_of(step.r.blocks_read.begin(), step.r.blocks_read.end(),
                        [](int32_t blocks) { return blocks > 0; }));
    }
  }
}

// Layers whose arrays are one, as a loop over layers has them: the calls of all are the same, and
// which layer they are for is data.
TEST(a_stream_finds_the_rows_of_a_layer_when_it_gets_there) {
  for (const CudaSync sync :
       {CudaSync::kMemoryOperations, CudaSync::kKernels, CudaSync::kHostFunctions}) {
    Device on(sync);
    Case stack = small_case();
    std::vector<std::unique_ptr<Step>> steps;
    std::vector<Case> want;
    std::vector<Result> wanted;
    const auto append_to = [](auto& all, const auto& one) {
      all.insert(all.end(), one.begin(), one.end());
    };
    for (uint32_t layer = 0; layer < 3; ++layer) {
      steps.push_back(std::make_unique<Step>(small_case(layer)));
      Step& step = *steps.back();
      step.c.num_blocks = {1, layer == 1};
      step.c.first_block = step.device.first_block = {3, 71};
      want.push_back(step.c);
      if (layer > 0) {
        append_to(stack.k.floats, step.c.k.floats);
        append_to(stack.v.floats, step.c.v.floats);
        append_to(stack.summaries, step.c.summaries);
      }
    }
    for (Case& c : want) wanted.push_back(run(c));
    const int64_t batch = stack.g.batch;
    stack.g.batch *= 3;
    on.fake.pause();
    // What lies on the device is nothing the host may look at.
    on.fake.before_signal = [&] {
      for (const auto& step : steps) step->device_row = 0x7fffffff;
    };
    for (const int layer : {2, 0, 1}) {
      steps[layer]->stack = &stack;
      steps[layer]->first_row = static_cast<int32_t>(batch * layer);
      steps[layer]->run_on(on);
    }
    on.fake.go_on();
    on.fake.synchronize();
    const auto same_part = [](const auto& all, const auto& one, size_t part) {
      return std::equal(one.begin(), one.end(), all.begin() + part * one.size());
    };
    for (size_t layer = 0; layer < 3; ++layer) {
      CHECK_EQ(steps[layer]->r.status, 0);
      CHECK(same_bits(steps[layer]->r, wanted[layer]));
      CHECK(same_part(stack.k.floats, want[layer].k.floats, layer));
      CHECK(same_part(stack.v.floats, want[layer].v.floats, layer));
      CHECK(same_part(stack.summaries, want[layer].summaries, layer));
    }
    on.fake.before_signal = nullptr;
    // Rows that are not there.
    const Case before = stack;
    for (const int64_t first : {int64_t{-1}, 2 * batch + 1}) {
      Step step(small_case());
      step.c.num_blocks = {1, 1};
      step.stack = &stack;
      step.first_row = static_cast<int32_t>(first);
      step.run_on(on);
      on.fake.synchronize();
      CHECK(step.r.status & kInvalid);
      CHECK(is_empty(step.r));
      int32_t status = -1;
      AppendCall call;
      call.g = step.c.g;
      step.in_stack(call);
      call.result = call.cache;
      call.flush = step.c.flush();
      call.status = &status;
      const int32_t row = static_cast<int32_t>(first);
      call.rows.first = &row;
      CHECK_EQ(enqueue_append(on.stream, call), "");
      on.fake.synchronize();
      CHECK_EQ(status, static_cast<int32_t>(kInvalid));
    }
    CHECK(stack.k == before.k && stack.v == before.v && stack.summaries == before.summaries);
    CHECK(on.stream.drain(Clock::time_point::max()));
  }
}
