// Exact integer scores of summary rows, written once over the `score_row` of an instruction set.
//
// max(q * lo, q * hi) = max(q, 0) * hi + min(q, 0) * lo, so the maximum costs nothing per row: the
// queries are split once into their positive and negative parts.

constexpr int64_t kRowTile = 32;  // 32 rows of 2 x 256 bytes stay in L1 while all heads pass over.

template <int kHeads>
inline void score_tile(const ScoreArgs& a, int64_t first, int64_t last, int32_t head) {
  const int16_t* pos[kHeads];
  const int16_t* neg[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    pos[h] = a.scratch + static_cast<int64_t>(head + h) * 2 * a.head_dim;
    neg[h] = pos[h] + a.head_dim;
  }
  int32_t sums[kHeads];
  for (int64_t r = first; r < last; ++r) {
    score_row<kHeads>(a.rows + r * 2 * a.head_dim, pos, neg, a.head_dim, sums);
    for (int h = 0; h < kHeads; ++h) a.scores[(head + h) * a.stride + r] = sums[h];
  }
}

void score(const ScoreArgs& a) {
  for (int32_t g = 0; g < a.group; ++g) {
    for (int64_t c = 0; c < a.head_dim; ++c) {
      const int16_t q = a.q8[g * static_cast<int64_t>(a.head_dim) + c];
      a.scratch[(g * 2) * static_cast<int64_t>(a.head_dim) + c] = q > 0 ? q : 0;
      a.scratch[(g * 2 + 1) * static_cast<int64_t>(a.head_dim) + c] = q < 0 ? q : 0;
    }
  }
  for (int64_t first = 0; first < a.count; first += kRowTile) {
    const int64_t last = first + kRowTile < a.count ? first + kRowTile : a.count;
    int32_t g = 0;
    for (; g + 4 <= a.group; g += 4) score_tile<4>(a, first, last, g);
    for (; g + 2 <= a.group; g += 2) score_tile<2>(a, first, last, g);
    for (; g < a.group; ++g) score_tile<1>(a, first, last, g);
  }
}
