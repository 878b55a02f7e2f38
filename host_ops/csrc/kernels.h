// The table of inner loops, one per instruction set, chosen once per process by dispatch.cc.
//
// Every entry is pure: it reads its arguments, writes its outputs, keeps no state and may run on
// any thread. Within one variant the same arguments give the same bits.

#ifndef FLUXION_KERNELS_H_
#define FLUXION_KERNELS_H_

#include <cstdint>

#include "types.h"

namespace fluxion {

// Attention of one group over up to a chunk of blocks.
struct AttendArgs {
  const void* k;                // [P, C, H] of the (sequence, KV head).
  const void* v;                // Likewise.
  const float* q;               // [G, H]
  const int32_t* blocks;        // [count], ids of the blocks to read.
  const uint64_t* head_masks;   // [count], bit g: head g attends to the block.
  int32_t count;
  int32_t group;
  int32_t head_dim;
  float scale;                  // Scores are scale * (q . k).
  float* scratch;               // [G, count * C], for scores; contents are not kept.
  float* m;                     // [G] out: largest score, -inf if the head has no block.
  float* l;                     // [G] out: sum of exp(score - m).
  float* acc;                   // [G, H] out: sum of exp(score - m) * v, not normalised.
  int32_t next;                 // A block whose keys will be read next and may be fetched, or -1.
};

// States of one group, of which the first becomes all of them together.
struct MergeArgs {
  float* states;        // Each is m [G], l [G], acc [G, H] as AttendArgs has them.
  int64_t stride;       // From one state to the next.
  int32_t count;        // At least 1.
  int32_t group;
  int32_t head_dim;
};

// Exact integer upper bounds of one group over consecutive summary rows.
struct ScoreArgs {
  const int8_t* q8;     // [G, H]
  const int8_t* rows;   // [count, 2, H], lo then hi.
  int64_t count;
  int32_t group;
  int32_t head_dim;
  uint8_t* scratch;     // [G, 2, H], for the split queries; contents are not kept.
  int32_t* scores;      // [G, stride] out: sum over H of max(q8 * lo, q8 * hi).
  int64_t stride;
};

// The best units of one head, ties to the lowest id.
struct SelectArgs {
  const int32_t* scores;  // [units]
  int64_t units;
  int64_t wanted;         // 0 < wanted < units.
  int64_t ratio;          // Blocks of a unit: 1, 2, 4 or 8.
  const int32_t* next;    // [units], what will be ranked next and may be fetched, or null.
  int32_t* scratch;       // [units + kSelectPadding]; contents are not kept.
  uint32_t* words;        // [ceil(units * ratio / 32)] out: bit of every block of those units.
};

constexpr int64_t kSelectPadding = 64;

// What one part of attention reads: chunks of the union, by ascending id. The first are small; they
// are begun last, so that threads end together. A thread alone takes some 5 us for 4 blocks of head
// size 128, and so long the others may have to wait for the last chunk of a layer: 8 chunks are of 4
// blocks, 8 of 8, 16 of 16, 32 of 32, and all others of 64.
constexpr int64_t kMinChunkBlocks = 4;
constexpr int64_t kMaxChunkBlocks = 64;

// How many blocks lie before a chunk. Static, like the next: of inline functions the linker might
// pick one that was compiled with wide instructions.
static inline constexpr int64_t chunk_begin(int64_t chunk) {
  if (chunk <= 8) return chunk * 4;
  if (chunk <= 16) return chunk * 8 - 32;
  if (chunk <= 32) return chunk * 16 - 160;
  if (chunk <= 64) return chunk * 32 - 672;
  return chunk * 64 - 2720;
}

// Chunks of a union of so many blocks; the last may be cut.
static inline int64_t chunks_of(int64_t blocks) {
  if (blocks <= 32) return (blocks + 3) / 4;
  if (blocks <= 96) return (blocks + 32 + 7) / 8;
  if (blocks <= 352) return (blocks + 160 + 15) / 16;
  if (blocks <= 1376) return (blocks + 672 + 31) / 32;
  return (blocks + 2720 + 63) / 64;
}

// The selections of a group, whose union is read in chunks.
struct UnionArgs {
  const uint32_t* rows;  // [G, stride], bit of every block.
  int64_t stride;
  int32_t group;
  int64_t limit;         // Blocks from this one on do not count.
};

// Where a chunk begins: behind the `skip` lowest blocks of the union in the words from
// `word` on.
struct ChunkStart {
  int32_t word;
  int32_t skip;
};
constexpr int64_t kMoreStarts = 2;

struct KernelTable {
  const char* name;
  void (*attend[kDTypes])(const AttendArgs&);  // By DType of K and V.
  void (*merge)(const MergeArgs&);
  void (*score)(const ScoreArgs&);
  void (*fold_heads)(const ScoreArgs&);  // Row 0 of the scores becomes the maximum over the heads.
  void (*select)(const SelectArgs&);
  // Returns the blocks of the union. `starts` has room for chunks_of(limit) + kMoreStarts; what is
  // behind those of the union means nothing.
  int64_t (*find_chunks)(const UnionArgs&, ChunkStart* starts);
  // Writes `count` blocks of the union, and which heads selected them, from a chunk's start on.
  void (*list_chunk)(const UnionArgs&, ChunkStart start, int32_t count, int32_t* blocks,
                     uint64_t* head_masks);
};

// Null where the variant was not compiled for this architecture.
const KernelTable* scalar_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx512_vnni_kernels();

}  // namespace fluxion

#endif  // FLUXION_KERNELS_H_
