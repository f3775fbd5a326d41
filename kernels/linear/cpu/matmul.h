// The matrix core behind linear and grouped_linear: rows of x against packed panels, any number of weights in one parallel region.
#pragma once

#include "llmc_types.h"

namespace llmc {

// Rows [begin, end) of the call against one packed weight. Jobs tile the rows in order.
struct MatmulJob {
  const void* weight;
  const void* bias;  // or nullptr
  int64_t begin, end;
  const void* scales = nullptr;  // of a quantised weight
};

struct MatmulCall {
  const void* x;
  int64_t x_stride;     // elements
  const int64_t* rows;  // row i of the call is row rows[i] of x and y; nullptr: row i
  void* y;
  int64_t y_stride;  // elements
  int64_t n, k;
  int32_t dtype;
  int32_t num_threads;  // 0: OpenMP's choice
  const MatmulJob* jobs;
  int64_t num_jobs;
  int32_t bits = 0;   // of a quantised weight, 8 or 4; 0: the weight is of `dtype`
  int64_t group = 0;  // depths that share a scale, a multiple of 32
};

// Shapes are checked by the caller. Returns an LLMC_* code.
int32_t matmul(const MatmulCall& call);

// Bytes of one packed [n, k] matrix, of elements and of integers of 8 or 4 bits.
int64_t packed_bytes(int64_t n, int64_t k, int32_t dtype);
int64_t quantized_bytes(int64_t n, int64_t k, int32_t bits);

// Threads worth starting for work that reads `bytes` and multiplies `products` times.
int num_threads_for(int32_t wanted, int64_t bytes, int64_t products);

}  // namespace llmc
