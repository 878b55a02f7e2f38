// Exact integer scores of summary rows, for any CPU.

void score(const ScoreArgs& a) {
  for (int64_t r = 0; r < a.count; ++r) {
    const int8_t* low = a.rows + r * 2 * a.head_dim;
    const int8_t* high = low + a.head_dim;
    for (int32_t g = 0; g < a.group; ++g) {
      const int8_t* q8 = a.q8 + g * static_cast<int64_t>(a.head_dim);
      int32_t sum = 0;
      for (int32_t c = 0; c < a.head_dim; ++c) {
        sum += (q8[c] > 0 ? q8[c] : 0) * high[c] + (q8[c] < 0 ? q8[c] : 0) * low[c];
      }
      a.scores[g * a.stride + r] = sum;
    }
  }
}
