// Merging states of attention, against double precision, for every instruction set of this CPU.

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "kernels.h"

using namespace fluxion;

namespace {

const char* const kVariants[] = {"scalar", "avx2", "avx512", "avx512_vnni"};
const float kNothing = -std::numeric_limits<float>::infinity();

struct States {
  int32_t group, head_dim, count;
  int64_t stride;
  std::vector<float> values;

  // `gap` floats between states say nothing, and nobody may write there.
  States(int32_t group, int32_t head_dim, int32_t count, int64_t gap = 0)
      : group(group), head_dim(head_dim), count(count),
        stride(group * (2 + static_cast<int64_t>(head_dim)) + gap), values(count * stride) {
    std::mt19937 random(group * 1000 + head_dim + count);
    std::normal_distribution<float> normal;
    for (float& x : values) x = normal(random);
    for (int32_t c = 0; c < count; ++c) {
      for (int32_t h = 0; h < group; ++h) {
        m(c)[h] = 30.0f * normal(random);
        l(c)[h] = 1.0f + std::abs(normal(random));
      }
    }
  }
  float* m(int32_t c) { return values.data() + c * stride; }
  float* l(int32_t c) { return m(c) + group; }
  float* acc(int32_t c, int32_t h) { return m(c) + 2 * group + h * head_dim; }
  void empty(int32_t c, int32_t h) {
    m(c)[h] = kNothing;
    l(c)[h] = 0.0f;
    std::fill_n(acc(c, h), head_dim, 0.0f);
  }
  void merge(const KernelTable& table) {
    table.merge({values.data(), stride, count, group, head_dim});
  }
};

void check_merged(const KernelTable& table, States states) {
  States before = states;
  states.merge(table);
  for (int32_t h = 0; h < before.group; ++h) {
    double top = kNothing, sum = 0.0;
    for (int32_t c = 0; c < before.count; ++c) top = std::max<double>(top, before.m(c)[h]);
    CHECK_EQ(states.m(0)[h], static_cast<float>(top));
    std::vector<double> row(before.head_dim, 0.0);
    for (int32_t c = 0; c < before.count; ++c) {
      const double weight = top == kNothing ? 0.0 : std::exp(before.m(c)[h] - top);
      sum += weight * before.l(c)[h];
      for (int32_t i = 0; i < before.head_dim; ++i) row[i] += weight * before.acc(c, h)[i];
    }
    CHECK_CLOSE(states.l(0)[h], sum, 1e-6 * (1.0 + sum));
    for (int32_t i = 0; i < before.head_dim; ++i) CHECK_CLOSE(states.acc(0, h)[i], row[i], 4e-6);
  }
  const int64_t first = before.group * (2 + static_cast<int64_t>(before.head_dim));
  for (size_t i = first; i < before.values.size(); ++i) {
    CHECK_EQ(states.values[i], before.values[i]);
  }
}

}  // namespace

TEST(merging_equals_double_precision) {
  for (const char* variant : kVariants) {
    const KernelTable* table = find_kernels(variant);
    if (table == nullptr) continue;
    for (const int32_t group : {1, 3, 4, 7, 8, 16, 64}) {
      for (const int32_t head_dim : {8, 72, 96, 128}) {
        for (const int32_t count : {1, 2, 8}) {
          States states(group, head_dim, count, count == 2 ? 5 : 0);
          check_merged(*table, states);
          // A head of nothing at all, and states of nothing before, among and behind others.
          for (int32_t c = 0; c < count; ++c) states.empty(c, 0);
          states.empty(0, group - 1);
          states.empty(count - 1, group / 2);
          check_merged(*table, states);
        }
      }
    }
  }
}

TEST(what_is_not_finite_survives_a_merge) {
  for (const char* variant : kVariants) {
    const KernelTable* table = find_kernels(variant);
    if (table == nullptr) continue;
    for (const int32_t where : {0, 1, 2}) {
      States states(4, 72, 3);
      // So far below the others that it weighs nothing.
      states.m(where)[1] = -1e30f;
      states.acc(where, 1)[71] = std::numeric_limits<float>::quiet_NaN();
      states.acc(where, 2)[3] = std::numeric_limits<float>::infinity();
      states.m(where)[2] = 200.0f;
      states.l(where)[3] = std::numeric_limits<float>::quiet_NaN();
      states.merge(*table);
      CHECK(std::isnan(states.acc(0, 1)[71]));
      CHECK(std::isfinite(states.acc(0, 1)[70]));
      CHECK(std::isinf(states.acc(0, 2)[3]));
      CHECK(std::isfinite(states.acc(0, 2)[2]));
      CHECK(std::isnan(states.l(0)[3]));
      CHECK(std::isfinite(states.acc(0, 3)[0]));
      CHECK(std::isfinite(states.l(0)[0]));
    }
  }
}
