// A fixed set of random programs for fuzz_arguments.cc.

#include "cases.h"
#include "check.h"
#include "runtime.h"

using namespace fluxion;
using namespace fluxion_tests;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

TEST(fuzzed_arguments_are_served_or_refused) {
  for (const int threads : {1, 3}) {
    runtime().pool.set_threads(threads);
    for (uint32_t seed = 0; seed < 400; ++seed) {
      std::mt19937 rng(seed);
      const auto bytes = integers<uint8_t>(rng, static_cast<int64_t>(rng() % 400), 0, 255);
      LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
  }
  CHECK_EQ(runtime().slots.in_flight(), 0);
}
