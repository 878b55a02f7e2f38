// Any bytes are a program: sizes, values and an order of calls. libFuzzer searches through them
// (fluxion_fuzz, with Clang); test_fuzz.cc tries a fixed set of random ones with any compiler.
//
// Whatever the values, an operation either refuses them and changes nothing, or does what it
// should inside of its arrays. These have exactly the sizes they must have, so that AddressSanitizer
// sees every step beyond.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cases.h"
#include "operations.h"
#include "runtime.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

constexpr uint32_t kKnown = kInvalid | kCancelled | kTimeout | kInternal | kNotInPlace;

#define EXPECT(condition)                                                             \
  if (!(condition)) {                                                                 \
    std::fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition);     \
    std::abort();                                                                     \
  }

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool more() const { return left_ > 0; }
  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  int64_t below(int64_t bound) { return byte() % bound; }
  // Mostly what could be meant, and now and then what breaks things.
  int32_t value() {
    constexpr int32_t kOdd[] = {INT32_MIN, INT32_MIN + 1, -128, -1, 16, 32, 48, 64, 127, 128, 129,
                                1 << 16,   1 << 30,       INT32_MAX - 15, INT32_MAX - 1, INT32_MAX};
    const uint8_t kind = byte();
    return kind < 160 ? kind % 20 : kOdd[kind % 16];
  }
  void fill(std::vector<int32_t>* values, int32_t usual) {
    for (int32_t& x : *values) x = byte() < 200 ? usual : value();
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

Geometry read_geometry(Bytes& in) {
  Geometry g;
  g.batch = 1 + in.below(2);
  g.kv_heads = 1 + in.below(2);
  g.heads = g.kv_heads * (1 + in.below(3));
  g.head_dim = 8 * (1 + in.below(3));
  g.blocks = 8 * (1 + in.below(6));
  g.dtype = in.below(2) == 0 ? DType::kFloat32 : DType::kBFloat16;
  return g;
}

void read_values(Bytes& in, Case* c) {
  in.fill(&c->granularity, 16 << in.below(4));
  in.fill(&c->k_units, in.value());
  in.fill(&c->shared, static_cast<int32_t>(in.below(2)));
  in.fill(&c->host_blocks, static_cast<int32_t>(in.below(c->g.blocks + 1)));
  in.fill(&c->boundary, in.value());
  in.fill(&c->shift, static_cast<int32_t>(in.below(2)));
  in.fill(&c->first_block, static_cast<int32_t>(in.below(c->g.blocks)));
  in.fill(&c->num_blocks, static_cast<int32_t>(in.below(2)));
}

bool all_finite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

void check_collect(Case& c, const int32_t tick[2], const Geometry& g, bool in_place) {
  const Stored before = c.k;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> out(g.batch * g.heads * g.head_dim, nan);
  std::vector<float> lse(g.batch * g.heads, nan);
  std::vector<float> times(kTimes, nan);
  std::vector<int32_t> blocks_read(g.batch * g.kv_heads, -1);
  std::vector<int32_t> units_scanned(g.batch * g.kv_heads, -1);
  std::vector<uint32_t> selection(g.batch * g.heads * g.words(), 0xdeadbeef);
  int32_t status = -1;
  collect(tick, g, c.cache(), c.flush(), in_place,
          {out.data(), lse.data(), &status, times.data(), blocks_read.data(),
           units_scanned.data(), selection.data()});
  EXPECT((status & ~static_cast<int32_t>(kKnown)) == 0);
  EXPECT(all_finite(out) && all_finite(times));
  for (const int32_t read : blocks_read) EXPECT(read >= 0 && read <= g.blocks);
  for (const int32_t scanned : units_scanned) EXPECT(scanned >= 0 && scanned <= g.blocks);
  if (status == kOk) return;
  EXPECT(c.k == before);
  for (const float x : out) EXPECT(x == 0.0f);
  for (const float x : lse) EXPECT(std::isinf(x) && x < 0);
  for (const uint32_t word : selection) EXPECT(word == 0);
}

void check_append(Case& c) {
  const Stored before = c.k;
  const uint32_t status = append(c.g, c.cache(), c.flush());
  EXPECT((status & ~kKnown) == 0);
  EXPECT(status == kOk || c.k == before);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  const Geometry g = read_geometry(in);
  Case c = make_case(g, in.byte());
  std::mt19937 rng(in.byte());
  const auto bitmap = integers<uint32_t>(rng, g.batch * g.heads * g.words(), 0, UINT32_MAX);
  struct Tick {
    int32_t words[2];
  };
  std::vector<Tick> open;
  for (int step = 0; step < 12 && (in.more() || !open.empty()); ++step) {
    read_values(in, &c);
    const int64_t operation = in.more() ? in.below(6) : 2;
    Tick tick = open.empty() || in.below(8) == 7 ? Tick{{in.value(), in.value()}} : open.back();
    if (operation < 2) {
      WorkView work = c.work();
      work.cancel = in.below(4) == 3 ? in.value() : 0;
      if (in.below(3) == 0) work.bitmap = bitmap.data();
      submit(g, work, c.cache(), c.scale, tick.words);
      open.push_back(tick);
      if (operation == 0) start(tick.words, [] {});
    } else if (operation < 4) {
      if (!open.empty() && std::equal(tick.words, tick.words + 2, open.back().words)) {
        open.pop_back();
      }
      check_collect(c, tick.words, g, in.below(8) != 7);
    } else {
      if (operation == 4) start(tick.words, [] {});
      // What is submitted reads the cache until it is collected.
      if (operation == 5 && open.empty()) check_append(c);
    }
  }
  for (const Tick& tick : open) check_collect(c, tick.words, g, true);
  return 0;
}
