#include "selection.h"

#include <algorithm>
#include <functional>

namespace fluxion {
namespace {

constexpr int kBucketBits = 11;  // 2048 counters stay in L1.
constexpr int64_t kBuckets = int64_t{1} << kBucketBits;

struct Cut {
  int32_t threshold;  // The score of the last selected unit.
  int64_t ties;       // How many units of exactly this score are selected.
};

// The wanted-th largest of the scores, 0 < wanted < units, in two passes: a histogram over the
// range of the scores finds the bucket, and only its members are ranked.
Cut find_cut(const int32_t* scores, int64_t units, int64_t wanted, SelectionScratch& scratch) {
  int32_t low = scores[0];
  int32_t high = scores[0];
  for (int64_t u = 1; u < units; ++u) {
    low = std::min(low, scores[u]);
    high = std::max(high, scores[u]);
  }
  const int64_t range = static_cast<int64_t>(high) - low;
  int shift = 0;
  while (range >> shift >= kBuckets) ++shift;
  scratch.histogram.assign(kBuckets, 0);
  int32_t* histogram = scratch.histogram.data();
  for (int64_t u = 0; u < units; ++u) {
    ++histogram[(static_cast<int64_t>(scores[u]) - low) >> shift];
  }
  int64_t bucket = kBuckets - 1;
  int64_t left = wanted;
  while (left > histogram[bucket]) left -= histogram[bucket--];
  scratch.candidates.clear();
  for (int64_t u = 0; u < units; ++u) {
    if ((static_cast<int64_t>(scores[u]) - low) >> shift == bucket) {
      scratch.candidates.push_back(scores[u]);
    }
  }
  auto nth = scratch.candidates.begin() + (left - 1);
  std::nth_element(scratch.candidates.begin(), nth, scratch.candidates.end(),
                   std::greater<int32_t>());
  const int64_t above = std::count_if(scratch.candidates.begin(), scratch.candidates.end(),
                                      [cut = *nth](int32_t s) { return s > cut; });
  return {*nth, left - above};
}

void clear_beyond(int64_t host_blocks, uint32_t* words) {
  if (host_blocks % 32 != 0) words[host_blocks / 32] &= (uint32_t{1} << (host_blocks % 32)) - 1;
}

}  // namespace

void select_top(const int32_t* scores, int64_t units, int64_t wanted, int64_t ratio,
                int64_t host_blocks, uint32_t* words, SelectionScratch& scratch) {
  if (units <= 0 || wanted <= 0) return;
  // `ratio` divides 32, so a unit never straddles two words.
  if (wanted >= units) {
    std::fill_n(words, (host_blocks + 31) / 32, ~uint32_t{0});
    clear_beyond(host_blocks, words);
    return;
  }
  const uint32_t unit_mask = (uint32_t{1} << ratio) - 1;
  Cut cut = find_cut(scores, units, wanted, scratch);
  for (int64_t u = 0; u < units; ++u) {
    const bool tied = scores[u] == cut.threshold && cut.ties > 0;
    if (scores[u] > cut.threshold || tied) {
      cut.ties -= tied;
      words[u * ratio / 32] |= unit_mask << (u * ratio % 32);
    }
  }
  clear_beyond(host_blocks, words);
}

}  // namespace fluxion
