// What the two halves of llmc's part of a model image share: tensors as TVM FFI hands them over, and the step's threads.
#pragma once
#include <tvm/ffi/c_api.h>

#include <cstdint>

namespace llmc_tvm {

inline thread_local int32_t step_threads = 0;  // of the step that this thread runs

// The tensor a value holds; null if it is none, or not contiguous.
inline const DLTensor* tensor(const TVMFFIAny& value) {
  const DLTensor* found = nullptr;
  if (value.type_index == kTVMFFITensor) found = TVMFFITensorGetDLTensorPtr(value.v_obj);
  if (value.type_index == kTVMFFIDLTensorPtr) found = static_cast<const DLTensor*>(value.v_ptr);
  if (found == nullptr || found->dtype.lanes != 1) return nullptr;
  int64_t expected = 1;
  for (int32_t axis = found->ndim - 1; axis >= 0; axis--) {
    if (found->strides != nullptr && found->shape[axis] != 1 && found->strides[axis] != expected) return nullptr;
    expected *= found->shape[axis];
  }
  return found;
}

inline void* data(const DLTensor* t) { return static_cast<char*>(t->data) + t->byte_offset; }

}  // namespace llmc_tvm
