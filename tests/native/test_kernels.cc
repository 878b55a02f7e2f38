// Every instruction set of this CPU against double precision.

#include "cases.h"
#include "check.h"
#include "dispatch.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

const char* const kVariants[] = {"scalar", "avx2", "avx512", "avx512_vnni"};

struct Chunk {
  std::vector<float> m, l, acc;
};

Chunk run_chunk(const KernelTable& table, Case& c, const std::vector<int32_t>& blocks,
                const std::vector<uint64_t>& masks) {
  const int64_t group = c.g.group();
  Chunk chunk{std::vector<float>(group), std::vector<float>(group),
              std::vector<float>(group * c.g.head_dim)};
  std::vector<float> scratch(group * blocks.size() * kBlockTokens,
                             std::numeric_limits<float>::quiet_NaN());
  AttendArgs args;
  args.k = c.k.data();
  args.v = c.v.data();
  args.q = c.q.data();
  args.blocks = blocks.data();
  args.head_masks = masks.data();
  args.count = static_cast<int32_t>(blocks.size());
  args.group = static_cast<int32_t>(group);
  args.head_dim = static_cast<int32_t>(c.g.head_dim);
  args.scale = c.scale;
  args.next = blocks.back();
  args.scratch = scratch.data();
  args.m = chunk.m.data();
  args.l = chunk.l.data();
  args.acc = chunk.acc.data();
  table.attend[static_cast<int>(c.g.dtype)](args);
  return chunk;
}

void check_chunk(const Chunk& chunk, const Case& c, const std::vector<int32_t>& blocks,
                 const std::vector<uint64_t>& masks) {
  for (int64_t h = 0; h < c.g.group(); ++h) {
    std::set<int32_t> mine;
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (masks[i] >> h & 1) mine.insert(blocks[i]);
    }
    const State want = attend_plainly(c, 0, h, mine);
    if (mine.empty()) {
      CHECK_EQ(chunk.m[h], -std::numeric_limits<float>::infinity());
      CHECK_EQ(chunk.l[h], 0.0f);
    } else {
      CHECK_CLOSE(chunk.m[h] + std::log(chunk.l[h]), want.lse, 2e-6);
    }
    for (int64_t i = 0; i < c.g.head_dim; ++i) {
      const float acc = chunk.acc[h * c.g.head_dim + i];
      CHECK_CLOSE(mine.empty() ? acc : acc / chunk.l[h], want.out[i], 2e-6);
    }
  }
}

Geometry one_task(int64_t group, int64_t head_dim, DType dtype) {
  return {1, group, 1, head_dim, 24, dtype};
}

}  // namespace

TEST(attention_of_every_variant_head_size_group_and_dtype) {
  std::mt19937 rng(3);
  for (const char* variant : kVariants) {
    const KernelTable* table = find_kernels(variant);
    if (table == nullptr) continue;
    for (const int64_t head_dim : {8, 16, 24, 40, 64, 72, 96, 128, 136, 256}) {
      for (const int64_t group : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 64}) {
        for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
          // Beyond two tiles of heads nothing new happens; once each, with the usual type.
          if (group > 8 && group < 64 && (dtype != DType::kBFloat16 || head_dim < 64)) continue;
          Case c = make_case(one_task(group, head_dim, dtype), rng());
          const std::vector<int32_t> blocks = {0, 3, 4, 11, 23};
          const uint64_t all = group == 64 ? ~uint64_t{0} : (uint64_t{1} << group) - 1;
          std::vector<uint64_t> masks;
          for (size_t i = 0; i < blocks.size(); ++i) {
            masks.push_back(((static_cast<uint64_t>(rng()) << 32 | rng()) & all) | 1);
          }
          masks[1] = all;
          check_chunk(run_chunk(*table, c, blocks, masks), c, blocks, masks);
        }
      }
    }
  }
}

TEST(every_float16_is_read_as_what_it_is) {
  for (const char* variant : kVariants) {
    const KernelTable* table = find_kernels(variant);
    if (table == nullptr) continue;
    // Of a whole vector, and of half a one.
    for (const int64_t head_dim : {256, 8}) {
      Case c = make_case(one_task(1, head_dim, DType::kFloat16));
      // All tokens weigh 1, and the values of all but one are zero.
      c.q.assign(c.q.size(), 0.0f);
      c.v.assign(DType::kFloat16, std::vector<float>(c.v.halves.size(), 0.0f));
      for (int64_t first = 0; first < 65536; first += head_dim) {
        for (int64_t i = 0; i < head_dim; ++i) {
          c.v.halves[i] = static_cast<uint16_t>(first + i);
        }
        const Chunk chunk = run_chunk(*table, c, {0}, {1});
        for (int64_t i = 0; i < head_dim; ++i) {
          const float want = from_float16(c.v.halves[i]);
          CHECK(std::isnan(want) ? std::isnan(chunk.acc[i]) : chunk.acc[i] == want);
        }
      }
    }
  }
}

TEST(a_head_without_blocks_is_empty) {
  for (const char* variant : kVariants) {
    const KernelTable* table = find_kernels(variant);
    if (table == nullptr) continue;
    Case c = make_case(one_task(3, 64, DType::kFloat32));
    const std::vector<uint64_t> masks = {0b101, 0b001};
    check_chunk(run_chunk(*table, c, {1, 2}, masks), c, {1, 2}, masks);
  }
}

TEST(large_scores_neither_overflow_nor_lose_the_winner) {
  for (const char* variant : kVariants) {
    const KernelTable* table = find_kernels(variant);
    if (table == nullptr) continue;
    Case c = make_case(one_task(2, 64, DType::kFloat32));
    for (float& x : c.q) x *= 1e4f;
    const std::vector<uint64_t> masks = {3, 3};
    const Chunk chunk = run_chunk(*table, c, {5, 6}, masks);
    for (int64_t h = 0; h < 2; ++h) {
      const State want = attend_plainly(c, 0, h, {5, 6});
      CHECK_CLOSE(chunk.m[h] + std::log(chunk.l[h]), want.lse, 2e-6);
      for (int64_t i = 0; i < 64; ++i) {
        CHECK_CLOSE(chunk.acc[h * 64 + i] / chunk.l[h], want.out[i], 1e-2);
      }
    }
  }
}

TEST(what_is_not_finite_reaches_only_the_heads_that_selected_it) {
  const float poison[] = {std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity()};
  for (const char* variant : kVariants) {
    const KernelTable* table = find_kernels(variant);
    if (table == nullptr) continue;
    for (const float bad : poison) {
      for (const bool in_keys : {true, false}) {
        const DType dtype = std::isnan(bad) ? DType::kBFloat16 : DType::kFloat16;
        Case c = make_case(one_task(4, 72, dtype));
        (in_keys ? c.k : c.v).set((7 * kBlockTokens + 9) * 72 + 70, bad);
        const std::vector<int32_t> blocks = {6, 7, 8};
        const std::vector<uint64_t> masks = {0b1111, 0b0100, 0b1011};
        const Chunk chunk = run_chunk(*table, c, blocks, masks);
        for (int64_t h = 0; h < 4; ++h) {
          bool finite = std::isfinite(chunk.l[h]);
          for (int64_t i = 0; i < 72; ++i) finite &= std::isfinite(chunk.acc[h * 72 + i]);
          // An infinite key may also score -inf, and then weighs nothing.
          if (h != 2 || !in_keys || std::isnan(bad)) CHECK_EQ(finite, h != 2);
        }
      }
    }
  }
}
