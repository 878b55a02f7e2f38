// Exact selection of the best units, written once over the `Ints` of an instruction set.
//
// The cut between chosen and not chosen is bisected, and one pass compares and writes the bitmap.
// Many scores are first thinned out: a sample brackets the cut between two values, and one pass
// keeps the scores between them; then again, until few are left. What a sample says can only cost
// time: where the bracket misses, all scores are kept.
//
// Expects of an ints_*.h: all, load, load_part, store, max_of, min_of, reduce_max, reduce_min, above,
// equal, number_above, append (stores the named lanes next to each other and returns how many; may
// write a whole vector), bytes_of_bits (each of 32 bits repeated eight times).

constexpr int32_t kLowest = -2147483647 - 1;
constexpr int32_t kHighest = 2147483647;
// Bisecting so many takes no longer than thinning them out.
constexpr int64_t kFew = 768;
constexpr int64_t kSamples = 128;
constexpr int64_t kSlack = 2;  // How many samples an end of the bracket may be off.
// Vectors that are counted together, so that their sums do not wait for each other.
constexpr int64_t kTogether = 4;
constexpr int64_t kMultiple = kTogether * Ints::kLanes;
static_assert(kMultiple <= kSelectPadding && kSamples % kMultiple == 0, "");

// Exactly `wanted` scores are above the threshold or among the first `ties` that equal it.
struct Cut {
  int32_t threshold;
  int64_t ties;
};

inline int32_t middle_of(int32_t low, int32_t high) {
  return static_cast<int32_t>(low + (static_cast<int64_t>(high) - low) / 2);
}

inline int32_t low_bits(int64_t n) {
  return n >= 32 ? -1 : static_cast<int32_t>((uint32_t{1} << n) - 1);
}

// Makes the length a multiple of kMultiple with values that are above nothing.
inline int64_t pad(int32_t* values, int64_t count) {
  for (int64_t i = 0; i < kMultiple; i += Ints::kLanes) store(values + count + i, all(kLowest));
  return (count + kMultiple - 1) / kMultiple * kMultiple;
}

inline int64_t count_above(const int32_t* values, int64_t padded, int32_t threshold) {
  const Ints limit = all(threshold);
  int64_t counts[kTogether] = {};
  for (int64_t i = 0; i < padded; i += kMultiple) {
    for (int64_t j = 0; j < kTogether; ++j) {
      counts[j] += number_above(load(values + i + j * Ints::kLanes), limit);
    }
  }
  return counts[0] + counts[1] + counts[2] + counts[3];
}

// The cut behind the wanted-th largest value, 0 < wanted <= count, which is in [low, high].
inline Cut find_cut(const int32_t* values, int64_t padded, int64_t wanted, int32_t low,
                    int32_t high) {
  while (low < high) {
    const int32_t middle = middle_of(low, high);
    const int64_t count = count_above(values, padded, middle);
    if (count == wanted) return {middle, 0};
    // Without a branch, which would be guessed wrong every other time.
    const bool fewer = count < wanted;
    high = fewer ? middle : high;
    low = fewer ? low : middle + 1;
  }
  return {low, wanted - count_above(values, padded, low)};
}

// Smallest and largest of count > 0 values.
inline void find_range(const int32_t* values, int64_t count, int32_t* low, int32_t* high) {
  Ints smallest = all(kHighest);
  Ints largest = all(kLowest);
  int64_t i = 0;
  for (; i + Ints::kLanes <= count; i += Ints::kLanes) {
    smallest = min_of(smallest, load(values + i));
    largest = max_of(largest, load(values + i));
  }
  smallest = min_of(smallest, load_part(values + i, count - i, kHighest));
  largest = max_of(largest, load_part(values + i, count - i, kLowest));
  *low = reduce_min(smallest);
  *high = reduce_max(largest);
}

// A threshold with `least` to `most` values above it if there is one, otherwise one close by.
inline int32_t find_near(const int32_t* values, int64_t padded, int64_t least, int64_t most,
                         int32_t low, int32_t high) {
  while (low < high) {
    const int32_t middle = middle_of(low, high);
    const int64_t count = count_above(values, padded, middle);
    if (count >= least && count <= most) return middle;
    const bool fewer = count < least;
    high = fewer ? middle : high;
    low = fewer ? low : middle + 1;
  }
  return low;
}

// Multiples of the golden ratio spread evenly and follow no period of the scores.
struct Places {
  uint32_t place[kSamples] = {};
  constexpr Places() {
    for (int64_t i = 0; i < kSamples; ++i) place[i] = static_cast<uint32_t>(i * 2654435769u);
  }
};
constexpr Places kPlaces;

// Two values that most likely have the wanted-th largest above the one and not above the other.
inline void bracket(const int32_t* values, int64_t count, int64_t wanted, int32_t* low,
                    int32_t* high) {
  int32_t samples[kSamples];
  for (int64_t i = 0; i < kSamples; i += 4) {
    for (int64_t j = i; j < i + 4; ++j) {
      samples[j] = values[kPlaces.place[j] * static_cast<uint64_t>(count) >> 32];
    }
  }
  int32_t least, most;
  find_range(samples, kSamples, &least, &most);
  const float share = static_cast<float>(wanted) / static_cast<float>(count);
  const int64_t rank = static_cast<int64_t>(share * kSamples);
  // Three standard deviations of the rank in the sample, and one for what rounding takes.
  const int64_t margin =
      1 + static_cast<int64_t>(3 * __builtin_sqrtf(kSamples * share * (1 - share)));
  *low = kLowest;
  *high = kHighest;
  if (rank + margin < kSamples) {
    *low = find_near(samples, kSamples, rank + margin, rank + margin + kSlack, least, most);
  }
  // Where few are above the bracket, keeping them is cheaper than telling them from the others.
  if (rank >= 2 * margin) {
    *high = find_near(samples, kSamples, rank - margin - kSlack, rank - margin, least, most);
  }
}

