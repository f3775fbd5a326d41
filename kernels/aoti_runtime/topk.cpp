// aoti_torch_cpu_topk: the k largest or smallest along the last dimension, as a mixture of experts chooses among its experts.
//
// Which of equal values wins, and in which order, is libtorch's choice (ATen/native/TopKImpl.h of torch 2.11 to 2.13): one of the
// standard library's algorithms on pairs of value and index, with NaN as the largest. The same algorithms are called here.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "tensor.h"

namespace {

using llmc::Tensor;

constexpr int32_t kFloat16 = 5, kFloat32 = 6, kBFloat16 = 15, kInt64 = 4;
constexpr int64_t kRowsInParallel = 1 << 13;  // values; below, waking the other threads costs more than the work

struct Entry {
  float value;
  int64_t index;
};

// x before y. NaN stands above every number.
template <bool largest>
struct Before {
  bool operator()(const Entry& x, const Entry& y) const {
    const bool x_nan = x.value != x.value, y_nan = y.value != y.value;
    if (largest) return (x_nan && !y_nan) || x.value > y.value;
    return (!x_nan && y_nan) || x.value < y.value;
  }
};

template <bool largest>
void choose(std::vector<Entry>& row, int64_t k, bool sorted) {
  const Before<largest> before;
  if (k * 64 <= static_cast<int64_t>(row.size())) {
    std::partial_sort(row.begin(), row.begin() + k, row.end(), before);
    return;
  }
  std::nth_element(row.begin(), row.begin() + k - 1, row.end(), before);
  if (sorted) std::sort(row.begin(), row.begin() + k - 1, before);
}

float load(const char* at, int32_t dtype) {
  if (dtype == kFloat32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  if (dtype == kFloat16) {
    _Float16 value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

int32_t like(const Tensor* self, int64_t k, int32_t dtype, Tensor** out) {
  int64_t sizes[llmc::kMaxDim], strides[llmc::kMaxDim], step = 1;
  for (int64_t i = self->dim - 1; i >= 0; i--) {
    sizes[i] = i == self->dim - 1 ? k : self->sizes[i];
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return aoti_torch_empty_strided(self->dim, sizes, strides, dtype, llmc::kCpu, 0, out);
}

}  // namespace

API int32_t aoti_torch_cpu_topk(Tensor* self, int64_t k, int64_t dim, int32_t largest, int32_t sorted, Tensor** values, Tensor** indices) {
  if (self->dim < 1 || (dim != -1 && dim != self->dim - 1)) return llmc::fail("the largest along another dimension than the last are wanted");
  if (self->dtype != kFloat32 && self->dtype != kFloat16 && self->dtype != kBFloat16)
    return llmc::fail("the largest of values of dtype code %d are wanted; here there are 5, 6 and 15", self->dtype);
  if (!llmc::contiguous(self)) return llmc::fail("the largest values of a tensor that is not contiguous are wanted");
  const int64_t n = self->sizes[self->dim - 1];
  if (k < 0 || k > n) return llmc::fail("the %lld largest of %lld values are wanted", static_cast<long long>(k), static_cast<long long>(n));
  if (const int32_t status = like(self, k, self->dtype, values)) return status;
  if (const int32_t status = like(self, k, kInt64, indices)) {
    aoti_torch_delete_tensor_object(*values);
    return status;
  }
  if (k == 0) return llmc::kOk;
  const int64_t rows = llmc::numel(self) / n, item = llmc::item_bytes(self->dtype);
  const char* in = llmc::data_of(self);
  char* best = llmc::data_of(*values);
  int64_t* at = reinterpret_cast<int64_t*>(llmc::data_of(*indices));
  bool no_memory = false;
#pragma omp parallel if (rows * n >= kRowsInParallel)
  {
    std::vector<Entry> row;
    try {
      row.resize(static_cast<size_t>(n));
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      no_memory = true;
    }
#pragma omp for
    for (int64_t r = 0; r < rows; r++) {
      if (row.empty()) continue;
      for (int64_t j = 0; j < n; j++) row[j] = Entry{load(in + (r * n + j) * item, self->dtype), j};
      largest ? choose<true>(row, k, sorted) : choose<false>(row, k, sorted);
      for (int64_t j = 0; j < k; j++) {
        at[r * k + j] = row[j].index;
        std::memcpy(best + (r * k + j) * item, in + (r * n + row[j].index) * item, static_cast<size_t>(item));
      }
    }
  }
  if (!no_memory) return llmc::kOk;
  aoti_torch_delete_tensor_object(*values);
  aoti_torch_delete_tensor_object(*indices);
  return llmc::fail("no memory for %lld values", static_cast<long long>(n));
}
