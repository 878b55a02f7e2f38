// Many small copies in one go, in the order of a stream.
//
// A kernel of ours copies up to kMaxCopies arrays at once, straight to and from pinned memory: each
// copy of the driver's would cost the device some microseconds. Where the kernel cannot be loaded,
// and for large arrays, the driver copies.

#ifndef FLUXION_CUDA_COPY_H_
#define FLUXION_CUDA_COPY_H_

#include <cstdint>

#include "cuda_driver.h"

namespace fluxion {

constexpr int kMaxCopies = 16;

// As the kernel reads it.
struct CudaCopy {
  uint64_t to;
  uint64_t from;
  uint64_t words;  // Of 4 bytes.
};

struct CudaCopies {
  CudaCopy items[kMaxCopies] = {};
  int count = 0;
  int open = 0;             // Of them, those added before the gate.
  uint64_t gate = 0;        // Words of the device's memory; 0 for none.
  uint32_t gate_words = 0;

  // `bytes` is a multiple of 4. Nothing to copy is left out.
  void add(void* to, const void* from, int64_t bytes) {
    if (bytes == 0) return;
    items[count++] = {reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from),
                      static_cast<uint64_t>(bytes) / 4};
  }

  // What is added from here on need not be copied if all of these words are 0 when the stream gets
  // there: the kernel leaves it out then, the driver does not.
  void add_gate(const void* words, int64_t count_of_words) {
    open = count;
    gate = reinterpret_cast<uint64_t>(words);
    gate_words = static_cast<uint32_t>(count_of_words);
  }
};

// The kernel in the current context, for one stream, or null.
CudaDriver::Function load_copy_kernel(const CudaDriver& driver);

// Enqueues the copies; `kernel` may be null. Returns the driver's error.
int enqueue_copies(const CudaDriver& driver, CudaDriver::Function kernel,
                   CudaDriver::Stream stream, const CudaCopies& copies);

// The words of pinned memory by which a kernel calls the host and hears from it; addresses may be 0.
struct CudaSignal {
  uint64_t signalled = 0;  // Written once the operands have been copied.
  uint64_t awaited = 0;    // Waited for, until it has reached `value` by difference.
  uint32_t value = 0;
};

// Copies operands, signals, waits, and copies results, all by one kernel, which must not be null and
// keeps a few thousand threads of the device waiting. `launched` says whether the kernel will run,
// also after an error.
int enqueue_exchange(const CudaDriver& driver, CudaDriver::Function kernel,
                     CudaDriver::Stream stream, const CudaCopies& operands,
                     const CudaCopies& results, const CudaSignal& signal, bool* launched);

}  // namespace fluxion

#endif  // FLUXION_CUDA_COPY_H_
