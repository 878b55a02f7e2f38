// Exact selection of the best units, written once over the `Ints` of an instruction set.
//
// The cut between chosen and not chosen is narrowed down, and one pass compares and writes the bitmap.
// Many scores are first thinned out: a sample brackets the cut between two values, and one pass
// keeps the scores between them; then again, until few are left. What a sample says can only cost
// time: where the bracket misses, all scores are kept.
//
// Expects write_units of widen_impl.h and of an ints_*.h: all, load, load_part, store, max_of, min_of,
// reduce_max, reduce_min, above, equal, add_above (adds 1 to the lanes whose number is above),
// reduce_add, append (stores the named lanes next to each other and returns how many; may write a
// whole vector).

constexpr int32_t kLowest = -2147483647 - 1;
constexpr int32_t kHighest = 2147483647;
// Narrowing down so many takes no longer than thinning them out.
constexpr int64_t kFew = 768;
constexpr int64_t kSamples = 64;
constexpr int64_t kSlack = 2;  // How many samples an end of the bracket may be off.
// Vectors that are counted together, so that their sums do not wait for each other.
constexpr int64_t kTogether = 4;
// Values for which something else is fetched meanwhile.
constexpr int64_t kStride = 64;
constexpr int64_t kMultiple = kTogether * Ints::kLanes;
static_assert(kMultiple <= kSelectPadding && kSamples % kMultiple == 0, "");

// Exactly `wanted` scores are above the threshold or among the first `ties` that equal it.
struct Cut {
  int32_t threshold;
  int64_t ties;
};

// A threshold, and how many values are above it.
struct Found {
  int32_t threshold;
  int64_t above;
};

inline int32_t low_bits(int64_t n) {
  return n >= 32 ? -1 : static_cast<int32_t>((uint32_t{1} << n) - 1);
}

