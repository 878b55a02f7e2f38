// Random inputs and the plain meaning of the operations, in double precision, one loop per axis.

#ifndef FLUXION_TESTS_CASES_H_
#define FLUXION_TESTS_CASES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "types.h"

namespace fluxion_tests {

using namespace fluxion;

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

inline float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Rounds to nearest, ties to even, like the framework's cast.
inline uint16_t to_float16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | 0x7e00;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= 65520.0) return sign | 0x7c00;
  // The step between neighbours is 2^-24 up to 2^-14 and grows with the exponent from there on.
  const int step = std::max(magnitude == 0.0 ? -14 : std::ilogb(magnitude), -14) - 10;
  const auto steps = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, -step)));
  return sign | static_cast<uint16_t>(steps + ((step + 24) << 10));
}

inline float from_float16(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int fraction = half & 1023;
  const double sign = half >> 15 != 0 ? -1.0 : 1.0;
  if (exponent == 31) {
    return static_cast<float>(fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                                            : sign * std::numeric_limits<double>::infinity());
  }
  const int whole = exponent == 0 ? fraction : fraction + 1024;
  return static_cast<float>(sign * std::ldexp(whole, std::max(exponent, 1) - 25));
}

// Elements stored as the cache stores them, read back as float.
struct Stored {
  DType dtype = DType::kFloat32;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  void assign(DType type, const std::vector<float>& values) {
    dtype = type;
    const bool wide = type == DType::kFloat32;
    floats.assign(wide ? values.size() : 0, 0.0f);
    halves.assign(wide ? 0 : values.size(), 0);
    for (size_t i = 0; i < values.size(); ++i) set(static_cast<int64_t>(i), values[i]);
  }
  void* data() {
    return dtype == DType::kFloat32 ? static_cast<void*>(floats.data()) : halves.data();
  }
  float at(int64_t i) const {
    if (dtype == DType::kFloat32) return floats[i];
    return dtype == DType::kBFloat16 ? from_bfloat16(halves[i]) : from_float16(halves[i]);
  }
  void set(int64_t i, float x) {
    if (dtype == DType::kFloat32) {
      floats[i] = x;
    } else {
      halves[i] = dtype == DType::kBFloat16 ? to_bfloat16(x) : to_float16(x);
    }
  }
  bool operator==(const Stored& other) const {
    return floats == other.floats && halves == other.halves;
  }
};

inline std::vector<float> normals(std::mt19937& rng, int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (float& x : values) x = normal(rng);
  return values;
}

template <typename T>
std::vector<T> integers(std::mt19937& rng, int64_t count, int64_t low, int64_t high) {
  std::uniform_int_distribution<int64_t> uniform(low, high);
  std::vector<T> values(count);
  for (T& x : values) x = static_cast<T>(uniform(rng));
  return values;
}

// One layer's cache and one request on it.
struct Case {
  Geometry g;
  Stored k, v;
  std::vector<int8_t> summaries;
  std::vector<float> q;
  std::vector<int8_t> q8;
  std::vector<int32_t> granularity, k_units, shared, host_blocks, boundary;
  float scale = 0.0f;

  // A flush of nothing, of capacity 1.
  std::vector<int8_t> flush_summaries;
  Stored flush_k, flush_v;
  std::vector<int32_t> shift, first_block, num_blocks;

  CacheView cache() { return {k.data(), v.data(), summaries.data()}; }

  WorkView work() const {
    WorkView view;
    view.q = q.data();
    view.q8 = q8.data();
    view.granularity = granularity.data();
    view.k_units = k_units.data();
    view.shared = shared.data();
    view.host_blocks = host_blocks.data();
    view.boundary = boundary.data();
    return view;
  }

  FlushView flush() {
    FlushView view;
    view.capacity = 1;
    view.k = flush_k.data();
    view.v = flush_v.data();
    view.summaries = flush_summaries.data();
    view.shift = shift.data();
    view.first_block = first_block.data();
    view.num_blocks = num_blocks.data();
    return view;
  }
};

