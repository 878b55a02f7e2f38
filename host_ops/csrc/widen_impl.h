// From bits of units to bits of their blocks, written once over the `Ints` of an instruction set.
//
// Expects of an ints_*.h: bytes_of_bits (each of 32 bits repeated eight times).

// Repeats each of the lowest 32 / kRatio bits kRatio times.
template <int kRatio>
constexpr uint32_t widen_bits(uint32_t bits) {
  for (int half = 16 / kRatio; half > 0; half /= 2) {
    const uint32_t every =
        static_cast<uint32_t>(0xffffffffu / ((uint64_t{1} << half * kRatio) - 1));
    bits = (bits | bits << half * (kRatio - 1)) & every * ((1u << half) - 1);
  }
  return bits * ((1u << kRatio) - 1);
}

// Each byte with its bits repeated kRatio times.
template <int kRatio>
struct Widened {
  uint32_t bits[256] = {};
  constexpr Widened() {
    for (uint32_t byte = 0; byte < 256; ++byte) bits[byte] = widen_bits<kRatio>(byte);
  }
};
constexpr Widened<2> kTwice;
constexpr Widened<4> kFourTimes;

// The words of `count` <= 32 units.
template <int kRatio>
inline void write_units(uint32_t bits, int64_t count, uint32_t* words) {
  if (kRatio == 8 && count == 32) return bytes_of_bits(bits, words);
  for (int64_t i = 0; i * 32 < count * kRatio; ++i) {
    const uint32_t part = bits >> i * (32 / kRatio);
    if constexpr (kRatio == 1) words[i] = part;
    if constexpr (kRatio == 2) {
      words[i] = kTwice.bits[part & 255] | kTwice.bits[part >> 8 & 255] << 16;
    }
    if constexpr (kRatio == 4) words[i] = kFourTimes.bits[part & 255];
    if constexpr (kRatio == 8) words[i] = widen_bits<8>(part & 15);
  }
}
