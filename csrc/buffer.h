// A borrowed view of an array's memory, taken through the buffer protocol (NumPy, array, memoryview), DLPack (torch,
// CuPy, JAX, a bare capsule) or __cuda_array_interface__ (Numba). Holds the owner for as long as it lives. Copies
// nothing, converts nothing.
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>

namespace fastnlcg {

struct DLManagedTensor;
struct DLManagedTensorVersioned;

// The name of the CPU's memory; the emulation uses it as a GPU's.
#ifdef FASTNLCG_EMULATED
constexpr const char* kHostDevice = "cuda:0";
#else
constexpr const char* kHostDevice = "cpu";
#endif

class Buffer {
 public:
  // Throws std::invalid_argument for a consumed or malformed capsule, PythonError if the owner's own protocol raised
  // (its exception stays set), and BufferTypeError for an object without any of these protocols.
  explicit Buffer(PyObject* owner);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  std::int64_t size() const { return size_; }            // elements
  const std::string& dtype() const { return dtype_; }    // "float32", ...; else the protocol's own name
  const std::string& device() const { return device_; }  // "cpu", "cuda:0", ...
  bool readonly() const { return readonly_; }
  bool contiguous() const { return contiguous_; }  // row-major

  // Asks for 2 MiB pages for memory that has not been touched yet: long arrays then miss the TLB less. A hint.
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

  PyObject* owner_ = nullptr;  // held here, because the protocol holds no reference
  Py_buffer view_ = {};
  DLManagedTensor* managed_ = nullptr;
  DLManagedTensorVersioned* versioned_ = nullptr;
};

struct PythonError {};  // a Python exception is set
struct BufferTypeError {
  std::string type_name;
};

}  // namespace fastnlcg
