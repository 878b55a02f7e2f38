// Portable `Ints`: eight numbers in an array, loops that any compiler can vectorise.

struct Ints {
  static constexpr int kLanes = 8;
  int32_t lane[8];
};

template <typename Op>
inline Ints each_int(const Op& op) {
  Ints r;
  for (int i = 0; i < 8; ++i) r.lane[i] = op(i);
  return r;
}
template <typename Op>
inline uint32_t set_of(const Op& op) {
  uint32_t lanes = 0;
  for (int i = 0; i < 8; ++i) lanes |= static_cast<uint32_t>(op(i)) << i;
  return lanes;
}

inline Ints all(int32_t x) {
  return each_int([&](int) { return x; });
}
inline Ints load(const int32_t* p) {
  return each_int([&](int i) { return p[i]; });
}
inline Ints load_part(const int32_t* p, int64_t n, int32_t rest) {
  return each_int([&](int i) { return i < n ? p[i] : rest; });
}
inline void store(int32_t* p, Ints v) {
  for (int i = 0; i < 8; ++i) p[i] = v.lane[i];
}
inline Ints max_of(Ints a, Ints b) {
  return each_int([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Ints either(Ints a, Ints b) {
  return each_int([&](int i) { return a.lane[i] | b.lane[i]; });
}
inline Ints min_of(Ints a, Ints b) {
  return each_int([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline int32_t reduce_max(Ints v) {
  int32_t top = v.lane[0];
  for (int i = 1; i < 8; ++i) top = v.lane[i] > top ? v.lane[i] : top;
  return top;
}
inline int32_t reduce_min(Ints v) {
  int32_t low = v.lane[0];
  for (int i = 1; i < 8; ++i) low = v.lane[i] < low ? v.lane[i] : low;
  return low;
}
inline uint32_t above(Ints v, Ints t) {
  return set_of([&](int i) { return v.lane[i] > t.lane[i]; });
}
inline uint32_t equal(Ints v, Ints t) {
  return set_of([&](int i) { return v.lane[i] == t.lane[i]; });
}
inline int64_t number_above(Ints v, Ints t) {
  int32_t number = 0;
  for (int i = 0; i < 8; ++i) number += v.lane[i] > t.lane[i];
  return number;
}
inline int append(int32_t* p, Ints v, uint32_t lanes) {
  int n = 0;
  for (; lanes != 0; lanes &= lanes - 1) p[n++] = v.lane[__builtin_ctz(lanes)];
  return n;
}
inline void bytes_of_bits(uint32_t bits, uint32_t* out) {
  for (int i = 0; i < 8; ++i) {
    // One bit a byte, then a 1 in each byte with a bit, then all eight of its bits.
    const uint32_t apart = (bits >> i * 4 & 15) * 0x01010101u & 0x08040201u;
    out[i] = ((apart + 0x7f7f7f7fu) >> 7 & 0x01010101u) * 255u;
  }
}
