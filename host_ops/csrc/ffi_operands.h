// Reads the operands and results of an XLA FFI call one after the other and checks each.
//
// Every read names the array, its dtype and its dimensions. The first mismatch is remembered and
// reported by error(); after it, reads return null. So a handler reads everything, asks once, and
// never touches an array that is not what it should be. One reader per call, one thread.

#ifndef FLUXION_FFI_OPERANDS_H_
#define FLUXION_FFI_OPERANDS_H_

#include <cstdint>
#include <initializer_list>
#include <string>

#include "types.h"
#include "xla/ffi/api/ffi.h"

namespace fluxion {

namespace ffi = xla::ffi;

class Operands {
 public:
  Operands(ffi::RemainingArgs args, ffi::RemainingRets rets) : args_(args), rets_(rets) {}

  const void* arg(const char* name, ffi::DataType dtype, std::initializer_list<int64_t> dims) {
    return checked(next_arg(), name, dtype, dims);
  }

  void* ret(const char* name, ffi::DataType dtype, std::initializer_list<int64_t> dims) {
    return checked(next_ret(), name, dtype, dims);
  }

  // Dimension `axis` of the next operand but `ahead`, or 0 if it has no such axis.
  int64_t peek_arg(size_t ahead, size_t axis) const {
    const auto buffer = args_.get<ffi::AnyBuffer>(arg_ + ahead);
    return buffer.has_value() ? dimension(*buffer, axis) : 0;
  }

  int64_t peek_ret(size_t ahead, size_t axis) const {
    auto buffer = rets_.get<ffi::AnyBuffer>(ret_ + ahead);
    return buffer.has_value() ? dimension(**buffer, axis) : 0;
  }

  // Axes of the next result, or -1 if there is none.
  int64_t rank_of_ret() const {
    auto buffer = rets_.get<ffi::AnyBuffer>(ret_);
    return buffer.has_value() ? static_cast<int64_t>((*buffer)->dimensions().size()) : -1;
  }

  ffi::DataType peek_dtype() const {
    const auto buffer = args_.get<ffi::AnyBuffer>(arg_);
    return buffer.has_value() ? buffer->element_type() : ffi::DataType::INVALID;
  }

  void fail(const std::string& message) {
    if (message_.empty()) message_ = message;
  }

  bool ok() const { return message_.empty(); }

  ffi::Error error() const {
    return ok() ? ffi::Error::Success() : ffi::Error::InvalidArgument("fluxion: " + message_);
  }

 private:
  struct Found {
    bool present = false;
    ffi::DataType dtype = ffi::DataType::INVALID;
    ffi::Span<const int64_t> dims{nullptr, 0};
    void* data = nullptr;
  };

  Found next_arg() {
    const auto buffer = args_.get<ffi::AnyBuffer>(arg_++);
    return buffer.has_value() ? describe(*buffer) : Found{};
  }

  Found next_ret() {
    auto buffer = rets_.get<ffi::AnyBuffer>(ret_++);
    return buffer.has_value() ? describe(**buffer) : Found{};
  }

  static Found describe(const ffi::AnyBuffer& buffer) {
    return {true, buffer.element_type(), buffer.dimensions(), buffer.untyped_data()};
  }

  static int64_t dimension(const ffi::AnyBuffer& buffer, size_t axis) {
    const auto dims = buffer.dimensions();
    return axis < dims.size() ? dims[axis] : 0;
  }

  void* checked(const Found& found, const char* name, ffi::DataType dtype,
                std::initializer_list<int64_t> dims) {
    bool same = found.present && found.dtype == dtype && found.dims.size() == dims.size();
    for (size_t i = 0; same && i < dims.size(); ++i) same = found.dims[i] == dims.begin()[i];
    if (!same) {
      const ffi::Span<const int64_t> wanted(dims.begin(), dims.size());
      fail(std::string(name) + ": expected " + type_name(dtype, wanted) + ", got " +
           (found.present ? type_name(found.dtype, found.dims) : std::string("nothing")) +
           "; call it through host_ops of the same version as the library");
    }
    return ok() ? found.data : nullptr;
  }

  static std::string type_name(ffi::DataType dtype, ffi::Span<const int64_t> dims) {
    std::string text;
    for (const int64_t dim : dims) text += (text.empty() ? "" : ", ") + std::to_string(dim);
    return dtype_name(dtype) + " [" + text + "]";
  }

  static std::string dtype_name(ffi::DataType dtype) {
    switch (dtype) {
      case ffi::DataType::F32:
        return "float32";
      case ffi::DataType::BF16:
        return "bfloat16";
      case ffi::DataType::F16:
        return "float16";
      case ffi::DataType::S8:
        return "int8";
      case ffi::DataType::S32:
        return "int32";
      case ffi::DataType::U32:
        return "uint32";
      default:
        return "XLA type " + std::to_string(static_cast<int>(dtype));
    }
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  size_t arg_ = 0;
  size_t ret_ = 0;
  std::string message_;
};

}  // namespace fluxion

#endif  // FLUXION_FFI_OPERANDS_H_
