#include "cuda_driver.h"

#include <dlfcn.h>

namespace fluxion {
namespace {

constexpr int kMemoryType = 2;    // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
constexpr unsigned kDevice = 2;   // CU_MEMORYTYPE_DEVICE

template <typename Function>
void find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
}

struct Loaded {
  CudaDriver driver;
  std::string problem = load_cuda_driver("libcuda.so.1", &driver);
};

}  // namespace

std::string CudaDriver::describe(int code) const {
  const char* text = nullptr;
  if (error_string == nullptr || error_string(code, &text) != 0 || text == nullptr) {
    text = "no description";
  }
  return "CUDA error " + std::to_string(code) + " (" + text + ")";
}

bool CudaDriver::on_device(const void* pointer) const {
  unsigned type = 0;
  // Memory that the driver does not know is the process's own.
  return pointer_attribute(&type, kMemoryType, reinterpret_cast<uint64_t>(pointer)) == 0 &&
         type == kDevice;
}

std::string load_cuda_driver(const char* path, CudaDriver* driver) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    return std::string("expected the CUDA driver at ") + path + ", got " +
           (reason != nullptr ? reason : "nothing") + "; install the NVIDIA driver";
  }
  find(library, "cuStreamGetCtx", &driver->stream_context);
  find(library, "cuCtxPushCurrent_v2", &driver->push_context);
  find(library, "cuCtxPopCurrent_v2", &driver->pop_context);
  find(library, "cuMemcpyAsync", &driver->copy);
  find(library, "cuLaunchHostFunc", &driver->launch_host_function);
  find(library, "cuStreamQuery", &driver->query_stream);
  find(library, "cuModuleLoadData", &driver->load_module);
  find(library, "cuModuleGetFunction", &driver->get_function);
  find(library, "cuLaunchKernel", &driver->launch_kernel);
  find(library, "cuMemHostAlloc", &driver->allocate_host);
  find(library, "cuPointerGetAttribute", &driver->pointer_attribute);
  find(library, "cuGetErrorString", &driver->error_string);
  find(library, "cuStreamWriteValue32_v2", &driver->write_value);
  find(library, "cuStreamWaitValue32_v2", &driver->wait_value);
  const bool complete = driver->stream_context && driver->push_context && driver->pop_context &&
                        driver->copy && driver->query_stream && driver->launch_host_function &&
                        driver->allocate_host && driver->pointer_attribute &&
                        driver->error_string;
  if (complete) return "";
  return std::string("expected a CUDA driver of version 10 or newer at ") + path +
         ", got one that lacks functions; update the NVIDIA driver";
}

const CudaDriver* cuda_driver(std::string* problem) {
  static const Loaded* const loaded = new Loaded();
  *problem = loaded->problem;
  return loaded->problem.empty() ? &loaded->driver : nullptr;
}

}  // namespace fluxion
