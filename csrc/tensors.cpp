#include "tensors.h"

#include <memory>
#include <stdexcept>

#include "buffer.h"

namespace fastnlcg {
namespace {

#ifdef FASTNLCG_EMULATED  // the emulated device's memory is the CPU's
constexpr std::int32_t kDeviceMemory = kCpu;
#else
constexpr std::int32_t kDeviceMemory = kCuda;
#endif

constexpr struct {
  std::uint8_t code, bits;
} kTypes[] = {{kDLFloat, 64}, {kDLFloat, 32}, {kDLBfloat, 16}, {kDLFloat, 16}};  // in the order of DType

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

Owned called(PyObject* object, const char* method) {
  Owned result(PyObject_CallMethod(object, method, nullptr));
  if (!result) throw PythonError{};
  return result;
}

}  // namespace

TensorReader::TensorReader(PyObject* dlpack_api, PyObject* type, int device)
    : api_(static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(dlpack_api, "dlpack_exchange_api"))),
      type_(type),
      device_(device) {
  if (api_ == nullptr) throw PythonError{};
  if (api_->major != 1 || api_->dltensor_from_py_object_no_sync == nullptr) {
    throw std::invalid_argument("a DLPack exchange API of version " + std::to_string(api_->major) + ", expected 1");
  }
}

void* TensorReader::address(PyObject* tensor, DType dtype, const TensorShape& expected) const {
  DLTensor view;
  if (api_->dltensor_from_py_object_no_sync(tensor, &view) != 0) {
    PyErr_Clear();  // a sparse tensor, for example: the caller finds out why and words the error
    return nullptr;
  }
  const auto& type = kTypes[static_cast<int>(dtype)];
  if (view.dtype.code != type.code || view.dtype.bits != type.bits || view.dtype.lanes != 1) return nullptr;
  const bool here = device_ < 0 ? view.device.device_type == kCpu
                                : view.device.device_type == kDeviceMemory &&
                                      (kDeviceMemory == kCpu || view.device.device_id == device_);
  if (!here || view.data == nullptr || view.ndim != static_cast<std::int32_t>(expected.shape.size())) return nullptr;
  if (view.strides == nullptr && view.ndim > 0) return nullptr;
  for (std::size_t k = 0; k < expected.shape.size(); ++k) {
    if (view.shape[k] != expected.shape[k]) return nullptr;
    if (view.shape[k] != 1 && view.strides[k] != expected.strides[k]) return nullptr;
  }
  return static_cast<char*>(view.data) + view.byte_offset;
}

bool is_as_it_looks(PyObject* tensor) {
  if (called(tensor, "is_neg").get() != Py_False) return false;
  const Owned storage = called(tensor, "untyped_storage");
  const auto number = [](const Owned& object) {
    const long long value = PyLong_AsLongLong(object.get());
    if (value == -1 && PyErr_Occurred()) throw PythonError{};
    return value;
  };
  // Dense memory: the last element is numel() - 1 elements behind the first.
  const long long begin = number(called(tensor, "storage_offset")), elements = number(called(tensor, "numel"));
  return (begin + elements) * number(called(tensor, "element_size")) <= number(called(storage.get(), "nbytes"));
}

}  // namespace fastnlcg
