// What the framework asks for in one call: checked shapes and plain arrays, none of its own types.
//
// A call owns nothing. Where the framework runs on a device, the arrays of a call other than those
// of the cache are the device's until they have been staged (cuda_operations.cc).

#ifndef FLUXION_CALLS_H_
#define FLUXION_CALLS_H_

#include <cstdint>

#include "operations.h"
#include "types.h"

namespace fluxion {

// Where a call finds its sequences: B consecutive rows of arrays that may hold several layers.
struct Rows {
  int64_t total = 0;               // Rows of the cache's arrays.
  const int32_t* first = nullptr;  // [1], the call's first row; null where there are no others.
};

struct AppendCall {
  Geometry g;
  Rows rows;
  CacheView cache;
  CacheView result;  // Where the framework wants the cache; the same unless it was not donated.
  FlushView flush;
  int32_t* status = nullptr;  // [1]
};

struct SubmitCall {
  Geometry g;
  Rows rows;
  CacheView cache;
  WorkView work;                    // All but the cancel word.
  const int32_t* cancel = nullptr;  // [1]
  float scale = 1.0f;
  int32_t* tick = nullptr;  // [2]
  Results results;          // Null where collect has them.
};

struct CollectCall {
  Geometry g;
  Rows rows;
  CacheView cache;
  CacheView result;  // As for append.
  FlushView flush;
  const int32_t* tick = nullptr;  // [2]
  Results given;                  // Those of submit; null where it had none.
  CollectOut out{};
};

// The rows of a call within its arrays; nothing is moved where `first` is out of range.
inline bool choose_rows(const Geometry& g, const Rows& rows, CacheView* cache) {
  if (rows.first == nullptr) return true;
  const int64_t first = *rows.first;
  if (first < 0 || first > rows.total - g.batch) return false;
  const int64_t elements = first * g.kv_heads * g.task_elements();
  cache->k = static_cast<char*>(cache->k) + elements * element_bytes(g.dtype);
  cache->v = static_cast<char*>(cache->v) + elements * element_bytes(g.dtype);
  if (cache->summaries != nullptr) {
    cache->summaries += first * g.kv_heads * g.summary_rows() * 2 * g.head_dim;
  }
  return true;
}

inline bool same_place(const CacheView& a, const CacheView& b) {
  return a.k == b.k && a.v == b.v && a.summaries == b.summaries;
}

}  // namespace fluxion

#endif  // FLUXION_CALLS_H_
