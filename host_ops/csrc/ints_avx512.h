// `Ints` for AVX-512 F, BW, VL and DQ, with VNNI where the file is compiled for it: 16 numbers.

struct Ints {
  static constexpr int kLanes = 16;
  __m512i x;
};

// 4 heads x 4 rows of sums leave 16 of the 32 registers for the operands.
constexpr int kScoreHeads = 4;

inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}
inline Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints load_part(const int32_t* p, int64_t n, int32_t rest) {
  return {_mm512_mask_loadu_epi32(_mm512_set1_epi32(rest), first_lanes(n), p)};
}
inline void store(int32_t* p, Ints v) { _mm512_storeu_si512(p, v.x); }
inline Ints either(Ints a, Ints b) { return {_mm512_or_si512(a.x, b.x)}; }
inline Ints max_of(Ints a, Ints b) { return {_mm512_max_epi32(a.x, b.x)}; }
inline Ints min_of(Ints a, Ints b) { return {_mm512_min_epi32(a.x, b.x)}; }
inline int32_t reduce_max(Ints v) { return _mm512_reduce_max_epi32(v.x); }
inline int32_t reduce_min(Ints v) { return _mm512_reduce_min_epi32(v.x); }
inline uint32_t above(Ints v, Ints t) { return _mm512_cmpgt_epi32_mask(v.x, t.x); }
inline uint32_t equal(Ints v, Ints t) { return _mm512_cmpeq_epi32_mask(v.x, t.x); }
inline int64_t number_above(Ints v, Ints t) { return __builtin_popcount(above(v, t)); }
inline int append(int32_t* p, Ints v, uint32_t lanes) {
  // Compressing into memory is slow on some CPUs.
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), v.x));
  return __builtin_popcount(lanes);
}

inline void bytes_of_bits(uint32_t bits, uint32_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_movm_epi8(bits));
}

inline Ints load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Ints load_bytes_part(const void* p, int64_t bytes) {
  return {_mm512_maskz_loadu_epi32(first_lanes(bytes / 4), p)};
}
inline Ints flip(Ints v) { return {_mm512_xor_si512(v.x, _mm512_set1_epi32(-1))}; }
inline Ints dot4(Ints sum, Ints q, Ints row) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpbusd_epi32(sum.x, q.x, row.x)};
#else
  const __m512i pairs = _mm512_maddubs_epi16(q.x, row.x);
  return {_mm512_add_epi32(sum.x, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#endif
}
inline void store_sums(const Ints (&v)[4], int64_t n, int32_t* out) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0].x, v[1].x),
                                      _mm512_unpackhi_epi32(v[0].x, v[1].x));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2].x, v[3].x),
                                      _mm512_unpackhi_epi32(v[2].x, v[3].x));
  const __m512i abcd =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  const __m128i sums =
      _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  _mm_mask_storeu_epi32(out, static_cast<__mmask8>(first_lanes(n)), sums);
}
