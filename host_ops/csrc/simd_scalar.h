// Portable `Vec`: eight floats in an array, loops that any compiler can vectorise.

struct Vec {
  static constexpr int kWidth = 8;
  float lane[8];
};

constexpr int kHeadTile = 2;
constexpr int kColumnTile = 1;

struct BFloat16;
struct Float16;
inline float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  __builtin_memcpy(&x, &wide, sizeof(x));
  return x;
}

inline float widen_float16(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fff;
  // Made from an integer, because a CPU may flush subnormal floats to zero.
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  uint32_t small;
  __builtin_memcpy(&small, &subnormal, sizeof(small));
  const uint32_t rebias = (magnitude < 0x7c00 ? 112u : 224u) << 23;
  const uint32_t wide = (magnitude < 0x0400 ? small : (magnitude << 13) + rebias) |
                        static_cast<uint32_t>(bits & 0x8000) << 16;
  float x;
  __builtin_memcpy(&x, &wide, sizeof(x));
  return x;
}

template <typename Op>
inline Vec each(const Op& op) {
  Vec r;
  for (int i = 0; i < 8; ++i) r.lane[i] = op(i);
  return r;
}

inline Vec load(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline Vec load(const BFloat16* p) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(p);
  return each([&](int i) { return widen(bits[i]); });
}
inline Vec load(const Float16* p) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(p);
  return each([&](int i) { return widen_float16(bits[i]); });
}
inline void store(float* p, Vec x) {
  for (int i = 0; i < 8; ++i) p[i] = x.lane[i];
}
inline Vec set1(float x) {
  return each([&](int) { return x; });
}
inline Vec zero() { return set1(0.0f); }
inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec add(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
// The second operand where either is NaN, as the vector instructions do.
inline Vec max_of(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline float reduce_add(Vec x) {
  return ((x.lane[0] + x.lane[4]) + (x.lane[2] + x.lane[6])) +
         ((x.lane[1] + x.lane[5]) + (x.lane[3] + x.lane[7]));
}
inline float reduce_max(Vec x) {
  float top = x.lane[0];
  for (int i = 1; i < 8; ++i) top = x.lane[i] > top ? x.lane[i] : top;
  return top;
}
inline void reduce4(Vec a, Vec b, Vec c, Vec d, float scale, float* out) {
  out[0] = reduce_add(a) * scale;
  out[1] = reduce_add(b) * scale;
  out[2] = reduce_add(c) * scale;
  out[3] = reduce_add(d) * scale;
}
inline Vec round_of(Vec x) {
  return each([&](int i) { return __builtin_rintf(x.lane[i]); });
}
inline Vec pow2_of(Vec n) {
  return each([&](int i) {
    // Outside of the range (and for NaN) the lane is discarded or NaN anyway.
    const bool inside = n.lane[i] > -127.0f && n.lane[i] < 128.0f;
    const uint32_t bits = static_cast<uint32_t>((inside ? static_cast<int>(n.lane[i]) : 0) + 127)
                          << 23;
    float r;
    __builtin_memcpy(&r, &bits, sizeof(r));
    return r;
  });
}
inline Vec zero_below(Vec y, Vec x, float limit) {
  return each([&](int i) { return x.lane[i] < limit ? 0.0f : y.lane[i]; });
}
