// Merging states of attention of one group, written once over the `Vec` of an instruction set.
//
// Expects kernels_impl.h and what that expects. Weights are at most 1, so nothing overflows. A state
// of weight 0 is added all the same, so that a NaN survives.

template <bool kHalf>
inline void scale_step(float* row, Vec weight) {
  store_at<kHalf>(row, mul(weight, load_at<kHalf>(row)));
}

template <bool kHalf>
inline void add_step(float* row, const float* other, Vec weight) {
  store_at<kHalf>(row, fma(weight, load_at<kHalf>(other), load_at<kHalf>(row)));
}

inline void scale_row(float* row, float weight, int64_t head_dim) {
  const Vec factor = set1(weight);
  int64_t i = 0;
  for (; i + Vec::kWidth <= head_dim; i += Vec::kWidth) scale_step<false>(row + i, factor);
  if constexpr (Vec::kWidth > 8) {
    if (i < head_dim) scale_step<true>(row + i, factor);
  }
}

inline void add_row(float* row, const float* other, float weight, int64_t head_dim) {
  const Vec factor = set1(weight);
  int64_t i = 0;
  for (; i + Vec::kWidth <= head_dim; i += Vec::kWidth) add_step<false>(row + i, other + i, factor);
  if constexpr (Vec::kWidth > 8) {
    if (i < head_dim) add_step<true>(row + i, other + i, factor);
  }
}

// exp(m - top) of each head, 0 for a state of nothing.
inline void weigh(const float* m, const float* tops, int32_t group, float (&weights)[kMaxGroup]) {
  const float minus_infinity = -__builtin_inff();
  float shifted[kMaxGroup];
  int32_t h = 0;
  for (; h < group; ++h) shifted[h] = m[h] == minus_infinity ? minus_infinity : m[h] - tops[h];
  for (; h % Vec::kWidth != 0; ++h) shifted[h] = minus_infinity;
  for (h = 0; h < group; h += Vec::kWidth) store(weights + h, exp_of(load(shifted + h)));
}

void merge(const MergeArgs& a) {
  static_assert(kMaxGroup % Vec::kWidth == 0, "heads in whole vectors");
  float tops[kMaxGroup];
  float weights[kMaxGroup];
  for (int32_t h = 0; h < a.group; ++h) tops[h] = a.states[h];
  for (int32_t c = 1; c < a.count; ++c) {
    const float* m = a.states + c * a.stride;
    for (int32_t h = 0; h < a.group; ++h) tops[h] = m[h] > tops[h] ? m[h] : tops[h];
  }
  float* const sums = a.states + a.group;
  float* const rows = sums + a.group;
  for (int32_t c = 0; c < a.count; ++c) {
    const float* const m = a.states + c * a.stride;
    const float* const l = m + a.group;
    const float* const acc = l + a.group;
    // Other threads have written it.
    if (c + 1 < a.count) fetch(m + a.stride, a.group * (2 + static_cast<int64_t>(a.head_dim)));
    weigh(m, tops, a.group, weights);
    for (int32_t h = 0; h < a.group; ++h) {
      const int64_t row = static_cast<int64_t>(h) * a.head_dim;
      if (c == 0) {
        sums[h] *= weights[h];
        scale_row(rows + row, weights[h], a.head_dim);
      } else {
        sums[h] += weights[h] * l[h];
        add_row(rows + row, acc + row, weights[h], a.head_dim);
      }
    }
  }
  for (int32_t h = 0; h < a.group; ++h) a.states[h] = tops[h];
}
