// The kernels for AVX2 with FMA and F16C; this file alone is compiled with those flags.

#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace fluxion {
namespace {

#include "simd_avx2.h"
#include "ints_avx2.h"
// The order matters: each of these builds on the names above it.
#include "exp_impl.h"
#include "kernels_impl.h"
#include "merge_impl.h"
#include "score_impl.h"
#include "selection_impl.h"
#include "union_impl.h"

constexpr KernelTable kTable = {"avx2",
                                {attend<float>, attend<BFloat16>, attend<Float16>},
                                merge, score, fold_heads, select, find_chunks, list_chunk};

}  // namespace

const KernelTable* avx2_kernels() { return &kTable; }

}  // namespace fluxion

#else

namespace fluxion {
const KernelTable* avx2_kernels() { return nullptr; }
}  // namespace fluxion

#endif
