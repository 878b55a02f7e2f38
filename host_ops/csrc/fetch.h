// Asking for memory before it is needed.
//
// A layer streams so much through the caches that all else is cold afterwards. Asked for at once, its
// lines arrive together; used one after the other, each would be waited for.

#ifndef FLUXION_FETCH_H_
#define FLUXION_FETCH_H_

#include <cstdint>

namespace fluxion {

inline void fetch(const void* data, int64_t bytes) {
  const char* first = static_cast<const char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i);
  // Data need not begin where a line does.
  if (bytes > 0) __builtin_prefetch(first + bytes - 1);
}

inline void fetch_to_write(void* data, int64_t bytes) {
  char* first = static_cast<char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, 1);
  if (bytes > 0) __builtin_prefetch(first + bytes - 1, 1);
}

}  // namespace fluxion

#endif  // FLUXION_FETCH_H_