// Copies the values above `low` but not above `high` to `kept`, which may be `values`; returns how
// many, and how many are above `high`. `kTop`: `high` is kHighest. `next` may be null.
template <bool kTop>
inline int64_t keep_between(const int32_t* values, int64_t count, int32_t low, int32_t high,
                            const int32_t* next, int32_t* kept, int64_t* over) {
  const Ints bottom = all(low);
  const Ints top = all(high);
  int64_t number = 0;
  *over = 0;
  const auto keep = [&](Ints v) {
    uint32_t lanes = above(v, bottom);
    if constexpr (!kTop) {
      const uint32_t higher = above(v, top);
      *over += __builtin_popcount(higher);
      lanes &= ~higher;
    }
    number += append(kept + number, v, lanes);
  };
  int64_t i = 0;
  for (; i + Ints::kLanes <= count; i += Ints::kLanes) {
    if (next != nullptr) __builtin_prefetch(next + i);
    keep(load(values + i));
  }
  keep(load_part(values + i, count - i, kLowest));
  return number;
}

// Thins the scores out to the scratch until few are left, of which the *wanted best count. Returns
// how many are left, or 0 if a sample misled.
inline int64_t thin_out(const SelectArgs& a, int64_t* wanted) {
  const int32_t* values = a.scores;
  const int32_t* next = a.next;
  int64_t count = a.units;
  while (count > kFew) {
    int32_t low, high;
    int64_t over;
    bracket(values, count, *wanted, &low, &high);
    const int64_t kept =
        high == kHighest ? keep_between<true>(values, count, low, high, next, a.scratch, &over)
                         : keep_between<false>(values, count, low, high, next, a.scratch, &over);
    if (over >= *wanted || over + kept < *wanted || kept == count) return 0;
    *wanted -= over;
    count = kept;
    values = a.scratch;
    next = nullptr;
  }
  return count;
}

// Copies all scores to the scratch.
inline void keep_all(const SelectArgs& a) {
  int64_t u = 0;
  for (; u + Ints::kLanes <= a.units; u += Ints::kLanes) store(a.scratch + u, load(a.scores + u));
  store(a.scratch + u, load_part(a.scores + u, a.units - u, kLowest));
}

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

// One bit for each of 32 scores, those behind `count` being 0.
template <typename Test>
inline uint32_t bits_of(const int32_t* scores, int64_t count, const Test& test) {
  uint32_t bits = 0;
  if (count >= 32) {
    for (int i = 0; i < 32; i += Ints::kLanes) bits |= test(load(scores + i)) << i;
    return bits;
  }
  for (int i = 0; i < count; i += Ints::kLanes) {
    const Ints some =
        count - i >= Ints::kLanes ? load(scores + i) : load_part(scores + i, count - i, kLowest);
    bits |= test(some) << i;
  }
  return bits & low_bits(count);
}

template <int kRatio>
inline void write_words(const SelectArgs& a, Cut cut) {
  const Ints threshold = all(cut.threshold);
  const auto best_of = [&](Ints v) { return above(v, threshold); };
  const auto tied_of = [&](Ints v) { return equal(v, threshold); };
  int64_t first = 0;
  for (; cut.ties > 0 && first < a.units; first += 32) {
    const int64_t count = a.units - first < 32 ? a.units - first : 32;
    uint32_t tied = bits_of(a.scores + first, count, tied_of);
    int64_t number = __builtin_popcount(tied);
    for (; number > cut.ties; --number) tied &= ~(0x80000000u >> __builtin_clz(tied));
    cut.ties -= number;
    const uint32_t best = bits_of(a.scores + first, count, best_of) | tied;
    write_units<kRatio>(best, count, a.words + first * kRatio / 32);
  }
  for (; first + 32 <= a.units; first += 32) {
    write_units<kRatio>(bits_of(a.scores + first, 32, best_of), 32, a.words + first * kRatio / 32);
  }
  if (first >= a.units) return;
  const int64_t count = a.units - first;
  write_units<kRatio>(bits_of(a.scores + first, count, best_of), count,
                      a.words + first * kRatio / 32);
}

void fold_heads(const ScoreArgs& a) {
  for (int32_t h = 1; h < a.group; ++h) {
    const int32_t* other = a.scores + h * a.stride;
    int64_t i = 0;
    for (; i + Ints::kLanes <= a.count; i += Ints::kLanes) {
      store(a.scores + i, max_of(load(a.scores + i), load(other + i)));
    }
    for (; i < a.count; ++i) a.scores[i] = a.scores[i] > other[i] ? a.scores[i] : other[i];
  }
}

void select(const SelectArgs& a) {
  // They were last read on other CPUs.
  for (int64_t i = 0; i * 32 < a.units * a.ratio; i += 16) __builtin_prefetch(a.words + i, 1);
  int64_t wanted = a.wanted;
  int64_t kept = a.units > kFew ? thin_out(a, &wanted) : 0;
  if (kept == 0) {
    keep_all(a);
    kept = a.units;
    wanted = a.wanted;
  }
  int32_t low, high;
  find_range(a.scratch, kept, &low, &high);
  const Cut cut = find_cut(a.scratch, pad(a.scratch, kept), wanted, low, high);
  if (a.ratio == 1) write_words<1>(a, cut);
  if (a.ratio == 2) write_words<2>(a, cut);
  if (a.ratio == 4) write_words<4>(a, cut);
  if (a.ratio == 8) write_words<8>(a, cut);
}
