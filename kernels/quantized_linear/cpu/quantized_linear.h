/* quantized_linear: y = x @ W^T + bias, W held as small integers with a scale per group along K. C interface. */
#ifndef LLMC_QUANTIZED_LINEAR_H
#define LLMC_QUANTIZED_LINEAR_H

#include "llmc_types.h"

typedef struct {
  int64_t struct_bytes; /* sizeof(LlmcQuantizedLinearArgs) */
  const void* x;        /* [m, k], rows x_stride elements apart, elements of a row contiguous */
  const void* weight;   /* packed integers of W [n, k], 64-byte aligned */
  const void* scales;   /* [ceil(n / 16), ceil(k / group), 16] of dtype */
  const void* bias;     /* [n] of dtype, or NULL */
  void* y;              /* [m, n], rows y_stride elements apart */
  int64_t m, n, k;
  int64_t x_stride, y_stride;
  int64_t group;       /* depths that share a scale, a multiple of 32 */
  int32_t bits;        /* 8 or 4 */
  int32_t dtype;       /* of x, scales, bias and y */
  int32_t num_threads; /* 0: as many as OpenMP would take */
} LlmcQuantizedLinearArgs;

/* The bits of row i depend on x[i], the column's integers and scales, k and group; never on m, n, i or the number of threads. */
LLMC_API int32_t llmc_quantized_linear(const LlmcQuantizedLinearArgs* args);

#endif
