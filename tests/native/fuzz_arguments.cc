// Any bytes are a program: sizes, values and an order of calls. libFuzzer searches through them
// (fluxion_fuzz, with Clang); test_fuzz.cc tries a fixed set of random ones with any compiler.
//
// Whatever the values, an operation either refuses them and changes nothing, or does what it
// should inside of its arrays; which of the two is known. These have exactly the sizes they must have, so that AddressSanitizer
// sees every step beyond.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "cases.h"
#include "operations.h"
#include "runtime.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

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
  g.dtype = static_cast<DType>(in.below(kDTypes));
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

struct Tick {
  int32_t words[2];
  bool valid;  // Whether its submit was given nothing that has to be refused.

  bool operator==(const Tick& other) const {
    return words[0] == other.words[0] && words[1] == other.words[1];
  }
};

// The rules of host_ops/types.py, once more.
bool work_is_valid(const Case& c, const WorkView& work) {
  const Geometry& g = c.g;
  bool valid = work.cancel == 0;  // No cancel word is ever made here.
  for (int64_t b = 0; b < g.batch; ++b) {
    valid &= c.host_blocks[b] >= 0 && c.host_blocks[b] <= g.blocks;
    if (c.host_blocks[b] == 0 || work.bitmap != nullptr) continue;
    for (int64_t task = b * g.kv_heads; task < (b + 1) * g.kv_heads; ++task) {
      const int32_t unit = c.granularity[task];
      const bool known = unit == 16 || unit == 32 || unit == 64 || unit == 128;
      valid &= known || c.boundary[task] <= 0;
    }
  }
  return valid;
}

bool flush_is_valid(const Case& c) {
  bool valid = true;
  for (int64_t b = 0; b < c.g.batch; ++b) {
    const bool none = c.num_blocks[b] == 0;
    const bool inside = c.first_block[b] >= 0 && c.first_block[b] < c.g.blocks;
    const int64_t shifts = c.g.kv_heads * c.g.head_dim;
    const bool grows = std::all_of(c.shift.begin() + b * shifts, c.shift.begin() + (b + 1) * shifts,
                                   [](int32_t shift) { return shift >= 0; });
    valid &= none || (c.num_blocks[b] == 1 && inside && grows);
  }
  return valid;
}

bool all_finite(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

void check_collect(Case& c, const Tick& tick, bool in_place) {
  const Geometry& g = c.g;
  const Stored before = c.k;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> out(g.batch * g.heads * g.head_dim, nan);
  std::vector<float> lse(g.batch * g.heads, nan);
  std::vector<float> times(kTimes, nan);
  std::vector<int32_t> blocks_read(g.batch * g.kv_heads, -1);
  std::vector<int32_t> units_scanned(g.batch * g.kv_heads, -1);
  std::vector<uint32_t> selection(g.batch * g.heads * g.words(), 0xdeadbeef);
  int32_t status = -1;
  collect(tick.words, g, c.cache(), c.flush(), in_place ? kOk : kNotInPlace,
          {out.data(), lse.data(), &status, times.data(), blocks_read.data(),
           units_scanned.data(), selection.data()});
  const uint32_t refused = tick.valid && flush_is_valid(c) ? kOk : kInvalid;
  EXPECT(static_cast<uint32_t>(status) == (refused | (in_place ? kOk : kNotInPlace)));
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
  EXPECT(status == (flush_is_valid(c) ? kOk : kInvalid));
  EXPECT(status == kOk || c.k == before);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  const Geometry g = read_geometry(in);
  Case c = make_case(g, in.byte());
  std::mt19937 rng(in.byte());
  const auto bitmap = integers<uint32_t>(rng, g.batch * g.heads * g.words(), 0, UINT32_MAX);
  std::vector<Tick> open;
  for (int step = 0; step < 12 && (in.more() || !open.empty()); ++step) {
    read_values(in, &c);
    const int64_t operation = in.more() ? in.below(6) : 2;
    Tick tick{{in.value(), in.value()}, false};
    if (std::find(open.begin(), open.end(), tick) != open.end()) continue;
    if (!open.empty() && in.below(8) != 7) tick = open.back();
    if (operation < 2) {
      WorkView work = c.work();
      work.cancel = in.below(4) == 3 ? in.value() : 0;
      if (in.below(3) == 0) work.bitmap = bitmap.data();
      const auto lease = std::make_shared<std::atomic<bool>>(false);
      fill(reserve(tick.words), g, work, c.cache(), c.scale, rng() % 2 == 0 ? lease : nullptr);
      tick.valid = work_is_valid(c, work);
      open.push_back(tick);
      if (operation == 0) start(tick.words, [] {});
    } else if (operation < 4) {
      if (!open.empty() && tick == open.back()) open.pop_back();
      check_collect(c, tick, in.below(8) != 7);
    } else {
      if (operation == 4) start(tick.words, [] {});
      // What is submitted reads the cache until it is collected.
      if (operation == 5 && open.empty()) check_append(c);
    }
  }
  for (const Tick& tick : open) check_collect(c, tick, true);
  return 0;
}
