// Attention over a chunk of blocks, written once over the `Vec` of an instruction set.
//
// Included by one translation unit per instruction set, after its simd_*.h, inside an anonymous
// namespace. Nothing of the standard library is used here: an inline function of it, compiled with
// wide instructions, could be picked by the linker for the whole library and crash older CPUs.
//
// Expects: Vec (kWidth 8 or 16), load, load_half, store, store_half, set1, zero, fma, mul, add,
// sub, max_of, reduce_add, reduce_max, reduce4, exp_of, kHeadTile, kColumnTile. `*_half` touch 8
// lanes and are only used where kWidth is 16.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int kTokenTile = 4;
constexpr int kTokens = 16;

template <bool kHalf, typename T>
inline Vec load_at(const T* p) {
  if constexpr (kHalf) {
    return load_half(p);
  } else {
    return load(p);
  }
}

template <bool kHalf, typename V>
inline void store_at(float* p, V x) {
  if constexpr (kHalf) {
    store_half(p, x);
  } else {
    store(p, x);
  }
}

template <typename T>
inline void fetch(const T* p, int64_t elements) {
  const char* line = reinterpret_cast<const char*>(p);
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
}

// acc[h][t] += q[h] * k[t] over one vector of channels.
template <int kHeads, bool kHalf, typename T>
inline void dot_step(const T* k, const float* const* q, int64_t channel, int64_t head_dim,
                     Vec (&acc)[kHeads][kTokenTile]) {
  Vec key[kTokenTile];
  for (int t = 0; t < kTokenTile; ++t) key[t] = load_at<kHalf>(k + t * head_dim + channel);
  for (int h = 0; h < kHeads; ++h) {
    const Vec query = load_at<kHalf>(q[h] + channel);
    for (int t = 0; t < kTokenTile; ++t) acc[h][t] = fma(query, key[t], acc[h][t]);
  }
}

// Scores of `kHeads` heads for one block.
template <int kHeads, int kHeadDim, typename T>
inline void score_block(const T* k, const float* const* q, float* const* scores, float scale,
                        int64_t head_dim_arg, const T* next) {
  const int64_t head_dim = kHeadDim > 0 ? kHeadDim : head_dim_arg;
  const int64_t full = head_dim / Vec::kWidth * Vec::kWidth;
  for (int t0 = 0; t0 < kTokens; t0 += kTokenTile) {
    const T* rows = k + t0 * head_dim;
    if (next != nullptr) fetch(next + t0 * head_dim, kTokenTile * head_dim);
    Vec acc[kHeads][kTokenTile];
    for (int h = 0; h < kHeads; ++h) {
      for (int t = 0; t < kTokenTile; ++t) acc[h][t] = zero();
    }
    for (int64_t c = 0; c < full; c += Vec::kWidth) {
      dot_step<kHeads, false>(rows, q, c, head_dim, acc);
    }
    if constexpr (Vec::kWidth > 8) {
      if (full < head_dim) dot_step<kHeads, true>(rows, q, full, head_dim, acc);
    }
    for (int h = 0; h < kHeads; ++h) {
      reduce4(acc[h][0], acc[h][1], acc[h][2], acc[h][3], scale, scores[h] + t0);
    }
  }
}

// acc[h][channel...] += p[h][t] * v[t][channel...] for a tile of columns, over one block.
template <int kHeads, int kColumns, bool kHalf, typename T>
inline void value_tile(const T* v, const float* const* p, float* const* acc, int64_t channel,
                       int64_t head_dim) {
  Vec sum[kHeads][kColumns];
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c < kColumns; ++c) {
      sum[h][c] = load_at<kHalf>(acc[h] + channel + c * Vec::kWidth);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    Vec value[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      value[c] = load_at<kHalf>(v + t * head_dim + channel + c * Vec::kWidth);
    }
    for (int h = 0; h < kHeads; ++h) {
      const Vec weight = set1(p[h][t]);
      for (int c = 0; c < kColumns; ++c) sum[h][c] = fma(weight, value[c], sum[h][c]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int c = 0; c < kColumns; ++c) {
      store_at<kHalf>(acc[h] + channel + c * Vec::kWidth, sum[h][c]);
    }
  }
}

template <int kHeads, int kHeadDim, typename T>
inline void value_block(const T* v, const float* const* p, float* const* acc,
                        int64_t head_dim_arg, const T* next) {
  const int64_t head_dim = kHeadDim > 0 ? kHeadDim : head_dim_arg;
  const int64_t full = head_dim / Vec::kWidth * Vec::kWidth;
  if (next != nullptr) fetch(next, kTokens * head_dim);
  int64_t c = 0;
  for (; c + kColumnTile * Vec::kWidth <= full; c += kColumnTile * Vec::kWidth) {
    value_tile<kHeads, kColumnTile, false>(v, p, acc, c, head_dim);
  }
  for (; c < full; c += Vec::kWidth) value_tile<kHeads, 1, false>(v, p, acc, c, head_dim);
  if constexpr (Vec::kWidth > 8) {
    if (full < head_dim) value_tile<kHeads, 1, true>(v, p, acc, full, head_dim);
  }
}

