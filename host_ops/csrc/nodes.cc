#include "nodes.h"

#include <algorithm>
#include <fstream>
#include <string>

#include "cpus.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fluxion {

std::vector<int> memory_nodes() {
  std::string text;
  std::ifstream("/sys/devices/system/node/has_memory") >> text;
  const std::vector<int> nodes = parse_cpus(text.c_str());
  return nodes.empty() ? std::vector<int>{0} : nodes;
}

bool interleave(void* address, int64_t bytes, const std::vector<int>& nodes) {
#if defined(__linux__) && defined(SYS_mbind)
  // Values of <linux/mempolicy.h>, which is not installed everywhere.
  constexpr long kInterleave = 3;
  constexpr unsigned long kMove = 2;
  constexpr int kBits = 8 * sizeof(unsigned long);
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / page * page;
  if (last <= first || nodes.empty()) return false;
  const int highest = *std::max_element(nodes.begin(), nodes.end());
  std::vector<unsigned long> mask(highest / kBits + 1);
  for (const int node : nodes) mask[node / kBits] |= 1ul << node % kBits;
  // The call counts one bit more than it reads.
  return syscall(SYS_mbind, first, last - first, kInterleave, mask.data(),
                 mask.size() * kBits + 1, kMove) == 0;
#else
  (void)address, (void)bytes, (void)nodes;
  return false;
#endif
}

}  // namespace fluxion
