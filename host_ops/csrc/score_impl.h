// Exact integer scores of summary rows, written once over the `Ints` of an instruction set.
//
// max(q * lo, q * hi) = max(q, 0) * hi - max(-q, 0) * lo, so the maximum costs nothing per row: the
// queries are split once into two parts without a sign. A product of such a part (at most 128) and
// a row fits 16 bits, and so does the sum of two, so no step rounds or saturates.
//
// Expects of an ints_*.h: kScoreHeads, load_bytes, load_bytes_part, flip, dot4 (adds the products of
// four unsigned and four signed bytes to each lane), store_sums.

constexpr int kRows = 4;
constexpr int64_t kRowTile = 32;  // 32 rows of 2 x 256 bytes stay in L1 while all heads pass over.
constexpr int64_t kAheadBytes = 4096;  // The CPU's own prefetchers stop at the end of a page.

// Asks for rows [first, last), as far as there are any: those behind belong to another thread.
inline void fetch_rows(const ScoreArgs& a, int64_t first, int64_t last) {
  const int64_t row_bytes = 2 * static_cast<int64_t>(a.head_dim);
  const char* rows = reinterpret_cast<const char*>(a.rows);
  const int64_t end = (last < a.count ? last : a.count) * row_bytes;
  for (int64_t i = first * row_bytes; i < end; i += 64) __builtin_prefetch(rows + i);
}

template <int kHeads>
inline void add_products(const int8_t* const* rows, const uint8_t* const* q, int64_t offset,
                         int64_t head_dim, Ints (&sums)[kHeads][kRows]) {
  constexpr int64_t kBytes = sizeof(Ints);
  const int64_t full = head_dim / kBytes * kBytes;
  Ints row[kRows];
  for (int64_t c = 0; c < full; c += kBytes) {
    for (int r = 0; r < kRows; ++r) row[r] = load_bytes(rows[r] + offset + c);
    for (int h = 0; h < kHeads; ++h) {
      const Ints part = load_bytes(q[h] + c);
      for (int r = 0; r < kRows; ++r) sums[h][r] = dot4(sums[h][r], part, row[r]);
    }
  }
  if (full == head_dim) return;
  for (int r = 0; r < kRows; ++r) {
    row[r] = load_bytes_part(rows[r] + offset + full, head_dim - full);
  }
  for (int h = 0; h < kHeads; ++h) {
    const Ints part = load_bytes_part(q[h] + full, head_dim - full);
    for (int r = 0; r < kRows; ++r) sums[h][r] = dot4(sums[h][r], part, row[r]);
  }
}

template <int kHeads>
inline void score_tile(const ScoreArgs& a, int64_t first, int64_t last, int32_t head) {
  const int64_t row_bytes = 2 * static_cast<int64_t>(a.head_dim);
  const int64_t ahead = kAheadBytes / row_bytes;
  const uint8_t* positive[kHeads];
  const uint8_t* negative[kHeads];
  for (int h = 0; h < kHeads; ++h) {
    positive[h] = a.scratch + (head + h) * row_bytes;
    negative[h] = positive[h] + a.head_dim;
  }
  for (int64_t at = first; at < last; at += kRows) {
    const int8_t* rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      rows[r] = a.rows + (at + r < last ? at + r : last - 1) * row_bytes;
    }
    if (head == 0) fetch_rows(a, at + ahead, at + ahead + kRows);
    Ints sums[kHeads][kRows];
    for (int h = 0; h < kHeads; ++h) {
      for (int r = 0; r < kRows; ++r) sums[h][r] = all(-1);
    }
    // ~(x - 1) = -x: flipped between the two, one set of sums both adds and subtracts.
    add_products<kHeads>(rows, negative, 0, a.head_dim, sums);
    for (int h = 0; h < kHeads; ++h) {
      for (int r = 0; r < kRows; ++r) sums[h][r] = flip(sums[h][r]);
    }
    add_products<kHeads>(rows, positive, a.head_dim, a.head_dim, sums);
    for (int h = 0; h < kHeads; ++h) {
      store_sums(sums[h], last - at, a.scores + (head + h) * a.stride + at);
    }
  }
}

inline void split_queries(const ScoreArgs& a) {
  for (int32_t g = 0; g < a.group; ++g) {
    const int8_t* q8 = a.q8 + g * static_cast<int64_t>(a.head_dim);
    uint8_t* positive = a.scratch + g * 2 * static_cast<int64_t>(a.head_dim);
    uint8_t* negative = positive + a.head_dim;
    for (int32_t c = 0; c < a.head_dim; ++c) {
      positive[c] = static_cast<uint8_t>(q8[c] > 0 ? q8[c] : 0);
      negative[c] = static_cast<uint8_t>(q8[c] < 0 ? -q8[c] : 0);
    }
  }
}

void score(const ScoreArgs& a) {
  fetch_rows(a, 0, kAheadBytes / (2 * static_cast<int64_t>(a.head_dim)));
  split_queries(a);
  for (int64_t first = 0; first < a.count; first += kRowTile) {
    const int64_t last = first + kRowTile < a.count ? first + kRowTile : a.count;
    int32_t g = 0;
    for (; g + kScoreHeads <= a.group; g += kScoreHeads) {
      score_tile<kScoreHeads>(a, first, last, g);
    }
    if constexpr (kScoreHeads > 3) {
      if (a.group - g == 3) score_tile<3>(a, first, last, g);
      if (a.group - g == 2) score_tile<2>(a, first, last, g);
    }
    if (a.group - g == 1) score_tile<1>(a, first, last, g);
  }
}