// Turns the scores of one head into weights; returns them in place, with their maximum and sum.
inline void soften(const AttendArgs& a, int g, float* scores) {
  const float minus_infinity = -__builtin_inff();
  Vec top = set1(minus_infinity);
  for (int32_t i = 0; i < a.count; ++i) {
    if (!(a.head_masks[i] >> g & 1)) continue;
    // A NaN in the first operand is passed over, so the maximum stays a number and the NaN comes
    // out of exp_of instead.
    for (int t = 0; t < kTokens; t += Vec::kWidth) {
      top = max_of(load(scores + i * kTokens + t), top);
    }
  }
  const float m = reduce_max(top);
  const Vec shift = set1(m == minus_infinity ? 0.0f : m);
  Vec sum = zero();
  for (int32_t i = 0; i < a.count; ++i) {
    if (!(a.head_masks[i] >> g & 1)) continue;
    for (int t = 0; t < kTokens; t += Vec::kWidth) {
      const Vec p = exp_of(sub(load(scores + i * kTokens + t), shift));
      store(scores + i * kTokens + t, p);
      sum = add(sum, p);
    }
  }
  a.m[g] = m;
  a.l[g] = reduce_add(sum);
}

// Calls `body.run<n>(ids, n)` for the set bits of `mask`, at most kHeadTile at a time.
template <typename Body>
inline void for_head_tiles(uint64_t mask, const Body& body) {
  while (mask != 0) {
    int ids[kHeadTile];
    int n = 0;
    for (; n < kHeadTile && mask != 0; ++n) {
      ids[n] = __builtin_ctzll(mask);
      mask &= mask - 1;
    }
    if constexpr (kHeadTile >= 4) {
      if (n == 4) body.template run<4>(ids);
      if (n == 3) body.template run<3>(ids);
    }
    if (n == 2) body.template run<2>(ids);
    if (n == 1) body.template run<1>(ids);
  }
}

template <typename T, int kHeadDim>
struct KeyPass {
  const AttendArgs& a;
  const T* block;
  const T* next;
  int32_t index;

  template <int kHeads>
  void run(const int* ids) const {
    const float* q[kHeads];
    float* scores[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      q[h] = a.q + static_cast<int64_t>(ids[h]) * a.head_dim;
      scores[h] = a.scratch + (static_cast<int64_t>(ids[h]) * a.count + index) * kTokens;
    }
    score_block<kHeads, kHeadDim>(block, q, scores, a.scale, a.head_dim, next);
  }
};

template <typename T, int kHeadDim>
struct ValuePass {
  const AttendArgs& a;
  const T* block;
  const T* next;
  int32_t index;

  template <int kHeads>
  void run(const int* ids) const {
    const float* p[kHeads];
    float* acc[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      p[h] = a.scratch + (static_cast<int64_t>(ids[h]) * a.count + index) * kTokens;
      acc[h] = a.acc + static_cast<int64_t>(ids[h]) * a.head_dim;
    }
    value_block<kHeads, kHeadDim>(block, p, acc, a.head_dim, next);
  }
};

// One pass over the keys for all heads, then the softmax of the chunk, then one pass over the
// values. A head never touches a block it did not select, not even with weight 0, because
// 0 * NaN is NaN.
template <typename T, int kHeadDim>
void attend_sized(const AttendArgs& a) {
  const T* k = static_cast<const T*>(a.k);
  const T* v = static_cast<const T*>(a.v);
  const int64_t block_elements = static_cast<int64_t>(kTokens) * a.head_dim;
  fetch(k + a.blocks[0] * block_elements, block_elements);
  for (int32_t i = 0; i < a.count; ++i) {
    const T* next = i + 1 < a.count ? k + a.blocks[i + 1] * block_elements
                                    : v + a.blocks[0] * block_elements;
    for_head_tiles(a.head_masks[i],
                   KeyPass<T, kHeadDim>{a, k + a.blocks[i] * block_elements, next, i});
  }
  for (int g = 0; g < a.group; ++g) {
    soften(a, g, a.scratch + static_cast<int64_t>(g) * a.count * kTokens);
  }
  for (int64_t i = 0; i < static_cast<int64_t>(a.group) * a.head_dim; ++i) a.acc[i] = 0.0f;
  for (int32_t i = 0; i < a.count; ++i) {
    const T* next = i + 1 < a.count ? v + a.blocks[i + 1] * block_elements
                    : a.next >= 0   ? k + a.next * block_elements
                                    : nullptr;
    for_head_tiles(a.head_masks[i],
                   ValuePass<T, kHeadDim>{a, v + a.blocks[i] * block_elements, next, i});
  }
}

template <typename T>
void attend(const AttendArgs& a) {
  switch (a.head_dim) {
    case 64:
      return attend_sized<T, 64>(a);
    case 96:
      return attend_sized<T, 96>(a);
    case 128:
      return attend_sized<T, 128>(a);
    case 256:
      return attend_sized<T, 256>(a);
    default:
      return attend_sized<T, 0>(a);
  }
}
