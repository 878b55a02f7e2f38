// `Vec` for AVX-512 F, BW, VL and DQ: sixteen floats.

struct Vec {
  static constexpr int kWidth = 16;
  __m512 x;
};

// 4 heads x 4 tokens (or columns) of accumulators leave 16 of the 32 registers for the operands.
constexpr int kHeadTile = 4;
constexpr int kColumnTile = 4;

struct BFloat16;
struct Float16;
inline __m512 widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec load_half(const float* p) { return {_mm512_zextps256_ps512(_mm256_loadu_ps(p))}; }
inline Vec load_half(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {widen(_mm256_zextsi128_si256(bits))};
}
inline Vec load_half(const Float16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtph_ps(_mm256_zextsi128_si256(bits))};
}
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v.x); }
inline void store_half(float* p, Vec v) { _mm256_storeu_ps(p, _mm512_castps512_ps256(v.x)); }
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Vec max_of(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
inline float reduce_add(Vec v) { return _mm512_reduce_add_ps(v.x); }
inline float reduce_max(Vec v) { return _mm512_reduce_max_ps(v.x); }
inline __m256 fold(Vec v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v.x), _mm512_extractf32x8_ps(v.x, 1));
}
inline void reduce4(Vec a, Vec b, Vec c, Vec d, float scale, float* out) {
  const __m256 left = _mm256_hadd_ps(fold(a), fold(b));
  const __m256 s = _mm256_hadd_ps(left, _mm256_hadd_ps(fold(c), fold(d)));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  _mm_storeu_ps(out, _mm_mul_ps(sums, _mm_set1_ps(scale)));
}
inline Vec round_of(Vec v) {
  return {_mm512_roundscale_ps(v.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec pow2_of(Vec n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.x), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
inline Vec zero_below(Vec y, Vec x, float limit) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.x, _mm512_set1_ps(limit), _CMP_NLT_UQ);
  return {_mm512_maskz_mov_ps(keep, y.x)};
}
