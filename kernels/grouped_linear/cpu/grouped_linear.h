/* grouped_linear: each row against the packed weight of its own expert. C interface. */
#ifndef LLMC_GROUPED_LINEAR_H
#define LLMC_GROUPED_LINEAR_H

#include "llmc_types.h"

typedef struct {
  int64_t struct_bytes;      /* sizeof(LlmcGroupedLinearArgs) */
  const void* x;             /* [m, k], rows x_stride elements apart */
  const void* weight;        /* num_experts packed [n, k] matrices, one after the other, 64-byte aligned */
  const int64_t* expert_ids; /* [m], contiguous */
  const void* bias;          /* [num_experts, n] contiguous, or NULL */
  void* y;                   /* [m, n], rows y_stride elements apart */
  int64_t m, n, k, num_experts;
  int64_t x_stride, y_stride;
  int32_t dtype;
  int32_t num_threads; /* 0: as many as OpenMP would take */
} LlmcGroupedLinearArgs;

/* Row i has the bits that llmc_linear gives x[i] and expert expert_ids[i].
   LLMC_BAD_INDEX, with nothing written, if an expert id lies outside [0, num_experts). */
LLMC_API int32_t llmc_grouped_linear(const LlmcGroupedLinearArgs* args);

#endif
