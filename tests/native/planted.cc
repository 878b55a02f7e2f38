// Defects on purpose, one for each argument, to show that the sanitizers would report them.
//
//   bounds      the library is given queries that are one number short
//   overflow    arithmetic that the language leaves undefined
//   race        two parts of a job write the same variable

#include <cstdio>
#include <cstring>
#include <thread>

#include "cases.h"
#include "operations.h"
#include "pool.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

void bounds() {
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  select_all(&c);
  const std::vector<float> short_q(c.q.begin(), c.q.end() - 1);
  WorkView work = c.work();
  work.q = short_q.data();
  int32_t tick[2];
  submit(c.g, work, c.cache(), c.scale, tick);
}

void overflow(int32_t from) {
  const int32_t sum = from + 1;
  std::printf("%d\n", sum);
}

// Each part waits for the other to have begun, so that two threads run them.
class Racing : public Job {
 public:
  void run(int64_t first, int64_t last) noexcept override {
    begun += last - first;
    while (begun < 2) std::this_thread::yield();
    for (int i = 0; i < 1000; ++i) ++count;
    left -= last - first;
  }
  std::atomic<int64_t> begun{0};
  std::atomic<int64_t> left{2};
  int64_t count = 0;
};

void race() {
  Pool pool(2);
  Racing job;
  pool.push(&job, 2);
  pool.help(job.left, Clock::time_point::max());
}

}  // namespace

int main(int argc, char** argv) {
  const char* wanted = argc > 1 ? argv[1] : "";
  if (std::strcmp(wanted, "bounds") == 0) bounds();
  if (std::strcmp(wanted, "overflow") == 0) overflow(INT32_MAX - 1 + argc / 2);
  if (std::strcmp(wanted, "race") == 0) race();
  return 0;
}
