// What a spinning thread does between two looks.

#ifndef FLUXION_RELAX_H_
#define FLUXION_RELAX_H_

namespace fluxion {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace fluxion

#endif  // FLUXION_RELAX_H_
