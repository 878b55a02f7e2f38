#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "check.h"
#include "nodes.h"

using namespace fluxion;

namespace {

// The kernel's memory policy at an address, below 0 if it does not tell.
int policy_at(const uint8_t* address) {
  constexpr unsigned long kByAddress = 2;
  int mode = -1;
  return syscall(SYS_get_mempolicy, &mode, nullptr, 0, address, kByAddress) == 0 ? mode : -1;
}

}  // namespace

TEST(whole_pages_of_an_array_are_laid_on_the_nodes_in_turn) {
  constexpr int kInterleave = 3;
  const int64_t page = sysconf(_SC_PAGESIZE);
  void* mapped = mmap(nullptr, 8 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  uint8_t* pages = static_cast<uint8_t*>(mapped);
  std::fill_n(pages, 4 * page, uint8_t{7});
  if (policy_at(pages) >= 0) {
    CHECK(interleave(pages + 1, 6 * page, memory_nodes()));
    for (int i = 0; i < 8; ++i) {
      CHECK_EQ(policy_at(pages + i * page) == kInterleave, i >= 1 && i < 6);
    }
    CHECK_EQ(std::count(pages, pages + 4 * page, uint8_t{7}), 4 * page);
  }
  CHECK(!interleave(pages + 1, page, memory_nodes()));
  CHECK(!interleave(pages, page, {}));
  munmap(mapped, 8 * page);
}
