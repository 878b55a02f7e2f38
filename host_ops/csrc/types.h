// Nouns, units and ownership rules shared by every file of the host library.
//
// Axes: B batch, N query heads, K KV heads, G = N / K query heads of one KV head (a group),
// H head size, P blocks of C = 16 tokens, U summary rows of all four granularities,
// M blocks written at once, W = ceil(P / 32) words of a selection bitmap.
// Arrays are dense and row-major. Sizes and offsets are 64-bit; ids of blocks and units are 32-bit.
// A view owns nothing: its arrays belong to the caller and outlive the call (`append`) or the time
// from submit to collect (K, V and summaries of a slot, and what is lent to it).

#ifndef FLUXION_TYPES_H_
#define FLUXION_TYPES_H_

#include <atomic>
#include <cstdint>
#include <memory>

namespace fluxion {

constexpr int64_t kBlockTokens = 16;
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxGroup = 64;  // Head masks are one 64-bit word.
constexpr int kLevels = 4;         // Granularities of 16, 32, 64 and 128 tokens.

// Statuses travel as data and are OR-ed; the same bits as in host_ops/types.py.
enum Status : uint32_t {
  kOk = 0,
  kInvalid = 1,
  kCancelled = 2,
  kTimeout = 4,
  kInternal = 8,
  kNotInPlace = 16,
};

enum class DType { kFloat32, kBFloat16, kFloat16 };
constexpr int kDTypes = 3;

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Row of the summaries where the units of level `level` (16 << level tokens) begin.
inline int64_t level_offset(int64_t blocks, int level) {
  return 2 * blocks - (2 * blocks >> level);
}

// Sizes of one layer's cache and of the queries that attend to it.
struct Geometry {
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t blocks = 0;
  DType dtype = DType::kFloat32;

  int64_t group() const { return heads / kv_heads; }
  int64_t words() const { return (blocks + 31) / 32; }
  int64_t summary_rows() const { return level_offset(blocks, kLevels); }
  int64_t block_elements() const { return kBlockTokens * head_dim; }
  // Elements of K (or V) that belong to one (sequence, KV head).
  int64_t task_elements() const { return blocks * block_elements(); }

  bool operator==(const Geometry& other) const {
    return batch == other.batch && heads == other.heads && kv_heads == other.kv_heads &&
           head_dim == other.head_dim && blocks == other.blocks && dtype == other.dtype;
  }
};

// The host arrays of one layer.
struct CacheView {
  void* k = nullptr;              // [B, K, P, C, H]
  void* v = nullptr;              // [B, K, P, C, H]
  int8_t* summaries = nullptr;    // [B, K, U, 2, H], or null when they live on the device.
};

// What one step asks for; `host_ops/types.py` describes the fields.
struct WorkView {
  const float* q = nullptr;               // [B, N, H]
  const int8_t* q8 = nullptr;             // [B, N, H]
  const int32_t* granularity = nullptr;   // [B, K]
  const int32_t* k_units = nullptr;       // [B, N]
  const int32_t* shared = nullptr;        // [B, K]
  const int32_t* host_blocks = nullptr;   // [B]
  const int32_t* boundary = nullptr;      // [B, K]
  int32_t cancel = 0;
  const uint32_t* bitmap = nullptr;       // [B, N, W], or null when the host selects; with it q8,
                                          // granularity, k_units and shared are not looked at.
  const int32_t* status = nullptr;        // [1], unless it is 0 no row has blocks; null for 0.
};

// Whether arrays are lent to a slot, whose request reads them where they lie. Until this is false
// again their owner leaves them as they are. Shared, because owner and slot may each outlive the other.
using Lease = std::shared_ptr<std::atomic<bool>>;

// Blocks that leave the resident window.
struct FlushView {
  int64_t capacity = 0;                   // M
  const void* k = nullptr;                // [B, K, M, C, H]
  const void* v = nullptr;                // [B, K, M, C, H]
  const int8_t* summaries = nullptr;      // [B, K, M, 2, H]
  const int32_t* shift = nullptr;         // [B, K, H]
  const int32_t* first_block = nullptr;   // [B]
  const int32_t* num_blocks = nullptr;    // [B]
};

// Where results go.
struct Results {
  float* out = nullptr;  // [B, N, H]
  float* lse = nullptr;  // [B, N]
};

}  // namespace fluxion

#endif  // FLUXION_TYPES_H_
