#include "cuda_copy.h"

#include <algorithm>

namespace fluxion {
namespace {

// Above this the driver's own copy is as fast, and leaves the processors to others.
constexpr uint64_t kLargeWords = (256 << 10) / 4;
constexpr unsigned kThreads = 512;
// Few, because blocks that wait for the host keep their place: those of dozens of streams must fit
// onto the device at once, or none of them would get on.
constexpr uint64_t kMaxBlocks = 8;
constexpr uint64_t kUnitWords = 4;

// Where a thread's unit of a table's entries comes from and goes to; a unit is 16 bytes or what is
// left of an entry.
#define FLUXION_FIND(TABLE, LABEL)                       \
  "  mov.u32 %left, %unit;\n"                            \
  "  mov.u64 %entry, " TABLE ";\n"                       \
  LABEL "_find:\n"                                       \
  "  ld.param.u64 %words, [%entry+16];\n"                \
  "  add.u64 %rest, %words, 3;\n"                        \
  "  shr.u64 %rest, %rest, 2;\n"                         \
  "  cvt.u32.u64 %inside, %rest;\n"                      \
  "  setp.lt.u32 %skip, %left, %inside;\n"               \
  "  @%skip bra " LABEL "_found;\n"                      \
  "  sub.u32 %left, %left, %inside;\n"                   \
  "  add.u64 %entry, %entry, 24;\n"                      \
  "  bra " LABEL "_find;\n"                              \
  LABEL "_found:\n"                                      \
  "  ld.param.u64 %to, [%entry];\n"                      \
  "  ld.param.u64 %from, [%entry+8];\n"                  \
  "  mul.wide.u32 %offset, %left, 16;\n"                 \
  "  add.u64 %to, %to, %offset;\n"                       \
  "  add.u64 %from, %from, %offset;\n"                   \
  "  mul.wide.u32 %offset, %left, 4;\n"                  \
  "  sub.u64 %rest, %words, %offset;\n"

// Copies that unit. Loads are volatile, because the host writes between kernels, and all of a
// thread's come before its stores, because each takes as long as the way over the bus.
#define FLUXION_MOVE(LABEL)                              \
  "  or.b64 %offset, %to, %from;\n"                      \
  "  and.b64 %offset, %offset, 15;\n"                    \
  "  setp.ne.u64 %skip, %offset, 0;\n"                   \
  "  @%skip bra " LABEL "_words;\n"                      \
  "  setp.lt.u64 %skip, %rest, 4;\n"                     \
  "  @%skip bra " LABEL "_words;\n"                      \
  "  ld.volatile.global.v4.u32 {%a, %b, %c, %d}, [%from];\n" \
  "  st.global.v4.u32 [%to], {%a, %b, %c, %d};\n"        \
  "  bra " LABEL "_step;\n"                              \
  LABEL "_words:\n"                                      \
  "  setp.gt.u64 %second, %rest, 1;\n"                   \
  "  setp.gt.u64 %third, %rest, 2;\n"                    \
  "  setp.gt.u64 %fourth, %rest, 3;\n"                   \
  "  ld.volatile.global.u32 %a, [%from];\n"              \
  "  @%second ld.volatile.global.u32 %b, [%from+4];\n"   \
  "  @%third ld.volatile.global.u32 %c, [%from+8];\n"    \
  "  @%fourth ld.volatile.global.u32 %d, [%from+12];\n"  \
  "  st.global.u32 [%to], %a;\n"                         \
  "  @%second st.global.u32 [%to+4], %b;\n"              \
  "  @%third st.global.u32 [%to+8], %c;\n"               \
  "  @%fourth st.global.u32 [%to+12], %d;\n"             \
  LABEL "_step:\n"                                       \
  "  add.u32 %unit, %unit, %step;\n"

// One exchange with the host: copies the operands; the last block to have done so writes `value` to
// the word at `signalled`; every block with results to copy waits until the word at `awaited` has
// reached `value`, by difference, and copies its own. Either address may be 0. The tables are
// CudaCopies::items. Operands behind the first `open_units` are copied if any of the words at `gate`
// is not 0; if all are, blocks without other units have no part in the signal. Each stream loads a module of its own, so the kernels that share
// `finished` run one after another. The driver compiles this for the device at hand.
//
// One fence of the system makes all blocks' copies visible to the host: releases are cumulative. A
// block's threads are ordered before its first one by the barrier, that one before the last block's
// by the count, and the last block's store releases all that is before it.
constexpr char kKernel[] =
    R"(
.version 6.4
.target sm_70
.address_size 64

.global .align 4 .u32 finished = 0;

.visible .entry fluxion_exchange(
  .param .align 8 .b8 operands[384],
  .param .align 8 .b8 results[384],
  .param .u32 operand_units,
  .param .u32 open_units,
  .param .u32 result_units,
  .param .u32 gate_words,
  .param .u64 gate,
  .param .u64 signalled,
  .param .u64 awaited,
  .param .u32 value)
{
  .reg .pred %skip, %second, %third, %fourth, %open, %alone;
  .reg .b32 %block, %blocks, %thread, %threads, %own, %first, %step, %unit, %units, %left, %inside;
  .reg .b32 %open_units, %rows, %a, %b, %c, %d, %value, %word, %last, %before;
  .reg .b64 %entry, %to, %from, %words, %rest, %offset, %gate, %signalled, %awaited;

  mov.u32 %block, %ctaid.x;
  mov.u32 %blocks, %nctaid.x;
  mov.u32 %thread, %tid.x;
  mov.u32 %threads, %ntid.x;
  mul.lo.u32 %own, %block, %threads;
  add.u32 %first, %own, %thread;
  mul.lo.u32 %step, %blocks, %threads;
  ld.param.u64 %signalled, [signalled];
  ld.param.u64 %awaited, [awaited];
  ld.param.u32 %value, [value];

  ld.param.u32 %units, [operand_units];
  ld.param.u32 %open_units, [open_units];
  ld.param.u32 %rows, [gate_words];
  ld.param.u64 %gate, [gate];
  setp.eq.u64 %skip, %gate, 0;
  @%skip bra gate_end;
  mov.u32 %word, 0;
  mov.u32 %unit, %thread;
gate_next:
  setp.ge.u32 %skip, %unit, %rows;
  @%skip bra gate_seen;
  mul.wide.u32 %offset, %unit, 4;
  add.u64 %from, %gate, %offset;
  ld.volatile.global.u32 %a, [%from];
  or.b32 %word, %word, %a;
  add.u32 %unit, %unit, %threads;
  bra gate_next;
gate_seen:
  setp.ne.u32 %open, %word, 0;
  bar.red.or.pred %open, 0, %open;
  @%open bra gate_end;
  mov.u32 %units, %open_units;
gate_end:

  mov.u32 %unit, %first;
operand_next:
  setp.ge.u32 %skip, %unit, %units;
  @%skip bra operand_end;
)" FLUXION_FIND("operands", "operand") FLUXION_MOVE("operand") R"(
  bra operand_next;
operand_end:

  setp.eq.u64 %skip, %signalled, 0;
  @%skip bra signal_end;
  setp.eq.u32 %alone, %block, 0;
  setp.ge.u32 %skip, %own, %units;
  @%alone bra signal;
  @%skip bra signal_end;
signal:
  bar.sync 0;
  setp.ne.u32 %skip, %thread, 0;
  @%skip bra signal_end;
  add.u32 %last, %units, %threads;
  sub.u32 %last, %last, 1;
  div.u32 %last, %last, %threads;
  min.u32 %last, %last, %blocks;
  setp.le.u32 %alone, %last, 1;
  @%alone bra signal_now;
  sub.u32 %last, %last, 1;
  atom.acq_rel.gpu.global.inc.u32 %before, [finished], %last;
  setp.ne.u32 %skip, %before, %last;
  @%skip bra signal_end;
signal_now:
  st.release.sys.global.u32 [%signalled], %value;
signal_end:

  setp.eq.u64 %skip, %awaited, 0;
  @%skip bra end;
  ld.param.u32 %units, [result_units];
  setp.eq.u32 %alone, %block, 0;
  setp.ge.u32 %skip, %own, %units;
  @%alone bra wait;
  @%skip bra end;
wait:
  mov.u32 %unit, %first;
  setp.ge.u32 %skip, %unit, %units;
  @%skip bra result_known;
)" FLUXION_FIND("results", "result") R"(
result_known:
  setp.ne.u32 %skip, %thread, 0;
  @%skip bra reached;
asked:
  ld.acquire.sys.global.u32 %word, [%awaited];
  sub.s32 %word, %word, %value;
  setp.lt.s32 %skip, %word, 0;
  @%skip bra asked;
reached:
  bar.sync 0;
result_next:
  setp.ge.u32 %skip, %unit, %units;
  @%skip bra end;
)" FLUXION_MOVE("result") R"(
  setp.ge.u32 %skip, %unit, %units;
  @%skip bra end;
)" FLUXION_FIND("results", "result_after") R"(
  bra result_next;
end:
  ret;
}
)";
#undef FLUXION_FIND
#undef FLUXION_MOVE
static_assert(sizeof(CudaCopies::items) == 384, "the size of the kernel's tables");

// Whether the kernel copies an entry: the driver cannot leave out rows.
bool is_ours(const CudaCopies& copies, int i) {
  return copies.items[i].words < kLargeWords || (copies.gate != 0 && i >= copies.open);
}

CudaCopies ours_of(const CudaCopies& copies) {
  CudaCopies ours;
  ours.gate = copies.gate;
  ours.gate_words = copies.gate_words;
  for (int i = 0; i < copies.count; ++i) {
    if (!is_ours(copies, i)) continue;
    if (i < copies.open) ++ours.open;
    ours.items[ours.count++] = copies.items[i];
  }
  return ours;
}

uint32_t units_of(const CudaCopies& copies, int count) {
  uint64_t units = 0;
  for (int i = 0; i < count; ++i) {
    units += (copies.items[i].words + kUnitWords - 1) / kUnitWords;
  }
  return static_cast<uint32_t>(units);
}

int copy_by_driver(const CudaDriver& driver, CudaDriver::Stream stream, const CudaCopies& copies,
                   bool all) {
  for (int i = 0; i < copies.count; ++i) {
    const CudaCopy& copy = copies.items[i];
    if (!all && is_ours(copies, i)) continue;
    const int error = driver.copy(copy.to, copy.from, 4 * copy.words, stream);
    if (error != 0) return error;
  }
  return 0;
}

int launch(const CudaDriver& driver, CudaDriver::Function kernel, CudaDriver::Stream stream,
           const CudaCopies& operands, const CudaCopies& results, CudaSignal signal) {
  CudaCopies in = ours_of(operands);
  CudaCopies out = ours_of(results);
  uint32_t in_units = units_of(in, in.count);
  uint32_t open_units = in.gate == 0 ? in_units : units_of(in, in.open);
  uint32_t out_units = units_of(out, out.count);
  if (in_units == 0 && signal.signalled == 0 && signal.awaited == 0) return 0;
  const uint64_t threads = std::max<uint64_t>({in_units, out_units, 1});
  const uint64_t blocks = std::min((threads + kThreads - 1) / kThreads, kMaxBlocks);
  void* arguments[] = {in.items,       out.items, &in_units,         &open_units,     &out_units,
                       &in.gate_words, &in.gate,  &signal.signalled, &signal.awaited, &signal.value};
  return driver.launch_kernel(kernel, static_cast<unsigned>(blocks), 1, 1, kThreads, 1, 1, 0,
                              stream, arguments, nullptr);
}

}  // namespace

