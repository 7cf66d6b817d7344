// A borrowed view of somebody's memory, taken through the buffer protocol (NumPy, array, memoryview), DLPack (torch,
// CuPy, JAX, a bare capsule) or __cuda_array_interface__ (Numba). Holds the owner for as long as it lives. Copies
// nothing, converts nothing.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>

namespace fastnlcg {

struct DLManagedTensor;
struct DLManagedTensorVersioned;

// What the CPU's memory is called: in the emulation it stands for a GPU's too.
#ifdef FASTNLCG_EMULATED
constexpr const char* kHostDevice = "cuda:0";
#else
constexpr const char* kHostDevice = "cpu";
#endif

class Buffer {
 public:
  // Throws std::invalid_argument for a consumed or malformed capsule, and leaves a Python exception set (throwing
  // PythonError) where the owner's own protocol raised. An object that offers none of them: BufferTypeError.
  explicit Buffer(PyObject* owner);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  std::int64_t size() const { return size_; }            // elements
  const std::string& dtype() const { return dtype_; }    // "float32", ...; "?" and the format where unknown
  const std::string& device() const { return device_; }  // "cpu", "cuda:0", ...
  bool readonly() const { return readonly_; }
  bool contiguous() const { return contiguous_; }  // row-major

  // Asks for 2 MiB pages under memory that nothing has touched yet: long streams then miss the TLB less. A hint.
  void advise_huge_pages() const;

 private:
  void from_buffer_protocol(PyObject* owner);
  void from_dlpack(PyObject* owner);
  void from_cuda_array_interface(PyObject* owner);
  void from_capsule(PyObject* capsule);
  void release();

  void* data_ = nullptr;
  std::int64_t size_ = 0;
  std::string dtype_, device_ = kHostDevice;
  bool readonly_ = false, contiguous_ = true;

  PyObject* owner_ = nullptr;  // of memory that no protocol holds for us
  Py_buffer view_ = {};
  DLManagedTensor* managed_ = nullptr;
  DLManagedTensorVersioned* versioned_ = nullptr;
};

struct PythonError {};  // a Python exception is set
struct BufferTypeError {
  std::string type_name;
};

}  // namespace fastnlcg
