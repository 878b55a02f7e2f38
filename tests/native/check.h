// A test harness in a page: tests register themselves, checks print what they compared.

#ifndef FLUXION_TESTS_CHECK_H_
#define FLUXION_TESTS_CHECK_H_

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace fluxion_tests {

struct Registry {
  std::vector<std::pair<std::string, std::function<void()>>> tests;
  int failures = 0;
};

inline Registry& registry() {
  static Registry instance;
  return instance;
}

inline bool add(const char* name, std::function<void()> body) {
  registry().tests.emplace_back(name, std::move(body));
  return true;
}

template <typename A, typename B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream message;
  message << file << ":" << line << ": " << text << ": got " << a << ", expected " << b;
  std::fprintf(stderr, "%s\n", message.str().c_str());
  ++registry().failures;
}

// Within `tolerance`, absolute and relative; NaN equals NaN, infinities equal themselves.
inline void check_close(double a, double b, double tolerance, const char* text, const char* file,
                        int line) {
  if (std::isnan(a) && std::isnan(b)) return;
  if (a == b || std::fabs(a - b) <= tolerance * (1.0 + std::fabs(b))) return;
  std::fprintf(stderr, "%s:%d: %s: got %.9g, expected %.9g\n", file, line, text, a, b);
  ++registry().failures;
}

}  // namespace fluxion_tests

#define TEST(name)                                                                       \
  static void test_##name();                                                             \
  static const bool added_##name = fluxion_tests::add(#name, test_##name);               \
  static void test_##name()

#define CHECK_EQ(a, b) fluxion_tests::check_equal((a), (b), #a, __FILE__, __LINE__)
#define CHECK(a) fluxion_tests::check_equal(static_cast<bool>(a), true, #a, __FILE__, __LINE__)
#define CHECK_CLOSE(a, b, tolerance) \
  fluxion_tests::check_close((a), (b), (tolerance), #a, __FILE__, __LINE__)

#endif  // FLUXION_TESTS_CHECK_H_