CudaDriver::Function load_copy_kernel(const CudaDriver& driver) {
  CudaDriver::Module module = nullptr;
  CudaDriver::Function kernel = nullptr;
  if (driver.load_module == nullptr || driver.get_function == nullptr ||
      driver.launch_kernel == nullptr || driver.load_module(&module, kKernel) != 0) {
    return nullptr;
  }
  return driver.get_function(&kernel, module, "fluxion_exchange") == 0 ? kernel : nullptr;
}

int enqueue_copies(const CudaDriver& driver, CudaDriver::Function kernel,
                   CudaDriver::Stream stream, const CudaCopies& copies) {
  const int error = copy_by_driver(driver, stream, copies, kernel == nullptr);
  if (error != 0 || kernel == nullptr) return error;
  return launch(driver, kernel, stream, copies, {}, {});
}

int enqueue_exchange(const CudaDriver& driver, CudaDriver::Function kernel,
                     CudaDriver::Stream stream, const CudaCopies& operands,
                     const CudaCopies& results, const CudaSignal& signal, bool* launched) {
  int error = copy_by_driver(driver, stream, operands, false);
  if (error == 0) error = launch(driver, kernel, stream, operands, results, signal);
  *launched = error == 0;
  return error != 0 ? error : copy_by_driver(driver, stream, results, false);
}

}  // namespace fluxion
