// Exact selection of the best units of a query head, as a bitmap over blocks.

#ifndef FLUXION_SELECTION_H_
#define FLUXION_SELECTION_H_

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace fluxion {

// Sets in `words` the blocks of the `wanted` best of `units` units by score, ties to the lowest id.
//
// A unit is `ratio` blocks (1, 2, 4 or 8), the last one may be cut at `host_blocks`. `wanted` is
// clipped to [0, units]; if that is none or all of them, `scores` is not read. Writes
// ceil(host_blocks / 32) words. `next` may be null or the scores of the next call, as many, which are
// then fetched meanwhile. `scratch` grows as needed and keeps nothing.
void select_top(const KernelTable& table, const int32_t* scores, int64_t units, int64_t wanted,
                int64_t ratio, int64_t host_blocks, const int32_t* next, uint32_t* words,
                std::vector<int32_t>* scratch);

}  // namespace fluxion

#endif  // FLUXION_SELECTION_H_
