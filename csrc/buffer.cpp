#include "buffer.h"

#include <sys/mman.h>

#include <stdexcept>

#include "dlpack.h"
#include "step_cuda.h"

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

// The stride of a row-major dimension; called from the last dimension to the first. shape_of refuses extents that
// overflow.
std::int64_t next_stride(std::int64_t& row_major, std::int64_t extent) {
  const std::int64_t stride = row_major;
  if (extent != 0 && __builtin_mul_overflow(row_major, extent, &row_major)) row_major = 0;
  return stride;
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
      return kHostDevice;
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
  if (f.size() == 2 && (f[0] == '@' || f[0] == '=' || f[0] == '<')) f.erase(0, 1);  // this machine is little-endian
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
      from_dlpack(owner);
    } else if (PyObject_HasAttrString(owner, "__cuda_array_interface__")) {
      from_cuda_array_interface(owner);
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
  // Without strides it is row-major (ctypes), without a shape one-dimensional.
  std::int64_t row_major = view_.itemsize;
  const std::int64_t length = view_.itemsize > 0 ? view_.len / view_.itemsize : 0;
  const Shape shape = shape_of(
      view_.shape == nullptr ? 1 : view_.ndim,
      [&](int i) { return view_.shape == nullptr ? length : static_cast<std::int64_t>(view_.shape[i]); },
      [&](int i) {
        if (view_.strides != nullptr) return static_cast<std::int64_t>(view_.strides[i]);
        return next_stride(row_major, view_.shape == nullptr ? length : static_cast<std::int64_t>(view_.shape[i]));
      },
      view_.itemsize);
  size_ = shape.size;
  contiguous_ = shape.contiguous && view_.suboffsets == nullptr;
}

namespace {

// A reference that is released at the end of the scope.
struct Owned {
  explicit Owned(PyObject* object) : object(object) {}
  ~Owned() { Py_XDECREF(object); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* object;
};

PyObject* given(PyObject* object) {
  if (object == nullptr) throw PythonError{};
  return object;
}

}  // namespace

void Buffer::from_dlpack(PyObject* owner) {
  const Owned method(given(PyObject_GetAttrString(owner, "__dlpack__")));
  const Owned options(given(Py_BuildValue("{s(ii)}", "max_version", 1, 0)));
  // Memory on a GPU is used on the caller's stream, on which it was produced: -1 asks the producer not to synchronize.
  const Owned device(PyObject_CallMethod(owner, "__dlpack_device__", nullptr));
  if (device.object == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_Exception)) throw PythonError{};  // an interrupt is not an answer
    PyErr_Clear();
  }
  if (device.object != nullptr && PyTuple_Check(device.object) && PyTuple_GET_SIZE(device.object) == 2) {
    const long type = PyLong_AsLong(PyTuple_GET_ITEM(device.object, 0));
    if (type == -1 && PyErr_Occurred()) PyErr_Clear();
    if (type == kCuda) {
      const Owned no_wait(given(PyLong_FromLong(-1)));
      if (PyDict_SetItemString(options.object, "stream", no_wait.object) != 0) throw PythonError{};
    }
  }
  const Owned none(given(PyTuple_New(0)));
  PyObject* capsule = PyObject_Call(method.object, none.object, options.object);
  if (capsule == nullptr && PyErr_ExceptionMatches(PyExc_TypeError)) {  // a producer of DLPack 0
    PyErr_Clear();
    capsule = PyObject_CallNoArgs(method.object);
  }
  const Owned kept(given(capsule));
  from_capsule(capsule);
}

