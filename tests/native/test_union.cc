#include "cases.h"
#include "check.h"
#include "dispatch.h"
#include "guarded.h"
#include "kernels.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

struct Listed {
  std::vector<int32_t> blocks;
  std::vector<uint64_t> head_masks;
};

// Rows [group, words] as bits, one block and one head after the other.
Listed plainly(const std::vector<uint32_t>& rows, int64_t words, int64_t group, int64_t limit) {
  Listed all;
  for (int64_t block = 0; block < limit; ++block) {
    uint64_t mask = 0;
    for (int64_t h = 0; h < group; ++h) {
      if (rows[h * words + block / 32] >> block % 32 & 1) mask |= uint64_t{1} << h;
    }
    if (mask == 0) continue;
    all.blocks.push_back(static_cast<int32_t>(block));
    all.head_masks.push_back(mask);
  }
  return all;
}

// Every variant, with guarded arrays, against the plain order.
void compare(const std::vector<uint32_t>& rows, int64_t words, int64_t group, int64_t limit) {
  const Listed want = plainly(rows, words, group, limit);
  const int64_t total = static_cast<int64_t>(want.blocks.size());
  const auto guarded = guard(rows);
  guarded->freeze();
  const UnionArgs args = {guarded->as<uint32_t>(), words, static_cast<int32_t>(group), limit};
  for (const char* name : {"scalar", "avx2", "avx512", "avx512_vnni"}) {
    const KernelTable* table = find_kernels(name);
    if (table == nullptr) continue;
    const auto starts = guard(std::vector<ChunkStart>(chunks_of(limit) + kMoreStarts));
    CHECK_EQ(table->find_chunks(args, starts->as<ChunkStart>()), total);
    CHECK(starts->intact());
    for (int64_t chunk = 0; chunk < chunks_of(total); ++chunk) {
      const int64_t first = chunk_begin(chunk);
      const int64_t count = std::min(chunk_begin(chunk + 1), total) - first;
      const auto blocks = guard(std::vector<int32_t>(count));
      const auto masks = guard(std::vector<uint64_t>(count));
      table->list_chunk(args, starts->as<ChunkStart>()[chunk],
                        static_cast<int32_t>(count), blocks->as<int32_t>(),
                        masks->as<uint64_t>());
      CHECK(std::equal(want.blocks.begin() + first, want.blocks.begin() + first + count,
                       blocks->as<int32_t>()));
      CHECK(std::equal(want.head_masks.begin() + first, want.head_masks.begin() + first + count,
                       masks->as<uint64_t>()));
    }
  }
}

// Bits that are set with probability 1 / 2^sparsity.
std::vector<uint32_t> bits(std::mt19937& rng, int64_t count, int sparsity) {
  std::vector<uint32_t> words(count);
  for (uint32_t& word : words) {
    word = static_cast<uint32_t>(rng());
    for (int i = 1; i < sparsity; ++i) word &= static_cast<uint32_t>(rng());
  }
  return words;
}

}  // namespace

TEST(union_of_random_selections) {
  std::mt19937 rng(1);
  for (const int64_t words : {1, 2, 3, 15, 16, 17, 32, 33, 100}) {
    for (const int64_t group : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 64}) {
      for (const int sparsity : {1, 3, 6}) {
        const std::vector<uint32_t> rows = bits(rng, group * words, sparsity);
        for (const int64_t cut : {0, 1, 17, 31, 32, 33, 64, 100}) {
          compare(rows, words, group, std::max<int64_t>(words * 32 - cut, 1));
        }
      }
    }
  }
}

// Where sizes of chunks change, a pair of words may end, begin or lie across.
TEST(union_where_chunks_become_larger) {
  for (const int64_t border : {352, 1376, 1440}) {
    for (int64_t before = border - 65; before <= border + 1; ++before) {
      const int64_t pairs = (before + 63) / 64;
      std::vector<uint32_t> rows(2 * pairs + 6, ~uint32_t{0});
      for (int64_t block = before; block < pairs * 64; ++block) {
        rows[block / 32] &= ~(uint32_t{1} << block % 32);
      }
      compare(rows, 2 * pairs + 6, 1, (2 * pairs + 6) * 32);
    }
  }
}

TEST(union_of_everything_and_of_nothing) {
  for (const int64_t words : {1, 2, 7, 16, 37}) {
    for (const int64_t limit : {int64_t{0}, int64_t{1}, words * 32 - 5, words * 32}) {
      for (const int64_t group : {1, 4, 64}) {
        compare(std::vector<uint32_t>(group * words, ~uint32_t{0}), words, group, limit);
        compare(std::vector<uint32_t>(group * words, 0), words, group, limit);
        std::vector<uint32_t> last(group * words, 0);
        last.back() = uint32_t{1} << 31;
        compare(last, words, group, limit);
      }
    }
  }
}
