// The kernels for AVX-512 F, BW, VL and DQ; this file alone is compiled with those flags.

#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && defined(__AVX512DQ__)

#include <immintrin.h>

namespace fluxion {
namespace {

#include "simd_avx512.h"
#include "ints_avx512.h"
// The order matters: each of these builds on the names above it.
#include "exp_impl.h"
#include "kernels_impl.h"
#include "merge_impl.h"
#include "score_impl.h"
#include "selection_impl.h"
#include "union_impl.h"

constexpr KernelTable kTable = {"avx512",
                                {attend<float>, attend<BFloat16>, attend<Float16>},
                                merge, score, fold_heads, select, find_chunks, list_chunk};

}  // namespace

const KernelTable* avx512_kernels() { return &kTable; }

}  // namespace fluxion

#else

namespace fluxion {
const KernelTable* avx512_kernels() { return nullptr; }
}  // namespace fluxion

#endif
