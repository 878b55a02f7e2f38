// Exact selection of the best units, written once over the `Ints` of an instruction set.
//
// The cut between chosen and not chosen is bisected, and one pass compares and writes the bitmap.
// Many scores are first thinned out: a sample brackets the cut between two values, and one pass
// keeps the scores between them. What the sample says can only cost time: where the bracket misses,
// all scores are kept.
//
// Expects of an ints_*.h: all, load, load_part, store, max_of, min_of, reduce_*, above, equal,
// count_above, within (low <= v <= low + span, the span without a sign), append (stores the named
// lanes next to each other and returns how many; may write a whole vector), bytes_of_bits (each of
// 32 bits repeated eight times).

constexpr int32_t kLowest = -2147483647 - 1;
constexpr int32_t kHighest = 2147483647;
// Up to so many units bisecting all of them takes no longer than thinning them out.
constexpr int64_t kSampledUnits = 512;
constexpr int64_t kSamples = 128;

// Exactly `wanted` scores are above the threshold or among the first `ties` that equal it.
struct Cut {
  int32_t threshold;
  int64_t ties;
};

inline int32_t low_bits(int64_t n) {
  return n >= 32 ? -1 : static_cast<int32_t>((uint32_t{1} << n) - 1);
}

// Makes the length a multiple of the vector's with values that are above nothing.
inline int64_t pad(int32_t* values, int64_t count) {
  store(values + count, all(kLowest));
  return (count + Ints::kLanes - 1) / Ints::kLanes * Ints::kLanes;
}

inline int64_t number_above(const int32_t* values, int64_t padded, int32_t threshold) {
  const Ints limit = all(threshold);
  Ints count = all(0);
  for (int64_t i = 0; i < padded; i += Ints::kLanes) {
    count = count_above(count, load(values + i), limit);
  }
  return reduce_add(count);
}

