// The XLA FFI handlers of the CUDA backend. Thin: read the call, enqueue it on XLA's stream.

#include "cuda_operations.h"
#include "ffi_calls.h"

namespace fluxion {
namespace {

template <typename Call>
ffi::Error enqueue(void* stream, const Operands& in, const Call& call,
                   std::string (*operation)(CudaStream&, Call)) {
  if (!in.ok()) return in.error();
  std::string problem;
  const CudaDriver* driver = cuda_driver(&problem);
  if (driver != nullptr) problem = operation(cuda_stream(driver, stream), call);
  if (problem.empty()) return ffi::Error::Success();
  return ffi::Error::Internal("fluxion: " + problem);
}

ffi::Error append_handler(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                          bool has_summaries, bool has_first_row) {
  return guarded([&] {
    Operands in(args, rets);
    const AppendCall call = read_append(in, has_summaries, has_first_row);
    return enqueue(stream, in, call, enqueue_append);
  });
}

// The stream itself says when to begin, and what is lent is staging memory.
ffi::Error submit_handler(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                          bool has_summaries, bool has_bitmap, float scale, bool has_first_row,
                          bool) {
  return guarded([&] {
    Operands in(args, rets);
    const SubmitCall call = read_submit(in, has_summaries, has_bitmap, scale, has_first_row);
    return enqueue(stream, in, call, enqueue_submit);
  });
}

ffi::Error collect_handler(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           bool has_summaries, bool return_selection, bool has_first_row,
                           bool delivered) {
  return guarded([&] {
    Operands in(args, rets);
    const CollectCall call =
        read_collect(in, has_summaries, return_selection, has_first_row, delivered);
    return enqueue(stream, in, call, enqueue_collect);
  });
}

}  // namespace
}  // namespace fluxion

// None may be recorded into a CUDA graph: each call has a tick and a generation of its own.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_append_cuda, fluxion::append_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<void*>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("has_summaries")
                                  .Attr<bool>("has_first_row"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_submit_cuda, fluxion::submit_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<void*>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("has_summaries")
                                  .Attr<bool>("has_bitmap")
                                  .Attr<float>("scale")
                                  .Attr<bool>("has_first_row")
                                  .Attr<bool>("begins"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_collect_cuda, fluxion::collect_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<void*>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("has_summaries")
                                  .Attr<bool>("return_selection")
                                  .Attr<bool>("has_first_row")
                                  .Attr<bool>("delivered"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(fluxion_keep_cuda, fluxion::keep,
                              xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets());

#pragma GCC visibility pop
