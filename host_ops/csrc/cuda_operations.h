// append, submit and collect in the order of a CUDA stream.
//
// The arrays of the cache are pinned host memory and used where they lie; all others are the
// device's and staged. The calls return when everything is enqueued, with what is wrong with the
// program, or nothing. What is wrong with data becomes a status, as on the CPU.

#ifndef FLUXION_CUDA_OPERATIONS_H_
#define FLUXION_CUDA_OPERATIONS_H_

#include <string>

#include "calls.h"
#include "cuda_stream.h"

namespace fluxion {

std::string enqueue_append(CudaStream& stream, AppendCall call);
// Begins the tasks, too, as soon as the stream gets there.
std::string enqueue_submit(CudaStream& stream, SubmitCall call);
// The stream waits until the host share is there.
std::string enqueue_collect(CudaStream& stream, CollectCall call);

}  // namespace fluxion

#endif  // FLUXION_CUDA_OPERATIONS_H_
