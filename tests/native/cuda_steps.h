// A stream without a device, and a step on it, for the tests of the operations there.

#ifndef FLUXION_TESTS_CUDA_STEPS_H_
#define FLUXION_TESTS_CUDA_STEPS_H_

#include <limits>
#include <string>

#include "check.h"
#include "cuda_operations.h"
#include "fake_cuda.h"
#include "requests.h"

namespace fluxion_tests {

inline const CudaDriver& driver() {
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
    device_row = 0x7fffffff;
  }

  // Other arrays in the place of the case's own, which may be those of several layers.
  template <typename Call>
  void in_stack(Call& call) {
    if (instead != nullptr) call.cache = *instead;
    if (stack == nullptr) return;
    call.cache = stack->cache();
    call.rows = {stack->g.batch, &device_row};
  }

  std::string submit_on(Device& on) {
    on.fake.push([this] {
      device.q = c.q;
      device.q8 = c.q8;
      device.host_blocks = c.host_blocks;
      device.boundary = c.boundary;
      device_row = first_row;
    });
    SubmitCall call;
    call.g = c.g;
    call.cache = c.cache();
    in_stack(call);
    call.work = device.work();
    call.work.status = &failed;
    call.work.bitmap = bitmap;
    call.cancel = &cancel;
    call.scale = c.scale;
    call.tick = device_tick;
    const std::string problem = enqueue_submit(on.stream, call);
    // The stream goes on, so the host must not look there any more.
    on.fake.push([this] { device_row = 0x7fffffff; });
    return problem;
  }

  std::string collect_on(Device& on) {
    on.fake.push([this] {
      device.num_blocks = c.num_blocks;
      device_row = first_row;
    });
    CollectCall call;
    call.g = c.g;
    call.cache = c.cache();
    in_stack(call);
    call.result = call.cache;
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
  const CacheView* instead = nullptr;
  Case* stack = nullptr;
  int32_t first_row = 0;
  int32_t device_row = 0;
  int32_t cancel = 0;
  int32_t failed = 0;
  const uint32_t* bitmap = nullptr;
  int32_t device_tick[2];
  Result r;
};

inline Case small_case(uint32_t seed = 0) { return make_case({2, 4, 2, 24, 72, DType::kFloat32}, seed); }

inline void check_step(const Step& step, const Case& c) {
  CHECK_EQ(step.r.status, 0);
  check_result(step.r, c);
}

inline void reset_faults() {
  fake_faults().calls_left = -1;
  fake_faults().no_kernels = fake_faults().no_memory_operations = false;
  fake_faults().failed_device = false;
}

}  // namespace fluxion_tests

#endif  // FLUXION_TESTS_CUDA_STEPS_H_
