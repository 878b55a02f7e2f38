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

struct AppendCall {
  Geometry g;
  CacheView cache;
  CacheView result;  // Where the framework wants the cache; the same unless it was not donated.
  FlushView flush;
  int32_t* status = nullptr;  // [1]
};

struct SubmitCall {
  Geometry g;
  CacheView cache;
  WorkView work;                    // All but the cancel word.
  const int32_t* cancel = nullptr;  // [1]
  float scale = 1.0f;
  int32_t* tick = nullptr;  // [2]
};

struct CollectCall {
  Geometry g;
  CacheView cache;
  CacheView result;  // As for append.
  FlushView flush;
  const int32_t* tick = nullptr;  // [2]
  CollectOut out{};
};

inline bool same_place(const CacheView& a, const CacheView& b) {
  return a.k == b.k && a.v == b.v && a.summaries == b.summaries;
}

}  // namespace fluxion

#endif  // FLUXION_CALLS_H_
