// The functions of AOTInductor's C interface that generated code calls, over strided CPU tensors of our own.
//
// Names, signatures and meaning: torch/csrc/inductor/aoti_torch/c/shim.h of torch 2.11 to 2.13. A handle is a Tensor; views and copies
// of a handle share a Storage, which is freed with the last of them. As there: 0 is success, 1 is failure, and the message of the last
// failure of a thread is to be had from llmc_tensor_message.

#include <omp.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "pool.h"
#include "tensor.h"

namespace {

thread_local char message[512] = "";
thread_local bool grad_enabled = true;  // nothing here computes gradients; generated code saves, clears and restores it

}  // namespace

namespace llmc {

int32_t fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return kFailure;
}

int64_t numel(const Tensor* t) {
  int64_t count = 1;
  for (int64_t i = 0; i < t->dim; i++) count *= t->sizes[i];
  return count;
}

bool contiguous(const Tensor* t) {
  int64_t expected = 1;
  for (int64_t i = t->dim - 1; i >= 0; i--) {
    if (t->sizes[i] == 0) return true;
    if (t->sizes[i] != 1 && t->strides[i] != expected) return false;
    expected *= t->sizes[i];
  }
  return true;
}

int64_t item_bytes(int32_t dtype) {
  switch (dtype) {
    case 0: case 1: case 11: return 1;  // uint8, int8, bool
    case 2: case 5: case 15: return 2;  // int16, float16, bfloat16
    case 3: case 6: return 4;           // int32, float32
    case 4: case 7: return 8;           // int64, float64
    default: return 0;
  }
}

}  // namespace llmc

using namespace llmc;

namespace {

// Elements from the storage's start to the end of what sizes and strides reach; 0 if there are none, -1 if they make no sense.
int64_t extent(int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset) {
  if (dim < 0 || dim > kMaxDim || offset < 0) return -1;
  int64_t last = offset;
  bool empty = false;
  for (int64_t i = 0; i < dim; i++) {
    if (sizes[i] < 0 || strides[i] < 0) return -1;
    if (sizes[i] == 0) {
      empty = true;
      continue;
    }
    int64_t reach;
    if (__builtin_mul_overflow(sizes[i] - 1, strides[i], &reach) || __builtin_add_overflow(last, reach, &last)) return -1;
  }
  if (empty) return 0;
  return last < llmc::kMaxBytes ? last + 1 : -1;
}

void drop(Storage* storage) {
  if (storage->refs.fetch_sub(1, std::memory_order_acq_rel) == 1) llmc::give_block(storage, storage->size_class);
}

// A storage with `bytes` of its own behind it, or over the caller's `data`. Null: no memory.
Storage* new_storage(void* data, int64_t bytes) {
  int32_t size_class;
  void* block = llmc::take_block(llmc::kAlign + (data ? 0 : bytes), &size_class);
  if (!block) return nullptr;
  char* start = data ? static_cast<char*>(data) : static_cast<char*>(block) + llmc::kAlign;
  return new (block) Storage{{1}, start, bytes, size_class};
}

// A handle that owns one reference of `storage`, given back on failure.
int32_t make(Storage* storage, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype, Tensor** out) {
  int32_t size_class;
  void* block = llmc::take_block(sizeof(Tensor), &size_class);
  if (!block) {
    drop(storage);
    return fail("no memory for a tensor");
  }
  Tensor* t = new (block) Tensor{storage, offset, dim, {}, {}, dtype, size_class};
  for (int64_t i = 0; i < dim; i++) {
    t->sizes[i] = sizes[i];
    t->strides[i] = strides[i];
  }
  *out = t;
  return kOk;
}

}  // namespace

// ---- making tensors

API int32_t aoti_torch_empty_strided(
    int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device, int32_t, Tensor** out) {
  const int64_t item = item_bytes(dtype), count = extent(dim, sizes, strides, 0);
  if (device != kCpu) return fail("a tensor on device type %d is wanted; this runtime has the CPU alone", device);
  if (!item) return fail("a tensor of dtype code %d is wanted, which this runtime does not know", dtype);
  if (count < 0 || count > llmc::kMaxBytes / item) return fail("a tensor of %lld dimensions is wanted whose sizes or strides are out of range", static_cast<long long>(dim));
  Storage* storage = new_storage(nullptr, count * item);
  if (!storage) return fail("no memory for a tensor of %lld bytes", static_cast<long long>(count * item));
  return make(storage, dim, sizes, strides, 0, dtype, out);
}

API int32_t aoti_torch_create_tensor_from_blob(
    void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype, int32_t device, int32_t, Tensor** out) {
  const int64_t item = item_bytes(dtype), count = extent(dim, sizes, strides, offset);
  if (device != kCpu) return fail("memory of device type %d is given; this runtime has the CPU alone", device);
  if (!item) return fail("memory of dtype code %d is given, which this runtime does not know", dtype);
  if (count < 0 || count > llmc::kMaxBytes / item) return fail("memory is given whose sizes, strides or offset are out of range (%lld dimensions)", static_cast<long long>(dim));
  if (!data && count) return fail("null is given as the memory of %lld elements", static_cast<long long>(count));
  Storage* storage = new_storage(data, data ? count * item : 0);
  if (!storage) return fail("no memory for a tensor");
  return make(storage, dim, sizes, strides, offset, dtype, out);
}

