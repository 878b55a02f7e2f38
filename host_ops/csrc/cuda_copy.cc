#include "cuda_copy.h"

#include <algorithm>

namespace fluxion {
namespace {

// Above this the driver's own copy is as fast, and leaves the processors to others.
constexpr uint64_t kLargeWords = (256 << 10) / 4;
constexpr unsigned kThreads = 256;
constexpr uint64_t kMaxBlocks = 128;

// The table is CudaCopies::items; block row y copies its entry y, word by word. The driver compiles
// this for the device at hand. Loads are volatile, because the host writes between kernels.
constexpr char kKernel[] = R"(
.version 6.4
.target sm_70
.address_size 64

.visible .entry fluxion_copy(.param .align 8 .b8 table[384])
{
  .reg .pred %done;
  .reg .b32 %row, %block, %threads, %thread, %blocks, %word;
  .reg .b64 %entry, %to, %from, %words, %index, %step, %offset, %at;

  mov.u32 %row, %ctaid.y;
  mul.wide.u32 %offset, %row, 24;
  mov.u64 %entry, table;
  add.s64 %entry, %entry, %offset;
  ld.param.u64 %to, [%entry];
  ld.param.u64 %from, [%entry+8];
  ld.param.u64 %words, [%entry+16];

  mov.u32 %block, %ctaid.x;
  mov.u32 %threads, %ntid.x;
  mov.u32 %thread, %tid.x;
  mov.u32 %blocks, %nctaid.x;
  cvt.u64.u32 %index, %thread;
  mad.wide.u32 %index, %block, %threads, %index;
  mul.wide.u32 %step, %blocks, %threads;

next:
  setp.ge.u64 %done, %index, %words;
  @%done bra end;
  shl.b64 %offset, %index, 2;
  add.s64 %at, %from, %offset;
  ld.volatile.global.u32 %word, [%at];
  add.s64 %at, %to, %offset;
  st.global.u32 [%at], %word;
  add.s64 %index, %index, %step;
  bra next;

end:
  ret;
}
)";
static_assert(sizeof(CudaCopies::items) == 384, "the size of the kernel's table");

}  // namespace

CudaDriver::Function load_copy_kernel(const CudaDriver& driver) {
  CudaDriver::Module module = nullptr;
  CudaDriver::Function kernel = nullptr;
  if (driver.load_module == nullptr || driver.get_function == nullptr ||
      driver.launch_kernel == nullptr || driver.load_module(&module, kKernel) != 0) {
    return nullptr;
  }
  return driver.get_function(&kernel, module, "fluxion_copy") == 0 ? kernel : nullptr;
}

int enqueue_copies(const CudaDriver& driver, CudaDriver::Function kernel,
                   CudaDriver::Stream stream, const CudaCopies& copies) {
  CudaCopies small;
  uint64_t most = 0;
  for (int i = 0; i < copies.count; ++i) {
    const CudaCopy& copy = copies.items[i];
    if (kernel != nullptr && copy.words < kLargeWords) {
      small.items[small.count++] = copy;
      most = std::max(most, copy.words);
      continue;
    }
    const int error = driver.copy(copy.to, copy.from, 4 * copy.words, stream);
    if (error != 0) return error;
  }
  if (small.count == 0) return 0;
  const uint64_t blocks = std::min((most + kThreads - 1) / kThreads, kMaxBlocks);
  void* arguments[] = {small.items};
  return driver.launch_kernel(kernel, static_cast<unsigned>(blocks),
                              static_cast<unsigned>(small.count), 1, kThreads, 1, 1, 0, stream,
                              arguments, nullptr);
}

}  // namespace fluxion