// Makes the length a multiple of kMultiple with values that are above nothing.
inline int64_t pad(int32_t* values, int64_t count) {
  for (int64_t i = 0; i < kMultiple; i += Ints::kLanes) store(values + count + i, all(kLowest));
  return (count + kMultiple - 1) / kMultiple * kMultiple;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
// In place of a branch that would be guessed wrong every other time: `a` where `bits` are all set, `b`
// where none is.
inline int64_t chosen(int64_t bits, int64_t a, int64_t b) { return (a & bits) | (b & ~bits); }

// How many values are above each of two thresholds.
struct Counts {
  int64_t first;
  int64_t second;
};

inline Counts count_above(const int32_t* values, int64_t padded, int32_t first, int32_t second) {
  const Ints limits[2] = {all(first), all(second)};
  Ints counts[2][kTogether];
  for (auto& some : counts) {
    for (Ints& count : some) count = all(0);
  }
  for (int64_t i = 0; i < padded; i += kMultiple) {
    for (int64_t j = 0; j < kTogether; ++j) {
      const Ints v = load(values + i + j * Ints::kLanes);
      counts[0][j] = add_above(counts[0][j], v, limits[0]);
      counts[1][j] = add_above(counts[1][j], v, limits[1]);
    }
  }
  return {reduce_add(counts[0]), reduce_add(counts[1])};
}

// A threshold in [low, high] with `least` to `most` of the values above it if there is one, otherwise
// one close by; and then how many are above. All `count` values are in [low, high].
//
// A pass tries two thresholds: where a straight line between what is known of both ends would put
// it, which is close for most scores, and the middle, so that no scores take more passes than
// bisection.
inline Found find_near(const int32_t* values, int64_t count, int64_t padded, int64_t least,
                       int64_t most, int64_t low, int64_t high) {
  int64_t above_low = count;  // Of those not below `low`.
  int64_t above_high = 0;
  const auto within = [&](int64_t number) {
    return static_cast<uint64_t>(number - least) <= static_cast<uint64_t>(most - least);
  };
  const auto narrow = [&](int64_t threshold, int64_t number) {
    const int64_t fewer = (number - least) >> 63;
    high = chosen(fewer, smaller(threshold, high), high);
    above_high = chosen(fewer, larger(number, above_high), above_high);
    low = chosen(fewer, low, larger(threshold + 1, low));
    above_low = chosen(fewer, above_low, smaller(number, above_low));
  };
  while (low < high) {
    const int64_t width = high - low;
    const float share =
        static_cast<float>(above_low - least) / static_cast<float>(above_low - above_high);
    const int64_t way = static_cast<int64_t>(share * static_cast<float>(width));
    const int32_t guess = static_cast<int32_t>(low + smaller(way, width - 1));
    const int32_t middle = static_cast<int32_t>(low + width / 2);
    const Counts above = count_above(values, padded, guess, middle);
    if (within(above.first)) return {guess, above.first};
    if (within(above.second)) return {middle, above.second};
    narrow(guess, above.first);
    narrow(middle, above.second);
  }
  return {static_cast<int32_t>(low), above_high};
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

// The cut behind the wanted-th largest value, 0 < wanted <= count.
inline Cut find_cut(int32_t* values, int64_t count, int64_t wanted) {
  int32_t low, high;
  find_range(values, count, &low, &high);
  const Found found = find_near(values, count, pad(values, count), wanted, wanted, low, high);
  return {found.threshold, wanted - found.above};
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
    const int64_t more = rank + margin;
    *low = find_near(samples, kSamples, kSamples, more, more + kSlack, least, most).threshold;
  }
  // Where few are above the bracket, keeping them is cheaper than telling them from the others.
  if (rank >= 2 * margin) {
    const int64_t fewer = rank - margin;
    *high = find_near(samples, kSamples, kSamples, fewer - kSlack, fewer, least, most).threshold;
  }
}

// Copies the values above `low` but not above `high` to `kept`, which may be `values`; returns how
// many, and how many are above `high`. `kTop`: `high` is kHighest. Before each kStride values `ahead`
// is told which.
template <bool kTop, typename Ahead>
inline int64_t keep_between(const int32_t* values, int64_t count, int32_t low, int32_t high,
                            const Ahead& ahead, int32_t* kept, int64_t* over) {
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
  for (; i + kStride <= count; i += kStride) {
    ahead(i);
    for (int64_t j = i; j < i + kStride; j += Ints::kLanes) keep(load(values + j));
  }
  for (; i + Ints::kLanes <= count; i += Ints::kLanes) keep(load(values + i));
  keep(load_part(values + i, count - i, kLowest));
  return number;
}

// Asks for the words of kStride units, a line at most, to write to them. They were last read on other
// CPUs. Asked for all at once, they would keep the scores waiting.
inline void fetch_words(const SelectArgs& a, int64_t unit) {
  __builtin_prefetch(a.words + unit * a.ratio / 32, 1);
}

// Thins the scores out to the scratch until few are left, of which the *wanted best count. Returns
// how many are left, or 0 if a sample misled.
inline int64_t thin_out(const SelectArgs& a, int64_t* wanted) {
  const int32_t* values = a.scores;
  int64_t count = a.units;
  const auto keep = [&](const auto& ahead, int64_t* over) {
    int32_t low, high;
    bracket(values, count, *wanted, &low, &high);
    return high == kHighest
               ? keep_between<true>(values, count, low, high, ahead, a.scratch, over)
               : keep_between<false>(values, count, low, high, ahead, a.scratch, over);
  };
  const auto fetch_ahead = [&](int64_t unit) {
    fetch_words(a, unit);
    if (a.next == nullptr) return;
    for (int64_t i = 0; i < kStride; i += 16) __builtin_prefetch(a.next + unit + i);
  };
  while (count > kFew) {
    int64_t over;
    const int64_t kept = values == a.scores ? keep(fetch_ahead, &over) : keep([](int64_t) {}, &over);
    if (over >= *wanted || over + kept < *wanted || kept == count) return 0;
    *wanted -= over;
    count = kept;
    values = a.scratch;
  }
  return count;
}

// Copies all scores to the scratch.
inline void keep_all(const SelectArgs& a) {
  int64_t u = 0;
  for (; u + Ints::kLanes <= a.units; u += Ints::kLanes) store(a.scratch + u, load(a.scores + u));
  store(a.scratch + u, load_part(a.scores + u, a.units - u, kLowest));
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
  int64_t wanted = a.wanted;
  int64_t kept = 0;
  if (a.units > kFew) {
    kept = thin_out(a, &wanted);
  } else {
    for (int64_t unit = 0; unit < a.units; unit += kStride) fetch_words(a, unit);
  }
  if (kept == 0) {
    keep_all(a);
    kept = a.units;
    wanted = a.wanted;
  }
  const Cut cut = find_cut(a.scratch, kept, wanted);
  if (a.ratio == 1) write_words<1>(a, cut);
  if (a.ratio == 2) write_words<2>(a, cut);
  if (a.ratio == 4) write_words<4>(a, cut);
  if (a.ratio == 8) write_words<8>(a, cut);
}
