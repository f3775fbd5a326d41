// What the AOTInductor shims share: reading a tensor handle through torch's C interface, without trusting it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "llmc_types.h"

#define LLMC_SHIM extern "C" __attribute__((visibility("default")))

namespace llmc {

// A CPU tensor as the kernels see it. `ok` is false if torch would not say, or the tensor is not on a CPU.
struct TensorView {
  void* data = nullptr;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dim = 0;
  int32_t dtype = -1;  // torch's number
  bool ok = false;

  explicit TensorView(AtenTensorHandle handle) {
    int64_t* s = nullptr;
    int64_t* t = nullptr;
    int32_t device = -1;
    if (!handle || aoti_torch_get_data_ptr(handle, &data) || aoti_torch_get_dim(handle, &dim)) return;
    if (aoti_torch_get_sizes(handle, &s) || aoti_torch_get_strides(handle, &t) || aoti_torch_get_dtype(handle, &dtype)) return;
    if (aoti_torch_get_device_type(handle, &device) || device != aoti_torch_device_type_cpu()) return;
    sizes = s;
    strides = t;
    ok = true;
  }

  // Dimensions [first, dim) lie in memory without gaps.
  bool contiguous_from(int64_t first) const {
    int64_t expected = 1;
    for (int64_t i = dim - 1; i >= first; i--) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }
  bool contiguous() const { return contiguous_from(0); }

  // Product of sizes [0, last).
  int64_t rows_before(int64_t last) const {
    int64_t rows = 1;
    for (int64_t i = 0; i < last; i++) rows *= sizes[i];
    return rows;
  }

  // LLMC_* element type, or -1.
  int32_t element() const {
    if (dtype == aoti_torch_dtype_bfloat16()) return LLMC_BFLOAT16;
    if (dtype == aoti_torch_dtype_float32()) return LLMC_FLOAT32;
    if (dtype == aoti_torch_dtype_float16()) return LLMC_FLOAT16;
    return -1;
  }

  // Whether this is the contiguous packed form of [n, k] in `element`, `lead` dimensions before it. n < 0: any whole number of panels.
  bool packed(int64_t n, int64_t k, int32_t element_type, int64_t lead = 0) const {
    const bool wide = element_type == LLMC_FLOAT32;
    if (element() != element_type || !contiguous() || dim != lead + (wide ? 3 : 4)) return false;
    const int64_t* s = sizes + lead;
    if (n >= 0 && s[0] != (n + LLMC_PACK_N - 1) / LLMC_PACK_N) return false;
    if (s[2] != LLMC_PACK_N) return false;
    return wide ? s[1] == k : s[1] == (k + LLMC_PACK_K - 1) / LLMC_PACK_K * (LLMC_PACK_K / 2) && s[3] == 2;
  }

  // Bits of a quantised weight: int8 holds one per byte, uint8 two; 0 for anything else.
  int32_t quantized_bits() const { return dtype == aoti_torch_dtype_int8() ? 8 : dtype == aoti_torch_dtype_uint8() ? 4 : 0; }

  // Whether this is the contiguous quantised packed form of [n, k].
  bool quantized(int64_t n, int64_t k) const {
    const int32_t bits = quantized_bits();
    if (!bits || !contiguous() || dim != (bits == 8 ? 4 : 3) || (bits == 8 && sizes[3] != 2)) return false;
    const int64_t pairs = (k + LLMC_PACK_K - 1) / LLMC_PACK_K * (LLMC_PACK_K / 2);
    return sizes[0] == (n + LLMC_PACK_N - 1) / LLMC_PACK_N && sizes[1] == pairs && sizes[2] == LLMC_PACK_N;
  }

  // Whether these are the scales of such a weight, in `element`.
  bool scales(int64_t n, int64_t k, int64_t group, int32_t element_type) const {
    if (group < 1 || group % LLMC_PACK_K || element() != element_type || !contiguous() || dim != 3) return false;
    return sizes[0] == (n + LLMC_PACK_N - 1) / LLMC_PACK_N && sizes[1] == (k + group - 1) / group && sizes[2] == LLMC_PACK_N;
  }

  // Whether rows (last dimension) are contiguous and lie evenly, so that all leading dimensions collapse into one; their distance.
  bool even_rows(int64_t* stride) const {
    const int64_t last = dim - 1, k = sizes[last];
    if (strides[last] != 1 && k != 1) return false;
    *stride = k;
    int64_t expected = -1;
    for (int64_t i = last - 1; i >= 0; i--) {
      if (sizes[i] == 1) continue;
      if (expected < 0) {
        *stride = strides[i];
      } else if (strides[i] != expected) {
        return false;
      }
      expected = strides[i] * sizes[i];
    }
    return true;
  }
};

// A new contiguous CPU tensor.
inline AOTITorchError empty_contiguous(int64_t dim, const int64_t* sizes, int32_t torch_dtype, AtenTensorHandle* ret) {
  constexpr int64_t kMaxDim = 8;
  if (dim > kMaxDim) return AOTI_TORCH_FAILURE;
  int64_t strides[kMaxDim] = {};
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; i--) {
    strides[i] = step;
    step *= sizes[i];
  }
  return aoti_torch_empty_strided(dim, sizes, strides, torch_dtype, aoti_torch_device_type_cpu(), 0, ret);
}

// Hands `made` to the caller if the kernel succeeded, frees it otherwise.
inline AOTITorchError give(int32_t code, AtenTensorHandle made, AtenTensorHandle* ret) {
  if (code == LLMC_OK) {
    *ret = made;
    return AOTI_TORCH_SUCCESS;
  }
  aoti_torch_delete_tensor_object(made);
  return AOTI_TORCH_FAILURE;
}

}  // namespace llmc
