// The DLPack ABI, versions 0 and 1, with the exchange API of version 1.3 (https://dmlc.github.io/dlpack): structs that
// every producer of tensors agrees on, so that tensors can be read without linking the producer's library.
#pragma once

#include <cstdint>

namespace fastnlcg {

struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: row-major
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* manager_context;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  std::uint32_t major, minor;
  void* manager_context;
  void (*deleter)(DLManagedTensorVersioned*);
  std::uint64_t flags;
  DLTensor tensor;
};

// What `type(tensor).__dlpack_c_exchange_api__` points to (capsule "dlpack_exchange_api"). Only the last function is
// called here: it fills a DLTensor that borrows from the tensor, in tens of nanoseconds.
struct DLPackExchangeAPI {
  std::uint32_t major, minor;
  DLPackExchangeAPI* older;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
};

constexpr std::int32_t kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13;
constexpr std::uint8_t kDLFloat = 2, kDLBfloat = 4;

}  // namespace fastnlcg
