#include "selection.h"

#include <algorithm>

namespace fluxion {

void select_top(const KernelTable& table, const int32_t* scores, int64_t units, int64_t wanted,
                int64_t ratio, int64_t host_blocks, const int32_t* next, uint32_t* words,
                std::vector<int32_t>* scratch) {
  const int64_t count = (host_blocks + 31) / 32;
  if (wanted <= 0) {
    std::fill_n(words, count, uint32_t{0});
    return;
  }
  // `ratio` divides 32, so a unit never straddles two words.
  if (wanted >= units) {
    std::fill_n(words, count, ~uint32_t{0});
  } else {
    const size_t room = static_cast<size_t>(units + kSelectPadding);
    if (scratch->size() < room) scratch->resize(room);
    table.select({scores, units, wanted, ratio, next, scratch->data(), words});
  }
  if (host_blocks % 32 != 0) words[host_blocks / 32] &= (uint32_t{1} << (host_blocks % 32)) - 1;
}

}  // namespace fluxion
