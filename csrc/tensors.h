// The addresses of torch's tensors: read through torch's DLPack exchange API (torch >= 2.10), at every step, in tens of
// nanoseconds a tensor, and checked against what a table expects. An address is never kept instead of a tensor: torch
// moves memory under the same object (share_memory_, .data, swap_tensors, storage.resize_).
#pragma once

#include <Python.h>

#include <cstdint>
#include <string>
#include <vector>

#include "dlpack.h"
#include "step_args.h"

namespace fastnlcg {

struct TensorShape {
  std::vector<std::int64_t> shape, strides;  // in elements; a dimension of size 1 may have any stride
};

class TensorReader {
 public:
  // `dlpack_api`: the capsule torch.Tensor.__dlpack_c_exchange_api__; `type`: torch.Tensor itself. `device`: the
  // ordinal of a GPU, -1 for the CPU. Throws std::invalid_argument for another version of the API.
  TensorReader(PyObject* dlpack_api, PyObject* type, int device);

  // The address of a tensor of this dtype and shape, on the device; null if it is anything else.
  void* address(PyObject* tensor, DType, const TensorShape&) const;
  bool is_plain(PyObject* object) const { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type_; }

 private:
  const DLPackExchangeAPI* api_;
  PyObject* type_;
  int device_;
};

// False if a tensor whose address is new has what address() does not see: a negative bit, or less storage than
// elements.
bool is_as_it_looks(PyObject* tensor);

}  // namespace fastnlcg
