#include <algorithm>

#include "append.h"
#include "cases.h"
#include "check.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

struct Flush {
  int64_t capacity = 0;
  Stored k, v;
  std::vector<int8_t> summaries;
  std::vector<int32_t> shift, first_block, num_blocks;

  FlushView view() {
    FlushView view;
    view.capacity = capacity;
    view.k = k.data();
    view.v = v.data();
    view.summaries = summaries.data();
    view.shift = shift.data();
    view.first_block = first_block.data();
    view.num_blocks = num_blocks.data();
    return view;
  }
};

Flush make_flush(const Geometry& g, int64_t capacity, uint32_t seed) {
  std::mt19937 rng(seed);
  const int64_t tasks = g.batch * g.kv_heads;
  Flush f;
  f.capacity = capacity;
  f.k.assign(g.dtype, normals(rng, tasks * capacity * g.block_elements()));
  f.v.assign(g.dtype, normals(rng, tasks * capacity * g.block_elements()));
  f.summaries = integers<int8_t>(rng, tasks * capacity * 2 * g.head_dim, -128, 127);
  f.shift = integers<int32_t>(rng, tasks * g.head_dim, -20, 3);
  for (int32_t& s : f.shift) s = std::max(s, 0) + (rng() % 50 == 0 ? 200 : 0);
  f.num_blocks = integers<int32_t>(rng, g.batch, 0, capacity);
  for (int64_t b = 0; b < g.batch; ++b) {
    f.first_block.push_back(static_cast<int32_t>(rng() % (g.blocks - f.num_blocks[b] + 1)));
  }
  return f;
}

double floor_shift(int value, int shift) { return std::floor(std::ldexp(value, -shift)); }

// Row by row in double; `rows` is int8 [U, 2, H] of one task.
void append_plainly(const Geometry& g, int8_t* rows, const int8_t* summaries, const int32_t* shift,
                    int64_t first, int64_t count) {
  for (int level = 0; level < kLevels; ++level) {
    const int64_t per_unit = int64_t{1} << level;
    int8_t* base = rows + level_offset(g.blocks, level) * 2 * g.head_dim;
    for (int64_t u = 0; u * per_unit < first; ++u) {
      for (int64_t c = 0; c < g.head_dim; ++c) {
        int8_t* lo = base + u * 2 * g.head_dim + c;
        int8_t* hi = lo + g.head_dim;
        *lo = static_cast<int8_t>(floor_shift(*lo, shift[c]));
        *hi = static_cast<int8_t>(-floor_shift(-*hi, shift[c]));
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = first + i;
      for (int64_t c = 0; c < g.head_dim; ++c) {
        int8_t* lo = base + block / per_unit * 2 * g.head_dim + c;
        int8_t* hi = lo + g.head_dim;
        const int8_t new_lo = summaries[i * 2 * g.head_dim + c];
        const int8_t new_hi = summaries[(i * 2 + 1) * g.head_dim + c];
        const bool opens = block % per_unit == 0;
        *lo = opens ? new_lo : std::min(*lo, new_lo);
        *hi = opens ? new_hi : std::max(*hi, new_hi);
      }
    }
  }
}

}  // namespace

TEST(append_writes_what_it_should_and_nothing_else) {
  // The last geometry is large enough to be shared over the pool.
  const Geometry shapes[] = {{2, 6, 3, 24, 40, DType::kFloat32},
                             {3, 2, 2, 64, 16, DType::kBFloat16},
                             {2, 4, 4, 128, 64, DType::kFloat16}};
  Pool pool(3);
  for (const Geometry& g : shapes) {
    for (uint32_t seed = 0; seed < 4; ++seed) {
      Case c = make_case(g, seed);
      Case want = c;
      Flush f = make_flush(g, g.blocks / 2, seed);
      CHECK_EQ(validate_flush(g, f.view()), uint32_t{kOk});
      write_flush(g, c.cache(), f.view(), &pool);
      for (int64_t task = 0; task < g.batch * g.kv_heads; ++task) {
        const int64_t b = task / g.kv_heads;
        const int64_t first = f.first_block[b];
        for (int64_t i = 0; i < f.num_blocks[b] * g.block_elements(); ++i) {
          const int64_t to = (task * g.blocks + first) * g.block_elements() + i;
          want.k.set(to, f.k.at(task * f.capacity * g.block_elements() + i));
          want.v.set(to, f.v.at(task * f.capacity * g.block_elements() + i));
        }
        if (f.num_blocks[b] == 0) continue;
        append_plainly(g, want.summaries.data() + task * g.summary_rows() * 2 * g.head_dim,
                       f.summaries.data() + task * f.capacity * 2 * g.head_dim,
                       f.shift.data() + task * g.head_dim, first, f.num_blocks[b]);
      }
      CHECK(c.k == want.k);
      CHECK(c.v == want.v);
      CHECK(c.summaries == want.summaries);
    }
  }
}

TEST(append_without_summaries_leaves_them_alone) {
  Case c = make_case({1, 2, 1, 16, 16, DType::kFloat32});
  const std::vector<int8_t> before = c.summaries;
  Flush f = make_flush(c.g, 4, 0);
  f.num_blocks = {3};
  f.first_block = {5};
  Pool pool(1);
  CacheView cache = c.cache();
  cache.summaries = nullptr;
  write_flush(c.g, cache, f.view(), &pool);
  CHECK(c.summaries == before);
  CHECK_EQ(c.k.at(5 * c.g.block_elements()), f.k.at(0));
}

TEST(append_refuses_what_is_out_of_range) {
  const Geometry g{2, 2, 1, 16, 16, DType::kFloat32};
  const auto status = [&](int32_t first, int32_t count, int32_t shift) {
    Flush f = make_flush(g, 4, 0);
    f.shift.assign(f.shift.size(), 0);
    f.shift.back() = shift;
    f.first_block = {0, first};
    f.num_blocks = {0, count};
    return validate_flush(g, f.view());
  };
  CHECK_EQ(status(12, 4, 0), uint32_t{kOk});
  CHECK_EQ(status(-7, 0, 0), uint32_t{kOk});
  CHECK_EQ(status(13, 4, 0), uint32_t{kInvalid});
  CHECK_EQ(status(-1, 1, 0), uint32_t{kInvalid});
  CHECK_EQ(status(0, 5, 0), uint32_t{kInvalid});
  CHECK_EQ(status(0, -1, 0), uint32_t{kInvalid});
  CHECK_EQ(status(0, 1, -1), uint32_t{kInvalid});
  CHECK_EQ(status(0, 0, -1), uint32_t{kOk});
  CHECK_EQ(status(INT32_MAX, 4, 0), uint32_t{kInvalid});
}
