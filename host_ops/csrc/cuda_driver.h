// The few functions of the CUDA driver that the host side calls, found when they are needed.
//
// Nothing of CUDA is needed to build the library. The declarations are our own; pointers to device
// memory are 64-bit numbers, as in the driver, and every function returns 0 if it succeeded.

#ifndef FLUXION_CUDA_DRIVER_H_
#define FLUXION_CUDA_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace fluxion {

struct CudaDriver {
  using Stream = void*;
  using Context = void*;
  using Module = void*;
  using Function = void*;

  int (*stream_context)(Stream, Context*) = nullptr;
  int (*push_context)(Context) = nullptr;
  int (*pop_context)(Context*) = nullptr;
  int (*copy)(uint64_t to, uint64_t from, size_t bytes, Stream) = nullptr;
  int (*query_stream)(Stream) = nullptr;
  int (*launch_host_function)(Stream, void (*)(void*), void*) = nullptr;
  int (*allocate_host)(void**, size_t bytes, unsigned flags) = nullptr;
  int (*pointer_attribute)(void*, int attribute, uint64_t pointer) = nullptr;
  int (*error_string)(int, const char**) = nullptr;
  // Null if the driver lacks them.
  int (*load_module)(Module*, const void* image) = nullptr;
  int (*get_function)(Function*, Module, const char* name) = nullptr;
  int (*launch_kernel)(Function, unsigned blocks_x, unsigned blocks_y, unsigned blocks_z,
                       unsigned threads_x, unsigned threads_y, unsigned threads_z,
                       unsigned shared_bytes, Stream, void** arguments, void** extra) = nullptr;
  int (*write_value)(Stream, uint64_t address, uint32_t value, unsigned flags) = nullptr;
  int (*wait_value)(Stream, uint64_t address, uint32_t value, unsigned flags) = nullptr;

  // What an error code means, in the driver's words.
  std::string describe(int code) const;

  // Whether the memory is a device's own, which no CPU may read.
  bool on_device(const void* pointer) const;
};

// Loads the driver from a library. Returns what is missing, or nothing.
std::string load_cuda_driver(const char* library, CudaDriver* driver);

// The driver of this process, loaded at first use; null, with the reason, if there is none.
const CudaDriver* cuda_driver(std::string* problem);

}  // namespace fluxion

#endif  // FLUXION_CUDA_DRIVER_H_
