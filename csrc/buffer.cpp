#include "buffer.h"

#include <sys/mman.h>

#include <stdexcept>

#include "dlpack.h"

namespace fastnlcg {

namespace {

constexpr std::uint64_t kFlagReadOnly = 1;

struct Shape {
  std::int64_t size;
  bool contiguous;
};

// `stride(i)` in units of `unit`. Dimensions of size 1 may have any stride; an empty tensor is contiguous.
template <class GetSize, class GetStride>
Shape shape_of(int ndim, GetSize size, GetStride stride, std::int64_t unit) {
  Shape shape{1, true};
  bool dense = true;
  std::int64_t expected = unit;
  for (int i = ndim - 1; i >= 0; --i) {
    const std::int64_t extent = size(i);
    if (extent < 0) throw std::invalid_argument("a buffer with a negative dimension, " + std::to_string(extent));
    if (extent != 1 && stride(i) != expected) dense = false;
    if (__builtin_mul_overflow(shape.size, extent, &shape.size) ||
        (extent != 0 && __builtin_mul_overflow(expected, extent, &expected))) {
      throw std::invalid_argument("a buffer with more bytes than 64 bits can count");
    }
  }
  shape.contiguous = dense || shape.size == 0;
  return shape;
}

std::string dtype_name(const DLDataType& type) {
  static const char* const kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  const std::string kind = type.code < 7 ? kinds[type.code] : "type code " + std::to_string(type.code) + " of ";
  const std::string lanes = type.lanes == 1 ? "" : "x" + std::to_string(type.lanes);
  return kind + std::to_string(type.bits) + lanes;
}

std::string device_name(const DLDevice& device) {
  const std::string id = ":" + std::to_string(device.device_id);
  switch (device.device_type) {
    case kCpu:
    case kCudaHost:
      return "cpu";
    case kCuda:
    case kCudaManaged:
      return "cuda" + id;
    default:
      return "DLPack device type " + std::to_string(device.device_type) + id;
  }
}

std::string format_name(const char* format, Py_ssize_t itemsize) {
  if (format == nullptr) return "uint8";
  std::string f = format;
  if (f.size() == 2 && (f[0] == '@' || f[0] == '=' || f[0] == '<')) f.erase(0, 1);  // x86 is little-endian
  if (f == "d" && itemsize == 8) return "float64";
  if (f == "f" && itemsize == 4) return "float32";
  if (f == "e" && itemsize == 2) return "float16";
  return "format '" + std::string(format) + "'";
}

}  // namespace

Buffer::Buffer(PyObject* owner) {
  try {
    if (PyCapsule_CheckExact(owner)) {
      from_capsule(owner);
    } else if (PyObject_CheckBuffer(owner)) {
      from_buffer_protocol(owner);
    } else if (PyObject_HasAttrString(owner, "__dlpack__")) {
      PyObject* method = PyObject_GetAttrString(owner, "__dlpack__");
      PyObject* none = PyTuple_New(0);
      PyObject* options = Py_BuildValue("{s(ii)}", "max_version", 1, 0);
      PyObject* capsule = method && none && options ? PyObject_Call(method, none, options) : nullptr;
      if (capsule == nullptr && method && PyErr_ExceptionMatches(PyExc_TypeError)) {  // a producer of DLPack 0
        PyErr_Clear();
        capsule = PyObject_CallNoArgs(method);
      }
      Py_XDECREF(options);
      Py_XDECREF(none);
      Py_XDECREF(method);
      if (capsule == nullptr) throw PythonError{};
      try {
        from_capsule(capsule);
      } catch (...) {
        Py_DECREF(capsule);
        throw;
      }
      Py_DECREF(capsule);
    } else {
      throw BufferTypeError{Py_TYPE(owner)->tp_name};
    }
  } catch (...) {
    release();
    throw;
  }
}

Buffer::~Buffer() { release(); }

void Buffer::from_buffer_protocol(PyObject* owner) {
  if (PyObject_GetBuffer(owner, &view_, PyBUF_FULL_RO) != 0) {
    view_ = {};
    throw PythonError{};
  }
  data_ = view_.buf;
  dtype_ = format_name(view_.format, view_.itemsize);
  readonly_ = view_.readonly != 0;
  const Shape shape = shape_of(
      view_.ndim, [&](int i) { return view_.shape[i]; }, [&](int i) { return view_.strides[i]; }, view_.itemsize);
  size_ = shape.size;
  contiguous_ = shape.contiguous && view_.suboffsets == nullptr;
}

void Buffer::from_capsule(PyObject* capsule) {
  const char* name = PyCapsule_GetName(capsule);
  const std::string kind = name == nullptr ? "" : name;
  const DLTensor* tensor = nullptr;
  if (kind == "dltensor_versioned") {
    auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed->major != 1) {
      throw std::invalid_argument("a DLPack capsule of version " + std::to_string(managed->major) +
                                  ", expected 0 or 1");
    }
    if (PyCapsule_SetName(capsule, "used_dltensor_versioned") != 0) throw PythonError{};
    versioned_ = managed;
    tensor = &managed->tensor;
    readonly_ = (managed->flags & kFlagReadOnly) != 0;
  } else if (kind == "dltensor") {
    managed_ = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    if (PyCapsule_SetName(capsule, "used_dltensor") != 0) {
      managed_ = nullptr;
      throw PythonError{};
    }
    tensor = &managed_->tensor;
  } else if (kind == "used_dltensor" || kind == "used_dltensor_versioned") {
    throw std::invalid_argument("a DLPack capsule that was consumed before");
  } else {
    throw std::invalid_argument("a capsule named '" + kind + "', expected a DLPack capsule, 'dltensor'");
  }
  data_ = tensor->data == nullptr ? nullptr : static_cast<char*>(tensor->data) + tensor->byte_offset;
  dtype_ = tensor->dtype.code == 4 && tensor->dtype.bits == 16 && tensor->dtype.lanes == 1 ? "bfloat16"
                                                                                           : dtype_name(tensor->dtype);
  device_ = device_name(tensor->device);
  if (tensor->ndim < 0) throw std::invalid_argument("a DLPack tensor with a negative number of dimensions");
  // strides count elements; a null pointer means row-major
  std::int64_t row_major = 1;
  const Shape shape = shape_of(
      tensor->ndim, [&](int i) { return tensor->shape[i]; },
      [&](int i) {
        const std::int64_t stride = tensor->strides == nullptr ? row_major : tensor->strides[i];
        if (tensor->strides == nullptr && tensor->shape[i] != 0) row_major *= tensor->shape[i];
        return stride;
      },
      1);
  size_ = shape.size;
  contiguous_ = shape.contiguous;
}

void Buffer::advise_huge_pages() const {
  constexpr std::uintptr_t kHugePage = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data_);
  const std::uintptr_t end = begin + static_cast<std::uintptr_t>(size_) * (dtype_ == "float64" ? 8 : 4);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

void Buffer::release() {
  if (view_.obj != nullptr) PyBuffer_Release(&view_);
  if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
  if (versioned_ != nullptr && versioned_->deleter != nullptr) versioned_->deleter(versioned_);
  managed_ = nullptr;
  versioned_ = nullptr;
  view_ = {};
}

}  // namespace fastnlcg
