#include "cpus.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fluxion {
namespace {

constexpr long kMostCpus = 1 << 16;  // Keeps a mistyped range from filling the memory.

// Reads a decimal number and moves past it; below 0 if there is none.
long read_number(const char** text) {
  if (**text < '0' || **text > '9') return -1;
  char* end = nullptr;
  const long number = std::strtol(*text, &end, 10);
  *text = end;
  return number < kMostCpus ? number : -1;
}

}  // namespace

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
#endif
  const int count = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  for (int cpu = 0; cpus.empty() && cpu < count; ++cpu) cpus.push_back(cpu);
  return cpus;
}

std::vector<int> parse_cpus(const char* text) {
  std::vector<int> cpus;
  for (bool more = true; more;) {
    const long first = read_number(&text);
    const long last = *text == '-' ? read_number(&++text) : first;
    if (first < 0 || last < first) return {};
    for (long cpu = first; cpu <= last; ++cpu) cpus.push_back(static_cast<int>(cpu));
    more = *text == ',';
    if (more) ++text;
  }
  if (*text != '\0') return {};
  std::sort(cpus.begin(), cpus.end());
  cpus.erase(std::unique(cpus.begin(), cpus.end()), cpus.end());
  return cpus;
}

std::string format_cpus(const std::vector<int>& cpus) {
  std::string text;
  for (size_t i = 0; i < cpus.size();) {
    size_t last = i;
    while (last + 1 < cpus.size() && cpus[last + 1] == cpus[last] + 1) ++last;
    text += (text.empty() ? "" : ",") + std::to_string(cpus[i]);
    if (last > i) text += "-" + std::to_string(cpus[last]);
    i = last + 1;
  }
  return text;
}

std::vector<int> wanted_cpus() {
  const char* text = std::getenv("FLUXION_CPUS");
  if (text == nullptr || *text == '\0') return {};
  const std::vector<int> wanted = parse_cpus(text);
  const std::vector<int> allowed = allowed_cpus();
  const bool possible =
      std::includes(allowed.begin(), allowed.end(), wanted.begin(), wanted.end());
  return possible ? wanted : std::vector<int>{};
}

long cpu_quota(const char* folder, const char* membership) {
  long quota = std::numeric_limits<long>::max();
  const auto apply = [&](double limit, double period) {
    if (limit <= 0 || period <= 0) return;
    quota = std::min(quota, std::max(1L, static_cast<long>(std::ceil(limit / period))));
  };
  std::ifstream groups(membership);
  std::string line;
  std::string own;
  while (std::getline(groups, line)) {
    if (line.rfind("0::", 0) == 0) own = line.substr(3);
  }
  // A group above may have a tighter limit.
  while (true) {
    std::ifstream file(folder + own + "/cpu.max");
    double limit = 0;
    double period = 0;
    if (file >> limit >> period) apply(limit, period);
    if (own.empty()) break;
    own.erase(own.rfind('/'));
  }
  // The first version of control groups.
  double limit = 0;
  double period = 0;
  std::ifstream(folder + std::string("/cpu/cpu.cfs_quota_us")) >> limit;
  std::ifstream(folder + std::string("/cpu/cpu.cfs_period_us")) >> period;
  apply(limit, period);
  return quota;
}

void run_on(const std::vector<int>& cpus) {
#if defined(__linux__)
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) {
    if (cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
  }
  sched_setaffinity(0, sizeof(set), &set);
#else
  (void)cpus;
#endif
}

}  // namespace fluxion
