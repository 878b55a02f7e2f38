// The portable kernels, which every CPU can run.

#include "kernels.h"

namespace fluxion {
namespace {

#include "simd_scalar.h"
#include "ints_scalar.h"
// The order matters: each of these builds on the names above it.
#include "exp_impl.h"
#include "kernels_impl.h"
#include "merge_impl.h"
#include "score_scalar.h"
#include "selection_impl.h"
#include "union_impl.h"

constexpr KernelTable kTable = {"scalar",
                                {attend<float>, attend<BFloat16>, attend<Float16>},
                                merge, score, fold_heads, select, find_chunks, list_chunk};

}  // namespace

const KernelTable* scalar_kernels() { return &kTable; }

}  // namespace fluxion
