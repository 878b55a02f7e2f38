// Runs every test, or those whose name contains one of the arguments; fails if any check failed.

#include "check.h"
#include "runtime.h"

int main(int argc, char** argv) {
  auto& registry = fluxion_tests::registry();
  int run = 0;
  for (const auto& [name, body] : registry.tests) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= name.find(argv[i]) != std::string::npos;
    if (!wanted) continue;
    const int before = registry.failures;
    // Or a test would run with the threads of the one before, and take many times longer with more
    // of them than there are processors.
    fluxion::runtime().pool.set_threads(2);
    body();
    ++run;
    std::printf("%s %s\n", registry.failures == before ? "ok  " : "FAIL", name.c_str());
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed checks\n", run, registry.failures);
  return run == 0 || registry.failures > 0;
}
