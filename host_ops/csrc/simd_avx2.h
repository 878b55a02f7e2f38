// `Vec` for AVX2 with FMA and F16C: eight floats.

struct Vec {
  static constexpr int kWidth = 8;
  __m256 x;
};

// 2 heads x 4 tokens of accumulators and 4 keys fit the 16 registers.
constexpr int kHeadTile = 2;
constexpr int kColumnTile = 4;

struct BFloat16;
struct Float16;
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline Vec load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v.x); }
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
inline Vec max_of(Vec a, Vec b) { return {_mm256_max_ps(a.x, b.x)}; }
inline float reduce_add(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v.x), _mm256_extractf128_ps(v.x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v.x), _mm256_extractf128_ps(v.x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline void reduce4(Vec a, Vec b, Vec c, Vec d, float scale, float* out) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a.x, b.x), _mm256_hadd_ps(c.x, d.x));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  _mm_storeu_ps(out, _mm_mul_ps(sums, _mm_set1_ps(scale)));
}
inline Vec round_of(Vec v) {
  return {_mm256_round_ps(v.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Vec pow2_of(Vec n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.x), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(e, 23))};
}
inline Vec zero_below(Vec y, Vec x, float limit) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.x, _mm256_set1_ps(limit), _CMP_LT_OQ), y.x)};
}
