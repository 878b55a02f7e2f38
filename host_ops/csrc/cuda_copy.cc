#include "cuda_copy.h"

#include <algorithm>

namespace fluxion {
namespace {

// Above this the driver's own copy is as fast, and leaves the processors to others.
constexpr uint64_t kLargeWords = (256 << 10) / 4;
constexpr unsigned kThreads = 1024;
constexpr uint64_t kMaxBlocks = 128;

// The table is CudaCopies::items; block row y copies its entry y, word by word. Before that every
// block waits until the word at `awaited` has reached `value`, by difference; after that the last
// block to finish writes `value` to `signalled`. Either address may be 0. The driver compiles this
// for the device at hand. Loads are volatile, because the host writes between kernels. Each stream
// loads a module of its own, so the kernels that count in `finished` run one after another.
constexpr char kKernel[] = R"(
.version 6.4
.target sm_70
.address_size 64

.global .align 4 .u32 finished = 0;

.visible .entry fluxion_copy(
  .param .align 8 .b8 table[384],
  .param .u64 awaited,
  .param .u64 signalled,
  .param .u32 value)
{
  .reg .pred %done, %other;
  .reg .b32 %row, %block, %threads, %thread, %blocks, %word, %value, %rows, %last, %before;
  .reg .b64 %entry, %to, %from, %words, %index, %step, %offset, %at, %awaited, %signalled;

  mov.u32 %row, %ctaid.y;
  mov.u32 %block, %ctaid.x;
  mov.u32 %threads, %ntid.x;
  mov.u32 %thread, %tid.x;
  mov.u32 %blocks, %nctaid.x;
  ld.param.u64 %awaited, [awaited];
  ld.param.u64 %signalled, [signalled];
  ld.param.u32 %value, [value];

  setp.eq.u64 %done, %awaited, 0;
  @%done bra copy;
  setp.ne.u32 %other, %thread, 0;
  @%other bra reached;
poll:
  ld.acquire.sys.global.u32 %word, [%awaited];
  sub.s32 %word, %word, %value;
  setp.ge.s32 %done, %word, 0;
  @%done bra reached;
  nanosleep.u32 100;
  bra poll;
reached:
  bar.sync 0;

copy:
  mul.wide.u32 %offset, %row, 24;
  mov.u64 %entry, table;
  add.s64 %entry, %entry, %offset;
  ld.param.u64 %to, [%entry];
  ld.param.u64 %from, [%entry+8];
  ld.param.u64 %words, [%entry+16];
  cvt.u64.u32 %index, %thread;
  mad.wide.u32 %index, %block, %threads, %index;
  mul.wide.u32 %step, %blocks, %threads;

next:
  setp.ge.u64 %done, %index, %words;
  @%done bra copied;
  shl.b64 %offset, %index, 2;
  add.s64 %at, %from, %offset;
  ld.volatile.global.u32 %word, [%at];
  add.s64 %at, %to, %offset;
  st.global.u32 [%at], %word;
  add.s64 %index, %index, %step;
  bra next;

copied:
  setp.eq.u64 %done, %signalled, 0;
  @%done bra end;
  membar.sys;
  bar.sync 0;
  setp.ne.u32 %other, %thread, 0;
  @%other bra end;
  mov.u32 %rows, %nctaid.y;
  mul.lo.u32 %last, %blocks, %rows;
  sub.u32 %last, %last, 1;
  atom.acq_rel.gpu.global.inc.u32 %before, [finished], %last;
  setp.ne.u32 %done, %before, %last;
  @%done bra end;
  membar.sys;
  st.release.sys.global.u32 [%signalled], %value;

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

namespace {

bool is_small(const CudaCopy& copy) { return copy.words < kLargeWords; }

int copy_large(const CudaDriver& driver, CudaDriver::Stream stream, const CudaCopies& copies,
               bool all) {
  for (int i = 0; i < copies.count; ++i) {
    const CudaCopy& copy = copies.items[i];
    if (!all && is_small(copy)) continue;
    const int error = driver.copy(copy.to, copy.from, 4 * copy.words, stream);
    if (error != 0) return error;
  }
  return 0;
}

int launch(const CudaDriver& driver, CudaDriver::Function kernel, CudaDriver::Stream stream,
           const CudaCopies& copies, uint64_t awaited, uint64_t signalled, uint32_t value) {
  CudaCopies small;
  uint64_t most = 1;
  for (int i = 0; i < copies.count; ++i) {
    if (!is_small(copies.items[i])) continue;
    small.items[small.count++] = copies.items[i];
    most = std::max(most, copies.items[i].words);
  }
  if (small.count == 0 && awaited == 0 && signalled == 0) return 0;
  const uint64_t blocks = std::min((most + kThreads - 1) / kThreads, kMaxBlocks);
  const int rows = std::max(small.count, 1);  // An entry of no words copies nothing.
  void* arguments[] = {small.items, &awaited, &signalled, &value};
  return driver.launch_kernel(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(rows),
                              1, kThreads, 1, 1, 0, stream, arguments, nullptr);
}

}  // namespace

int enqueue_copies(const CudaDriver& driver, CudaDriver::Function kernel,
                   CudaDriver::Stream stream, const CudaCopies& copies) {
  const int error = copy_large(driver, stream, copies, kernel == nullptr);
  if (error != 0 || kernel == nullptr) return error;
  return launch(driver, kernel, stream, copies, 0, 0, 0);
}

int enqueue_copies_and_signal(const CudaDriver& driver, CudaDriver::Function kernel,
                              CudaDriver::Stream stream, const CudaCopies& copies,
                              uint64_t signalled, uint32_t value) {
  const int error = copy_large(driver, stream, copies, false);
  return error != 0 ? error : launch(driver, kernel, stream, copies, 0, signalled, value);
}

int enqueue_wait_and_copies(const CudaDriver& driver, CudaDriver::Function kernel,
                            CudaDriver::Stream stream, const CudaCopies& copies, uint64_t awaited,
                            uint32_t value) {
  const int error = launch(driver, kernel, stream, copies, awaited, 0, value);
  return error != 0 ? error : copy_large(driver, stream, copies, false);
}

}  // namespace fluxion