// The cut behind the wanted-th largest value, 0 < wanted <= count, which is in [low, high].
inline Cut find_cut(const int32_t* values, int64_t padded, int64_t wanted, int32_t low,
                    int32_t high) {
  while (low < high) {
    const int32_t middle =
        static_cast<int32_t>(low + (static_cast<int64_t>(high) - low) / 2);
    const int64_t count = number_above(values, padded, middle);
    if (count == wanted) return {middle, 0};
    // Without a branch, which would be guessed wrong every other time.
    const bool fewer = count < wanted;
    high = fewer ? middle : high;
    low = fewer ? low : middle + 1;
  }
  return {low, wanted - number_above(values, padded, low)};
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

// Two values that most likely have the cut between them.
inline void bracket(const SelectArgs& a, int32_t* low, int32_t* high) {
  // Multiples of the golden ratio spread evenly and follow no period of the scores.
  for (int64_t i = 0; i < kSamples; ++i) {
    const uint64_t place = static_cast<uint32_t>(i * 2654435769u);
    a.scratch[i] = a.scores[place * static_cast<uint64_t>(a.units) >> 32];
  }
  int32_t least, most;
  find_range(a.scratch, kSamples, &least, &most);
  const float share = static_cast<float>(a.wanted) / static_cast<float>(a.units);
  const int64_t rank = static_cast<int64_t>(share * kSamples);
  // Three standard deviations of the rank in the sample, and one for what rounding takes.
  const int64_t margin =
      1 + static_cast<int64_t>(3 * __builtin_sqrtf(kSamples * share * (1 - share)));
  *high = kHighest;
  *low = kLowest;
  if (rank - margin > 0) {
    *high = find_cut(a.scratch, kSamples, rank - margin, least, most).threshold;
  }
  if (rank + margin < kSamples) {
    *low = find_cut(a.scratch, kSamples, rank + margin, least, most).threshold;
  }
}

// Copies the scores in [low, high] to the scratch; returns how many, and how many are above.
inline int64_t keep_between(const SelectArgs& a, int32_t low, int32_t high, int64_t* over) {
  const Ints bottom = all(low);
  const Ints top = all(high);
  const Ints span = all(static_cast<int32_t>(static_cast<uint32_t>(high) -
                                             static_cast<uint32_t>(low)));
  Ints count = all(0);
  int64_t kept = 0;
  int64_t u = 0;
  for (; u + Ints::kLanes <= a.units; u += Ints::kLanes) {
    const Ints v = load(a.scores + u);
    count = count_above(count, v, top);
    kept += append(a.scratch + kept, v, within(v, bottom, span));
  }
  const Ints v = load_part(a.scores + u, a.units - u, kLowest);
  count = count_above(count, v, top);
  kept += append(a.scratch + kept, v, within(v, bottom, span) & low_bits(a.units - u));
  *over = reduce_add(count);
  return kept;
}

// Copies all scores to the scratch.
inline void keep_all(const SelectArgs& a) {
  int64_t u = 0;
  for (; u + Ints::kLanes <= a.units; u += Ints::kLanes) store(a.scratch + u, load(a.scores + u));
  store(a.scratch + u, load_part(a.scores + u, a.units - u, kLowest));
}

// Repeats each of the lowest 32 / kRatio bits kRatio times.
template <int kRatio>
inline uint32_t widen_bits(uint32_t bits) {
  for (int half = 16 / kRatio; half > 0; half /= 2) {
    const uint32_t every = 0xffffffffu / ((uint64_t{1} << half * kRatio) - 1);
    bits = (bits | bits << half * (kRatio - 1)) & every * ((1u << half) - 1);
  }
  return bits * ((1u << kRatio) - 1);
}

// Of `count` scores as many as a vector has, then values that are above nothing.
inline Ints load_some(const int32_t* scores, int64_t count) {
  return count >= Ints::kLanes ? load(scores) : load_part(scores, count, kLowest);
}

template <int kRatio>
inline void write_words(const SelectArgs& a, Cut cut) {
  const Ints threshold = all(cut.threshold);
  for (int64_t first = 0; first < a.units; first += 32) {
    const int64_t count = a.units - first < 32 ? a.units - first : 32;
    uint32_t best = 0;
    for (int i = 0; i < 32; i += Ints::kLanes) {
      best |= above(load_some(a.scores + first + i, count - i), threshold) << i;
    }
    if (cut.ties > 0) {
      uint32_t tied = 0;
      for (int i = 0; i < 32; i += Ints::kLanes) {
        tied |= equal(load_some(a.scores + first + i, count - i), threshold) << i;
      }
      tied &= low_bits(count);
      int64_t number = __builtin_popcount(tied);
      for (; number > cut.ties; --number) tied &= ~(0x80000000u >> __builtin_clz(tied));
      cut.ties -= number;
      best |= tied;
    }
    uint32_t* words = a.words + first * kRatio / 32;
    if (kRatio == 8 && count == 32) {
      bytes_of_bits(best, words);
      continue;
    }
    for (int64_t i = 0; i * 32 < count * kRatio; ++i) {
      constexpr uint32_t kPart = static_cast<uint32_t>((uint64_t{1} << 32 / kRatio) - 1);
      words[i] = widen_bits<kRatio>(best >> i * (32 / kRatio) & kPart);
    }
  }
}

void select(const SelectArgs& a) {
  int64_t over = 0;
  int64_t kept = 0;
  int32_t low, high;
  if (a.units > kSampledUnits) {
    bracket(a, &low, &high);
    kept = keep_between(a, low, high, &over);
  }
  if (over >= a.wanted || over + kept < a.wanted) {
    keep_all(a);
    kept = a.units;
    over = 0;
  }
  find_range(a.scratch, kept, &low, &high);
  const Cut cut = find_cut(a.scratch, pad(a.scratch, kept), a.wanted - over, low, high);
  if (a.ratio == 1) write_words<1>(a, cut);
  if (a.ratio == 2) write_words<2>(a, cut);
  if (a.ratio == 4) write_words<4>(a, cut);
  if (a.ratio == 8) write_words<8>(a, cut);
}
