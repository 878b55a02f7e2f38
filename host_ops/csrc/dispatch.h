// Chooses the kernels of the running CPU.

#ifndef FLUXION_DISPATCH_H_
#define FLUXION_DISPATCH_H_

#include <string>

#include "kernels.h"

namespace fluxion {

// The best variant this CPU and build support, or the one named by FLUXION_CPU_VARIANT (scalar,
// avx2, avx512, avx512_vnni) if it is among them. Chosen on the first call and kept. Any thread.
const KernelTable& kernels();

// The kernels of a named variant, or null if this CPU or build lacks it.
const KernelTable* find_kernels(const std::string& name);

// Names of the usable variants, best first, separated by commas.
const char* variant_names();

// Empty, or why FLUXION_CPU_VARIANT was not followed.
const char* variant_problem();

}  // namespace fluxion

#endif  // FLUXION_DISPATCH_H_
