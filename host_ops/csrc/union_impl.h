// The union of a group's selections, written once and compiled for each instruction set.
//
// The union is never stored: it is counted, the places where its chunks begin are noted, and
// whoever attends to a chunk lists the few blocks of it in its own cache.

constexpr int64_t kWordTile = 16;

// Which blocks of words [first, first + kWordTile) any head selected; zeros behind the last word.
inline void any_head(const UnionArgs& a, int64_t first, uint32_t (&any)[kWordTile]) {
  const int64_t words = (a.limit + 31) / 32 - first;
  for (uint32_t& word : any) word = 0;
  for (int32_t h = 0; h < a.group; ++h) {
    const uint32_t* row = a.rows + h * a.stride + first;
    if (words >= kWordTile) {
      for (int64_t i = 0; i < kWordTile; ++i) any[i] |= row[i];
    } else {
      for (int64_t i = 0; i < words; ++i) any[i] |= row[i];
    }
  }
  if (words > kWordTile || a.limit % 32 == 0) return;
  any[words - 1] &= (uint32_t{1} << a.limit % 32) - 1;
}

int64_t find_chunks(const UnionArgs& a, ChunkStart* starts) {
  int64_t count = 0;
  int64_t chunk = 0;
  int64_t next = 0;  // Blocks before that chunk.
  for (int64_t first = 0; first * 32 < a.limit; first += kWordTile) {
    uint32_t any[kWordTile];
    any_head(a, first, any);
    for (int64_t i = 0; i < kWordTile; i += 2) {
      const int64_t before = count;
      count += __builtin_popcountll(static_cast<uint64_t>(any[i + 1]) << 32 | any[i]);
      for (; next < count; next = chunk_begin(++chunk)) {
        starts[chunk] = {static_cast<int32_t>(first + i), static_cast<int32_t>(next - before)};
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
