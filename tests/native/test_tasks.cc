#include "tasks.h"

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