inline Case make_case(Geometry g, uint32_t seed = 0) {
  std::mt19937 rng(seed);
  Case c;
  c.g = g;
  c.scale = 1.0f / std::sqrt(static_cast<float>(g.head_dim));
  const int64_t tasks = g.batch * g.kv_heads;
  c.k.assign(g.dtype, normals(rng, tasks * g.task_elements()));
  c.v.assign(g.dtype, normals(rng, tasks * g.task_elements()));
  c.summaries = integers<int8_t>(rng, tasks * g.summary_rows() * 2 * g.head_dim, -127, 127);
  c.q = normals(rng, g.batch * g.heads * g.head_dim);
  c.q8 = integers<int8_t>(rng, g.batch * g.heads * g.head_dim, -127, 127);
  c.granularity.resize(tasks);
  for (int32_t& unit : c.granularity) unit = 16 << rng() % 4;
  c.k_units = integers<int32_t>(rng, g.batch * g.heads, 0, g.blocks / 2);
  c.shared = integers<int32_t>(rng, tasks, 0, 1);
  c.host_blocks = integers<int32_t>(rng, g.batch, g.blocks / 2, g.blocks);
  c.boundary = integers<int32_t>(rng, tasks, -1, g.blocks + 8);
  c.flush_k.assign(g.dtype, normals(rng, tasks * g.block_elements()));
  c.flush_v.assign(g.dtype, normals(rng, tasks * g.block_elements()));
  c.flush_summaries = integers<int8_t>(rng, tasks * 2 * g.head_dim, -127, 127);
  c.shift.assign(tasks * g.head_dim, 0);
  c.first_block.assign(g.batch, 0);
  c.num_blocks.assign(g.batch, 0);
  return c;
}

// Everything selected and read by the host.
inline void select_all(Case* c) {
  c->k_units.assign(c->k_units.size(), static_cast<int32_t>(c->g.blocks));
  c->host_blocks.assign(c->host_blocks.size(), static_cast<int32_t>(c->g.blocks));
  c->boundary.assign(c->boundary.size(), static_cast<int32_t>(c->g.blocks));
}

// Attention of one head over a set of blocks of one (sequence, KV head).
struct State {
  std::vector<double> out;
  double lse = -std::numeric_limits<double>::infinity();
};

inline State attend_plainly(const Case& c, int64_t batch, int64_t head,
                            const std::set<int32_t>& blocks) {
  const Geometry& g = c.g;
  const int64_t base = (batch * g.kv_heads + head / g.group()) * g.task_elements();
  State state;
  state.out.assign(g.head_dim, 0.0);
  std::vector<double> scores;
  double top = -std::numeric_limits<double>::infinity();
  for (const int32_t block : blocks) {
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      double score = 0.0;
      for (int64_t i = 0; i < g.head_dim; ++i) {
        score += static_cast<double>(c.q[(batch * g.heads + head) * g.head_dim + i]) *
                 c.k.at(base + (block * kBlockTokens + t) * g.head_dim + i);
      }
      scores.push_back(score * c.scale);
      top = std::max(top, scores.back());
    }
  }
  if (scores.empty()) return state;
  double sum = 0.0;
  size_t token = 0;
  for (const int32_t block : blocks) {
    for (int64_t t = 0; t < kBlockTokens; ++t, ++token) {
      const double weight = std::exp(scores[token] - top);
      sum += weight;
      for (int64_t i = 0; i < g.head_dim; ++i) {
        state.out[i] += weight * c.v.at(base + (block * kBlockTokens + t) * g.head_dim + i);
      }
    }
  }
  for (double& x : state.out) x /= sum;
  state.lse = top + std::log(sum);
  return state;
}

}  // namespace fluxion_tests

#endif  // FLUXION_TESTS_CASES_H_
