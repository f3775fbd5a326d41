/* linear: y = x @ W^T + bias with a packed W. C interface; layout and promise in docs/architecture.md. */
#ifndef LLMC_LINEAR_H
#define LLMC_LINEAR_H

#include "llmc_types.h"

typedef struct {
  int64_t struct_bytes; /* sizeof(LlmcLinearArgs) */
  const void* x;        /* [m, k], rows x_stride elements apart, elements of a row contiguous */
  const void* weight;   /* packed W [n, k], 64-byte aligned */
  const void* bias;     /* [n] of dtype, or NULL */
  void* y;              /* [m, n], rows y_stride elements apart */
  int64_t m, n, k;
  int64_t x_stride, y_stride;
  int32_t dtype;       /* of x, weight, bias and y */
  int32_t num_threads; /* 0: as many as OpenMP would take */
} LlmcLinearArgs;

/* The bits of row i depend on x[i], the column's weights and k; never on m, n, i or the number of threads. */
LLMC_API int32_t llmc_linear(const LlmcLinearArgs* args);

#endif
