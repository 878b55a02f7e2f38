// The union of a group's selections, written once and compiled for each instruction set.
//
// The union is never stored: it is counted, the places where its chunks begin are noted, and
// whoever attends to a chunk lists the few blocks of it in its own cache.
//
// Expects of an ints_*.h: all, load, store, either.

constexpr int64_t kWordTile = 16;
// So many chunks, of so many blocks together, are smaller than the others.
constexpr int64_t kSmallChunks = 64;
constexpr int64_t kSmallChunkBlocks = 1376;
static_assert(kMaxChunkBlocks == 64, "as many as two words have");

// Which blocks of words [first, first + kWordTile) any head selected; zeros behind the last word.
inline void any_head(const UnionArgs& a, int64_t first, uint32_t (&any)[kWordTile]) {
  const int64_t words = (a.limit + 31) / 32 - first;
  const uint32_t* row = a.rows + first;
  if (words >= kWordTile) {
    constexpr int64_t kVectors = kWordTile / Ints::kLanes;
    Ints bits[kVectors];
    for (Ints& some : bits) some = all(0);
    for (int32_t h = 0; h < a.group; ++h, row += a.stride) {
      for (int64_t i = 0; i < kVectors; ++i) {
        const uint32_t* const some = row + i * Ints::kLanes;
        bits[i] = either(bits[i], load(reinterpret_cast<const int32_t*>(some)));
      }
    }
    for (int64_t i = 0; i < kVectors; ++i) {
      store(reinterpret_cast<int32_t*>(any + i * Ints::kLanes), bits[i]);
    }
  } else {
    for (uint32_t& word : any) word = 0;
    for (int32_t h = 0; h < a.group; ++h, row += a.stride) {
      for (int64_t i = 0; i < words; ++i) any[i] |= row[i];
    }
  }
  if (words > kWordTile || a.limit % 32 == 0) return;
  any[words - 1] &= (uint32_t{1} << a.limit % 32) - 1;
}

int64_t find_chunks(const UnionArgs& a, ChunkStart* starts) {
  int64_t count = 0;
  int64_t chunk = 0;
  for (int64_t first = 0; first * 32 < a.limit; first += kWordTile) {
    uint32_t any[kWordTile];
    any_head(a, first, any);
    for (int64_t i = 0; i < kWordTile; i += 2) {
      const int64_t before = count;
      count += __builtin_popcountll(static_cast<uint64_t>(any[i + 1]) << 32 | any[i]);
      const auto note = [&](int64_t begin) {
        starts[chunk] = {static_cast<int32_t>(first + i), static_cast<int32_t>(begin - before)};
      };
      if (before < kSmallChunkBlocks) {
        for (; chunk_begin(chunk) < count; ++chunk) note(chunk_begin(chunk));
        continue;
      }
      // Whether one begins in so many blocks is hard to foresee. Noted where it does not, it is noted
      // once more where it does.
      const int64_t large = (before - kSmallChunkBlocks + kMaxChunkBlocks - 1) >> 6;
      chunk = kSmallChunks + large;
      note(kSmallChunkBlocks + (large << 6));
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
