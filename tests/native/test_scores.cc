// Bound scores of every instruction set of this CPU against the plain sum.

#include "cases.h"
#include "check.h"
#include "dispatch.h"
#include "guarded.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

int32_t score_plainly(const int8_t* q8, const int8_t* row, int64_t head_dim) {
  int32_t sum = 0;
  for (int64_t i = 0; i < head_dim; ++i) {
    // Equal to the maximum of both products wherever lo <= hi.
    sum += q8[i] * row[q8[i] > 0 ? head_dim + i : i];
  }
  return sum;
}

void compare(const std::vector<int8_t>& q8, const std::vector<int8_t>& rows, int64_t head_dim) {
  const int64_t group = static_cast<int64_t>(q8.size()) / head_dim;
  const int64_t count = static_cast<int64_t>(rows.size()) / (2 * head_dim);
  const int64_t stride = count + 3;
  std::vector<int32_t> want(group * stride, 12345);
  for (int64_t h = 0; h < group; ++h) {
    for (int64_t r = 0; r < count; ++r) {
      want[h * stride + r] =
          score_plainly(q8.data() + h * head_dim, rows.data() + r * 2 * head_dim, head_dim);
    }
  }
  const auto queries = guard(q8);
  const auto summaries = guard(rows);
  queries->freeze();
  summaries->freeze();
  for (const char* name : {"scalar", "avx2", "avx512", "avx512_vnni"}) {
    const KernelTable* table = find_kernels(name);
    if (table == nullptr) continue;
    const auto scratch = guard(std::vector<uint8_t>(group * 2 * head_dim));
    const auto scores = guard(std::vector<int32_t>(group * stride, 12345));
    const ScoreArgs args = {queries->as<int8_t>(),
                            summaries->as<int8_t>(),
                            count,
                            static_cast<int32_t>(group),
                            static_cast<int32_t>(head_dim),
                            scratch->as<uint8_t>(),
                            scores->as<int32_t>(),
                            stride};
    table->score(args);
    CHECK(std::equal(want.begin(), want.end(), scores->as<int32_t>()));
    std::vector<int32_t> folded = want;
    for (int64_t h = 1; h < group; ++h) {
      for (int64_t r = 0; r < count; ++r) {
        folded[r] = std::max(folded[r], want[h * stride + r]);
      }
    }
    table->fold_heads(args);
    CHECK(std::equal(folded.begin(), folded.end(), scores->as<int32_t>()));
    CHECK(scratch->intact() && scores->intact());
  }
}

}  // namespace

TEST(scores_of_every_variant_head_size_and_group) {
  std::printf("variants: %s\n", variant_names());
  std::mt19937 rng(4);
  for (const int64_t head_dim : {8, 16, 24, 40, 64, 72, 96, 128, 136, 192, 256}) {
    for (int64_t group = 1; group <= 16; ++group) {
      // -128 too: the format forbids it, but it must not overflow an intermediate.
      const auto q8 = integers<int8_t>(rng, group * head_dim, -128, 127);
      compare(q8, integers<int8_t>(rng, 71 * 2 * head_dim, -128, 127), head_dim);
    }
  }
}

TEST(scores_of_few_rows) {
  std::mt19937 rng(5);
  for (const int64_t count : {0, 1, 2, 3, 4, 5, 31, 32, 33}) {
    const auto q8 = integers<int8_t>(rng, 5 * 96, -127, 127);
    compare(q8, integers<int8_t>(rng, count * 2 * 96, -127, 127), 96);
  }
}

TEST(scores_of_extreme_rows_neither_wrap_nor_saturate) {
  for (const int64_t head_dim : {72, 256}) {
    for (const int q : {-128, -127, -1, 0, 127}) {
      for (const int low : {-128, -127, 0, 127}) {
        for (const int high : {-128, 0, 127}) {
          std::vector<int8_t> rows;
          for (int r = 0; r < 5; ++r) {
            rows.insert(rows.end(), head_dim, static_cast<int8_t>(low));
            rows.insert(rows.end(), head_dim, static_cast<int8_t>(high));
          }
          compare(std::vector<int8_t>(3 * head_dim, static_cast<int8_t>(q)), rows, head_dim);
        }
      }
    }
  }
}
