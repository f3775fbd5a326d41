// A strided CPU tensor, as the files of this folder share it. Behind a handle of AOTInductor's C interface lies a Tensor.
#pragma once

#include <atomic>
#include <cstdint>

#include "pool.h"

#define API extern "C" __attribute__((visibility("default")))

namespace llmc {

constexpr int64_t kMaxDim = 8;
constexpr int32_t kOk = 0, kFailure = 1, kCpu = 0;

struct Storage {
  std::atomic<int64_t> refs;
  char* data;
  int64_t bytes;
  int32_t size_class;
};
static_assert(sizeof(Storage) <= kAlign, "the data of a block follows its Storage, aligned");

struct Tensor {
  Storage* storage;
  int64_t offset;  // elements from the storage's start
  int64_t dim;
  int64_t sizes[kMaxDim];
  int64_t strides[kMaxDim];
  int32_t dtype;
  int32_t size_class;
};

// Keep the thread's message for llmc_tensor_message; returns kFailure.
__attribute__((format(printf, 1, 2))) int32_t fail(const char* format, ...);
int64_t numel(const Tensor* t);
bool contiguous(const Tensor* t);
// Bytes of an element by c10::ScalarType's number; 0 for a type that no program of ours has.
int64_t item_bytes(int32_t dtype);

inline char* data_of(const Tensor* t) { return t->storage->data + t->offset * item_bytes(t->dtype); }

}  // namespace llmc

API int32_t aoti_torch_empty_strided(
    int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device, int32_t index, llmc::Tensor** out);
API int32_t aoti_torch_delete_tensor_object(llmc::Tensor* self);
