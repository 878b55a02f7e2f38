// `Ints` for AVX2: 8 numbers.

struct Ints {
  static constexpr int kLanes = 8;
  __m256i x;
};

// 2 heads x 4 rows of sums and 4 rows fit the 16 registers.
constexpr int kScoreHeads = 2;

// Per set of lanes, their numbers from the lowest on: AVX2 has no instruction that compresses.
struct LaneTable {
  uint8_t lane[256][8] = {};
  constexpr LaneTable() {
    for (int set = 0; set < 256; ++set) {
      int n = 0;
      for (int i = 0; i < 8; ++i) {
        if (set >> i & 1) lane[set][n++] = static_cast<uint8_t>(i);
      }
    }
  }
};
constexpr LaneTable kLaneTable;

inline __m256i first_lanes(int64_t n) {
  const int lanes = n >= 8 ? 8 : n <= 0 ? 0 : static_cast<int>(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Ints all(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Ints load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Ints load_part(const int32_t* p, int64_t n, int32_t rest) {
  const __m256i lanes = first_lanes(n);
  return {_mm256_blendv_epi8(_mm256_set1_epi32(rest), _mm256_maskload_epi32(p, lanes), lanes)};
}
inline void store(int32_t* p, Ints v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.x);
}
inline Ints either(Ints a, Ints b) { return {_mm256_or_si256(a.x, b.x)}; }
inline Ints max_of(Ints a, Ints b) { return {_mm256_max_epi32(a.x, b.x)}; }
inline Ints min_of(Ints a, Ints b) { return {_mm256_min_epi32(a.x, b.x)}; }
inline int32_t reduce_max(Ints v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v.x), _mm256_extracti128_si256(v.x, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
inline int32_t reduce_min(Ints v) {
  __m128i m = _mm_min_epi32(_mm256_castsi256_si128(v.x), _mm256_extracti128_si256(v.x, 1));
  m = _mm_min_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_min_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
inline uint32_t set_of(__m256i lanes) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
}
inline uint32_t above(Ints v, Ints t) { return set_of(_mm256_cmpgt_epi32(v.x, t.x)); }
inline uint32_t equal(Ints v, Ints t) { return set_of(_mm256_cmpeq_epi32(v.x, t.x)); }
inline int64_t number_above(Ints v, Ints t) { return __builtin_popcount(above(v, t)); }
inline int append(int32_t* p, Ints v, uint32_t lanes) {
  const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneTable.lane[lanes]));
  store(p, {_mm256_permutevar8x32_epi32(v.x, _mm256_cvtepu8_epi32(order))});
  return __builtin_popcount(lanes);
}

inline void bytes_of_bits(uint32_t bits, uint32_t* out) {
  const __m256i source = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                            0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), source);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit));
}

inline Ints load_bytes(const void* p) {
  return {_mm256_loadu_si256(static_cast<const __m256i*>(p))};
}
inline Ints load_bytes_part(const void* p, int64_t bytes) {
  return {_mm256_maskload_epi32(static_cast<const int*>(p), first_lanes(bytes / 4))};
}
inline Ints flip(Ints v) { return {_mm256_xor_si256(v.x, _mm256_set1_epi32(-1))}; }
inline Ints dot4(Ints sum, Ints q, Ints row) {
  const __m256i pairs = _mm256_maddubs_epi16(q.x, row.x);
  return {_mm256_add_epi32(sum.x, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
inline void store_sums(const Ints (&v)[4], int64_t n, int32_t* out) {
  const __m256i ab = _mm256_hadd_epi32(v[0].x, v[1].x);
  const __m256i abcd = _mm256_hadd_epi32(ab, _mm256_hadd_epi32(v[2].x, v[3].x));
  const __m128i sums =
      _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
  if (n >= 4) return _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sums);
  _mm_maskstore_epi32(out, _mm256_castsi256_si128(first_lanes(n)), sums);
}
