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

// Asks for a line and for the right to write to it. Without it a line that another core has written
// comes to be shared, and the first write has to ask once more. The compiler takes the instruction
// only where it is told that there is one; CPUs of 64 bits that lack it take it for none.
inline void fetch_line_to_write(char* line) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*line));
#else
  __builtin_prefetch(line, 1);
#endif
}

inline void fetch_to_write(void* data, int64_t bytes) {
  char* first = static_cast<char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) fetch_line_to_write(first + i);
  if (bytes > 0) fetch_line_to_write(first + bytes - 1);
}

}  // namespace fluxion

#endif  // FLUXION_FETCH_H_
