// Writing blocks into the host cache: K, V, and the summaries of all granularities.

#ifndef FLUXION_APPEND_H_
#define FLUXION_APPEND_H_

#include <cstdint>

#include "pool.h"
#include "types.h"

namespace fluxion {

// kInvalid if a row count, or of a row with blocks an id or a shift, is out of range, otherwise kOk.
uint32_t validate_flush(const Geometry& geometry, const FlushView& flush);

// Writes a valid flush, shared over the pool if it is large; the calling thread helps and returns
// when all is written. Without summaries in `cache` only K and V are written. Does not throw.
void write_flush(const Geometry& geometry, const CacheView& cache, const FlushView& flush,
                 Pool* pool) noexcept;

}  // namespace fluxion

#endif  // FLUXION_APPEND_H_
