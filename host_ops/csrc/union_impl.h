// The union of a group's selections, written once and compiled for each instruction set.
//
// The union is never stored: it is counted, the places where its chunks begin are noted, and
// whoever attends to a chunk lists the few blocks of it in its own cache.

constexpr int64_t kWordTile = 16;

// Which blocks of words [first, first + kWordTile) any head selected; zeros behind the last word.
inline void any_head(const UnionArgs& a, int64_t first, uint32_t (&any)[kWordTile]) {
  const int64_t words = (a.limit + 31) / 32 - first;
  const int32_t* const rows = reinterpret_cast<const int32_t*>(a.rows) + first;
  for (int64_t i = 0; i < kWordTile; i += Ints::kLanes) {
    Ints selected = all(0);
    const bool whole = words - i >= Ints::kLanes;
    for (int32_t h = 0; h < a.group && i < words; ++h) {
      const int32_t* row = rows + h * a.stride + i;
      selected = either(selected, whole ? load(row) : load_part(row, words - i, 0));
    }
    store(reinterpret_cast<int32_t*>(any) + i, selected);
  }
  if (words > kWordTile || a.limit % 32 == 0) return;
  any[words - 1] &= (uint32_t{1} << a.limit % 32) - 1;
}

// From the first such chunk on all are of kSize blocks, as far as they matter here.
template <int64_t kSize, int64_t kFirst>
struct ChunksOf {
  static constexpr int64_t kBefore = chunk_begin(kFirst);  // Blocks.
  static_assert(chunk_begin(kFirst + 1) - kBefore == kSize && 64 % kSize == 0, "");

  // Writes all chunks that might begin in the 64 blocks behind `before`, of which the union may have
  // fewer. Whether they do is not asked, for the answer would be guessed wrong every other time: what
  // begins later is overwritten later.
  static void begin_in_pair(int64_t before, int32_t word, ChunkStart* starts) {
    const uint64_t behind = static_cast<uint64_t>(before - kBefore) + kSize - 1;
    const int64_t chunk = kFirst + static_cast<int64_t>(behind / kSize);
    const int32_t skip = static_cast<int32_t>(kSize - 1 - behind % kSize);
    for (int32_t i = 0; i < 64 / kSize; ++i) {
      starts[chunk + i] = {word, skip + i * static_cast<int32_t>(kSize)};
    }
  }
};
using Middle = ChunksOf<32, 32>;
using Large = ChunksOf<64, 64>;

int64_t find_chunks(const UnionArgs& args, ChunkStart* starts) {
  // A copy, which cannot lie where the starts do.
  const UnionArgs a = args;
  int64_t count = 0;
  int64_t chunk = 0;
  int64_t next = 0;  // Blocks before that chunk, while chunks are small.
  for (int64_t first = 0; first * 32 < a.limit; first += kWordTile) {
    uint32_t any[kWordTile];
    any_head(a, first, any);
    for (int64_t i = 0; i < kWordTile; i += 2) {
      const int64_t before = count;
      uint64_t pair;
      __builtin_memcpy(&pair, any + i, sizeof(pair));
      count += __builtin_popcountll(pair);
      const int32_t word = static_cast<int32_t>(first + i);
      if (before >= Large::kBefore) {
        Large::begin_in_pair(before, word, starts);
      } else if (before >= Middle::kBefore) {
        Middle::begin_in_pair(before, word, starts);
      } else {
        for (; next < count; next = chunk_begin(++chunk)) {
          starts[chunk] = {word, static_cast<int32_t>(next - before)};
        }
      }
    }
  }
  return count;
}

void list_chunk(const UnionArgs& a, ChunkStart start, int32_t count, int32_t* blocks,
                uint64_t* head_masks) {
  int32_t listed = 0;
  int32_t skip = start.skip;
  for (int64_t w = start.word; listed < count; ++w) {
    uint32_t any = 0;
    for (int32_t h = 0; h < a.group; ++h) any |= a.rows[h * a.stride + w];
    for (; skip > 0 && any != 0; --skip) any &= any - 1;
    for (; any != 0 && listed < count; any &= any - 1, ++listed) {
      const int bit = __builtin_ctz(any);
      uint64_t mask = 0;
      for (int32_t h = 0; h < a.group; ++h) {
        mask |= static_cast<uint64_t>(a.rows[h * a.stride + w] >> bit & 1) << h;
      }
      blocks[listed] = static_cast<int32_t>(w * 32 + bit);
      head_masks[listed] = mask;
    }
  }
}
