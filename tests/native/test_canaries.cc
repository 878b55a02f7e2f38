// Every buffer of every operation lies between pages that must not be touched.

#include <atomic>
#include <thread>

#include "cases.h"
#include "check.h"
#include "guarded.h"
#include "operations.h"

using namespace fluxion;
using namespace fluxion_tests;

namespace {

// A case whose arrays are guarded, and the results of its collect.
class GuardedCase {
 public:
  explicit GuardedCase(Case& c) : g_(c.g), scale_(c.scale) {
    cache_ = {keep(guard(c.k)), keep(guard(c.v)), keep(guard(c.summaries))};
    WorkView& work = work_;
    work.q = keep<float>(guard(c.q));
    work.q8 = keep<int8_t>(guard(c.q8));
    work.granularity = keep<int32_t>(guard(c.granularity));
    work.k_units = keep<int32_t>(guard(c.k_units));
    work.shared = keep<int32_t>(guard(c.shared));
    work.host_blocks = keep<int32_t>(guard(c.host_blocks));
    work.boundary = keep<int32_t>(guard(c.boundary));
    flush_.capacity = 1;
    flush_.k = keep(guard(c.flush_k));
    flush_.v = keep(guard(c.flush_v));
    flush_.summaries = keep<int8_t>(guard(c.flush_summaries));
    flush_.shift = keep<int32_t>(guard(c.shift));
    flush_.first_block = keep<int32_t>(guard(c.first_block));
    flush_.num_blocks = keep<int32_t>(guard(c.num_blocks));
    inputs_ = buffers_.size();
    const int64_t rows = g_.batch * g_.heads;
    const int64_t tasks = g_.batch * g_.kv_heads;
    tick_ = room<int32_t>(2);
    out_ = {room<float>(rows * g_.head_dim), room<float>(rows),    room<int32_t>(1),
            room<float>(kTimes),             room<int32_t>(tasks), room<int32_t>(tasks),
            room<uint32_t>(rows * g_.words())};
  }

  void give_bitmap(const std::vector<uint32_t>& bitmap) {
    work_.bitmap = keep<uint32_t>(guard(bitmap));
    cache_.summaries = nullptr;
  }

  // Submit and the tasks may write nothing that was given to them.
  int32_t run() {
    for (size_t i = 0; i < inputs_; ++i) buffers_[i]->freeze();
    submit(g_, work_, cache_, scale_, tick_);
    std::atomic<bool> finished{false};
    if (start(tick_, [&] { finished = true; })) {
      while (!finished) std::this_thread::yield();
    }
    for (size_t i = 0; i < 3; ++i) buffers_[i]->thaw();
    collect(tick_, g_, cache_, flush_, kOk, out_);
    return *out_.status;
  }

  uint32_t append() {
    for (size_t i = 3; i < inputs_; ++i) buffers_[i]->freeze();
    return fluxion::append(g_, cache_, flush_);
  }

  bool intact() const {
    return std::all_of(buffers_.begin(), buffers_.end(), [](const auto& b) { return b->intact(); });
  }

  const CollectOut& out() const { return out_; }

 private:
  template <typename T = int8_t>
  T* keep(std::unique_ptr<Guarded> buffer) {
    buffers_.push_back(std::move(buffer));
    return buffers_.back()->as<T>();
  }
  template <typename T>
  T* room(int64_t count) {
    return keep<T>(std::make_unique<Guarded>(count * static_cast<int64_t>(sizeof(T))));
  }

  Geometry g_;
  float scale_;
  std::vector<std::unique_ptr<Guarded>> buffers_;  // The cache's three come first.
  size_t inputs_ = 0;
  CacheView cache_;
  WorkView work_;
  FlushView flush_;
  int32_t* tick_ = nullptr;
  CollectOut out_{};
};

// Head sizes that are no multiple of a vector, groups of one and of many, several parts a stage.
const Geometry kShapes[] = {{1, 1, 1, 8, 8, DType::kFloat32},    {2, 6, 3, 24, 40, DType::kFloat32},
                            {1, 14, 2, 64, 136, DType::kBFloat16}, {2, 4, 1, 128, 64, DType::kBFloat16},
                            {1, 4, 1, 256, 40, DType::kFloat32}, {1, 3, 1, 8, 1160, DType::kBFloat16},
                            {1, 16, 1, 96, 72, DType::kBFloat16},   {1, 3, 1, 40, 40, DType::kFloat16}};

}  // namespace

TEST(canaries_around_every_buffer_of_a_step) {
  for (const Geometry& g : kShapes) {
    for (uint32_t seed = 0; seed < 4; ++seed) {
      Case c = make_case(g, seed);
      // The last block of the cache is read and written.
      c.host_blocks.back() = static_cast<int32_t>(g.blocks);
      c.boundary.back() = static_cast<int32_t>(g.blocks);
      if (seed == 3) select_all(&c);
      c.num_blocks.assign(g.batch, 1);
      c.first_block.assign(g.batch, static_cast<int32_t>(g.blocks) - 1);
      c.shift.assign(c.shift.size(), seed % 2);
      GuardedCase guarded(c);
      CHECK_EQ(guarded.run(), 0);
      CHECK(guarded.intact());
      for (int64_t i = 0; i < g.batch * g.heads * g.head_dim; ++i) {
        CHECK(std::isfinite(guarded.out().out[i]));
      }
    }
  }
}

TEST(canaries_around_every_buffer_of_a_given_selection) {
  for (const Geometry& g : kShapes) {
    Case c = make_case(g, 9);
    c.boundary.assign(c.boundary.size(), static_cast<int32_t>(g.blocks));
    std::mt19937 rng(9);
    GuardedCase guarded(c);
    guarded.give_bitmap(integers<uint32_t>(rng, g.batch * g.heads * g.words(), 0, UINT32_MAX));
    CHECK_EQ(guarded.run(), 0);
    CHECK(guarded.intact());
  }
}

TEST(canaries_around_every_buffer_of_an_append) {
  for (const Geometry& g : kShapes) {
    for (const int32_t first : {0, static_cast<int32_t>(g.blocks) - 1}) {
      Case c = make_case(g, 2);
      c.num_blocks.assign(g.batch, 1);
      c.first_block.assign(g.batch, first);
      c.shift.assign(c.shift.size(), 1);
      GuardedCase guarded(c);
      CHECK_EQ(guarded.append(), uint32_t{kOk});
      CHECK(guarded.intact());
    }
  }
}