API int32_t aoti_torch_create_tensor_from_blob_v2(
    void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype, int32_t device, int32_t index,
    Tensor** out, int32_t layout, const uint8_t*, int64_t) {
  if (layout != 0) return fail("memory of layout %d is given; this runtime has strided tensors alone", layout);
  return aoti_torch_create_tensor_from_blob(data, dim, sizes, strides, offset, dtype, device, index, out);
}

API int32_t aoti_torch_new_tensor_handle(Tensor* self, Tensor** out) {
  self->storage->refs.fetch_add(1, std::memory_order_relaxed);
  return make(self->storage, self->dim, self->sizes, self->strides, self->offset, self->dtype, out);
}

// `offset` counts from where `self` begins, not from its storage's start.
API int32_t aoti_torch__reinterpret_tensor(
    Tensor* self, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset, Tensor** out) {
  const int64_t start = self->offset + offset, count = extent(dim, sizes, strides, start), item = item_bytes(self->dtype);
  if (count < 0 || count > self->storage->bytes / item)
    return fail("a view of %lld elements is wanted of a storage of %lld bytes", static_cast<long long>(count), static_cast<long long>(self->storage->bytes));
  self->storage->refs.fetch_add(1, std::memory_order_relaxed);
  return make(self->storage, dim, sizes, strides, start, self->dtype, out);
}

API int32_t aoti_torch_clone(Tensor* self, Tensor** out) {
  if (!contiguous(self)) return fail("a copy is wanted of a tensor that is not contiguous");
  const int64_t bytes = numel(self) * item_bytes(self->dtype);
  Storage* storage = new_storage(nullptr, bytes);
  if (!storage) return fail("no memory for a tensor of %lld bytes", static_cast<long long>(bytes));
  if (bytes) std::memcpy(storage->data, data_of(self), static_cast<size_t>(bytes));
  return make(storage, self->dim, self->sizes, self->strides, 0, self->dtype, out);
}

API int32_t aoti_torch_delete_tensor_object(Tensor* self) {
  if (!self) return kOk;
  drop(self->storage);
  llmc::give_block(self, self->size_class);
  return kOk;
}

// ---- reading them

API int32_t aoti_torch_get_data_ptr(Tensor* self, void** out) {
  *out = data_of(self);
  return kOk;
}
API int32_t aoti_torch_get_dim(Tensor* self, int64_t* out) {
  *out = self->dim;
  return kOk;
}
API int32_t aoti_torch_get_numel(Tensor* self, int64_t* out) {
  *out = numel(self);
  return kOk;
}
API int32_t aoti_torch_get_sizes(Tensor* self, int64_t** out) {
  *out = self->sizes;
  return kOk;
}
API int32_t aoti_torch_get_strides(Tensor* self, int64_t** out) {
  *out = self->strides;
  return kOk;
}
API int32_t aoti_torch_get_dtype(Tensor* self, int32_t* out) {
  *out = self->dtype;
  return kOk;
}
API int32_t aoti_torch_get_device_type(Tensor*, int32_t* out) {
  *out = kCpu;
  return kOk;
}
API int32_t aoti_torch_get_storage_offset(Tensor* self, int64_t* out) {
  *out = self->offset;
  return kOk;
}
API int32_t aoti_torch_get_storage_size(Tensor* self, int64_t* out) {
  *out = self->storage->bytes;
  return kOk;
}
API int32_t aoti_torch_is_contiguous(Tensor* self, bool* out) {
  *out = contiguous(self);
  return kOk;
}

// ---- constants and modes. Numbers: c10/core/ScalarType.h, DeviceType.h, Layout.h.

API int32_t aoti_torch_dtype_uint8() { return 0; }
API int32_t aoti_torch_dtype_int8() { return 1; }
API int32_t aoti_torch_dtype_int16() { return 2; }
API int32_t aoti_torch_dtype_int32() { return 3; }
API int32_t aoti_torch_dtype_int64() { return 4; }
API int32_t aoti_torch_dtype_float16() { return 5; }
API int32_t aoti_torch_dtype_float32() { return 6; }
API int32_t aoti_torch_dtype_float64() { return 7; }
API int32_t aoti_torch_dtype_bool() { return 11; }
API int32_t aoti_torch_dtype_bfloat16() { return 15; }
API int32_t aoti_torch_device_type_cpu() { return kCpu; }
API int32_t aoti_torch_device_type_cuda() { return 1; }
API int32_t aoti_torch_layout_strided() { return 0; }
API bool aoti_torch_grad_mode_is_enabled() { return grad_enabled; }
API void aoti_torch_grad_mode_set_enabled(bool enabled) { grad_enabled = enabled; }

// A condition of the program, such as an index within bounds. The image's entry points turn the exception into a code and a message.
API void aoti_torch_check(bool condition, const char* function, const char* file, uint32_t line, const char* text) {
  if (__builtin_expect(!condition, 0))
    throw std::runtime_error(std::string(text) + "\nraised by " + function + " at " + file + ":" + std::to_string(line));
}

// ---- ours

// The last failure of this thread; "" if there was none since it was asked for last.
API const char* llmc_tensor_message() {
  thread_local char told[sizeof message];
  std::memcpy(told, message, sizeof message);
  message[0] = 0;
  return told;
}

// Threads of parallel regions that the calling thread starts.
API void llmc_tensor_set_num_threads(int32_t count) { omp_set_num_threads(count); }

// [0] blocks ever asked of the system, [1] blocks in use, [2] bytes of free blocks.
API void llmc_tensor_pool_counts(int64_t* out) {
  const llmc::PoolCounts counts = llmc::pool_counts();
  out[0] = counts.taken;
  out[1] = counts.live;
  out[2] = counts.kept;
}