// Version 3 (https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html). Its stream is not waited for, as
// above.
void Buffer::from_cuda_array_interface(PyObject* owner) {
  const Owned interface(given(PyObject_GetAttrString(owner, "__cuda_array_interface__")));
  if (!PyDict_Check(interface.object)) throw std::invalid_argument("__cuda_array_interface__ is not a dict");
  const auto entry = [&](const char* key) { return PyDict_GetItemString(interface.object, key); };
  PyObject* const shape = entry("shape");
  PyObject* const strides = entry("strides");
  PyObject* const data = entry("data");
  PyObject* const type = entry("typestr");
  if (shape == nullptr || !PyTuple_Check(shape) || data == nullptr || !PyTuple_Check(data) ||
      PyTuple_GET_SIZE(data) != 2 || type == nullptr || !PyUnicode_Check(type)) {
    throw std::invalid_argument("__cuda_array_interface__ lacks shape, data or typestr");
  }
  const char* const text = PyUnicode_AsUTF8(type);
  if (text == nullptr) throw PythonError{};
  const std::string kind = text;
  const std::int64_t itemsize = kind == "<f8" ? 8 : kind == "<f4" ? 4 : kind == "<f2" ? 2 : 0;
  dtype_ = itemsize == 0 ? "typestr '" + kind + "'" : "float" + std::to_string(itemsize * 8);
  const auto integer = [](PyObject* object) {
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw PythonError{};
    return static_cast<std::int64_t>(value);
  };
  const int ndim = static_cast<int>(PyTuple_GET_SIZE(shape));
  const bool strided = strides != nullptr && strides != Py_None;
  if (strided && (!PyTuple_Check(strides) || PyTuple_GET_SIZE(strides) != ndim)) {
    throw std::invalid_argument("__cuda_array_interface__ has strides that do not match its shape");
  }
  const std::int64_t unit = itemsize == 0 ? 1 : itemsize;
  std::int64_t row_major = unit;
  const Shape s = shape_of(
      ndim, [&](int i) { return integer(PyTuple_GET_ITEM(shape, i)); },
      [&](int i) {
        if (strided) return integer(PyTuple_GET_ITEM(strides, i));
        return next_stride(row_major, integer(PyTuple_GET_ITEM(shape, i)));
      },
      unit);
  size_ = s.size;
  contiguous_ = s.contiguous;
  data_ = PyLong_AsVoidPtr(PyTuple_GET_ITEM(data, 0));
  if (data_ == nullptr && PyErr_Occurred()) throw PythonError{};
  const int readonly = PyObject_IsTrue(PyTuple_GET_ITEM(data, 1));
  if (readonly < 0) throw PythonError{};
  readonly_ = readonly != 0;
  device_ = "cuda:" + std::to_string(data_ == nullptr ? 0 : cuda_device_of(data_));
  Py_INCREF(owner);
  owner_ = owner;
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
  if (tensor->ndim < 0 || (tensor->ndim > 0 && tensor->shape == nullptr)) {
    throw std::invalid_argument("a DLPack tensor of " + std::to_string(tensor->ndim) + " dimensions without a shape");
  }
  // strides count elements; a null pointer means row-major
  std::int64_t row_major = 1;
  const Shape shape = shape_of(
      tensor->ndim, [&](int i) { return tensor->shape[i]; },
      [&](int i) { return tensor->strides == nullptr ? next_stride(row_major, tensor->shape[i]) : tensor->strides[i]; },
      1);
  size_ = shape.size;
  contiguous_ = shape.contiguous;
}

void Buffer::advise_huge_pages() const {
  constexpr std::uintptr_t kHugePage = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data_);
  const std::uintptr_t end = begin + static_cast<std::uintptr_t>(size_) * (dtype_ == "float64"   ? 8
                                                                           : dtype_ == "float32" ? 4
                                                                                                 : 2);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

void Buffer::release() {
  if (view_.obj != nullptr) PyBuffer_Release(&view_);
  if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
  if (versioned_ != nullptr && versioned_->deleter != nullptr) versioned_->deleter(versioned_);
  Py_CLEAR(owner_);
  managed_ = nullptr;
  versioned_ = nullptr;
  view_ = {};
}

}  // namespace fastnlcg
