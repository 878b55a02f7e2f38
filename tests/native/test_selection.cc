#include <algorithm>
#include <climits>
#include <numeric>

#include "cases.h"
#include "check.h"
#include "dispatch.h"
#include "guarded.h"
#include "selection.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

std::vector<uint32_t> plainly(const std::vector<int32_t>& scores, int64_t wanted, int64_t ratio,
                              int64_t host_blocks) {
  std::vector<int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  std::vector<uint32_t> words((host_blocks + 31) / 32, 0);
  wanted = std::clamp<int64_t>(wanted, 0, scores.size());
  for (int64_t i = 0; i < wanted; ++i) {
    for (int64_t block = order[i] * ratio; block < (order[i] + 1) * ratio; ++block) {
      if (block < host_blocks) words[block / 32] |= uint32_t{1} << (block % 32);
    }
  }
  return words;
}

// Every variant, with guarded arrays, against the plain order.
void compare(const std::vector<int32_t>& scores, int64_t ratio, int64_t host_blocks) {
  const int64_t units = static_cast<int64_t>(scores.size());
  const auto guarded = guard(scores);
  guarded->freeze();
  for (const int64_t wanted : {int64_t{-5}, int64_t{0}, int64_t{1}, units / 20, units / 3,
                               units / 2, units - 1, units, units + 7}) {
    const std::vector<uint32_t> want = plainly(scores, wanted, ratio, host_blocks);
    for (const char* name : {"scalar", "avx2", "avx512", "avx512_vnni"}) {
      const KernelTable* table = find_kernels(name);
      if (table == nullptr) continue;
      std::vector<int32_t> scratch;
      std::vector<uint32_t> words(want.size(), 0x5a5a5a5a);
      select_top(*table, guarded->as<int32_t>(), units, wanted, ratio, host_blocks,
                 wanted % 2 == 0 ? nullptr : guarded->as<int32_t>(), words.data(), &scratch);
      CHECK(words == want);
    }
  }
}

}  // namespace

TEST(selection_of_random_scores) {
  std::mt19937 rng(1);
  for (const int64_t host_blocks : {1, 7, 31, 32, 33, 64, 257, 1000}) {
    for (const int64_t ratio : {1, 2, 4, 8}) {
      const int64_t units = (host_blocks + ratio - 1) / ratio;
      compare(integers<int32_t>(rng, units, -(1 << 23), 1 << 23), ratio, host_blocks);
      compare(integers<int32_t>(rng, units, -3, 3), ratio, host_blocks);
      compare(integers<int32_t>(rng, units, INT_MIN, INT_MAX), ratio, host_blocks);
    }
  }
}

TEST(selection_of_equal_scores_takes_the_lowest_ids) {
  for (const int32_t score : {0, -1, INT_MIN, INT_MAX}) {
    compare(std::vector<int32_t>(100, score), 1, 100);
    compare(std::vector<int32_t>(13, score), 8, 100);
  }
}

TEST(selection_with_one_outlier) {
  std::vector<int32_t> scores(300, 5);
  scores[200] = INT_MAX;
  scores[100] = INT_MIN;
  compare(scores, 1, 300);
}

TEST(selection_of_many_units_whatever_a_sample_says) {
  std::mt19937 rng(2);
  for (const int64_t units : {512, 513, 1024, 2049, 3001, 8192}) {
    compare(integers<int32_t>(rng, units, -(1 << 21), 1 << 21), 1, units);
    compare(integers<int32_t>(rng, units, INT_MIN, INT_MAX), 2, 2 * units - 1);
    compare(integers<int32_t>(rng, units, 0, 1), 8, 8 * units - 5);
    compare(std::vector<int32_t>(units, INT_MIN), 4, 4 * units);
    // What the samples say is far above all others, or far below.
    std::vector<int32_t> few(units, 0), most(units, INT_MAX);
    for (int64_t i = 0; i < 128; ++i) {
      const int64_t sampled = (i * 2654435769u & 0xffffffffu) * units >> 32;
      few[sampled] = static_cast<int32_t>(i) + 1;
      most[sampled] = static_cast<int32_t>(i);
    }
    compare(few, 1, units);
    compare(most, 1, units);
  }
}

TEST(selection_when_what_was_kept_misleads_the_second_sample) {
  const int64_t units = 8192;
  std::vector<int32_t> scores(units, -1000);
  const auto sampled = [](int64_t i, int64_t count) {
    return static_cast<int64_t>((i * 2654435769u & 0xffffffffu) * count >> 32);
  };
  // A twentieth is wanted. The first sample keeps about 2000, all that are positive.
  for (int64_t u = 0; u < 2000; ++u) scores[4 * u + 1] = 1000 + static_cast<int32_t>(u);
  for (int64_t i = 0; i < 128; ++i) scores[sampled(i, units)] = i < 15 ? 10 : -1000;
  std::vector<int64_t> kept;
  for (int64_t u = 0; u < units; ++u) {
    if (scores[u] > 0) kept.push_back(u);
  }
  const int64_t count = static_cast<int64_t>(kept.size());
  for (int64_t i = 0; i < 128; ++i) {
    scores[kept[sampled(i, count)]] = (1 << 20) + static_cast<int32_t>(i);
  }
  compare(scores, 1, units);
}
