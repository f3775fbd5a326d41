/* silu_mul and gelu_mul: an activation of one half times the other. C interface. */
#ifndef LLMC_SILU_MUL_H
#define LLMC_SILU_MUL_H

#include "llmc_types.h"

enum { LLMC_SILU = 0, LLMC_GELU = 1, LLMC_GELU_TANH = 2 };

typedef struct {
  int64_t struct_bytes; /* sizeof(LlmcGatedArgs) */
  const void* gate;     /* [m, n], rows gate_stride elements apart */
  const void* up;       /* [m, n], rows up_stride elements apart */
  void* y;              /* [m, n], contiguous: act(gate) * up, computed in fp32 and rounded once */
  int64_t m, n, gate_stride, up_stride;
  int32_t activation;
  int32_t dtype;
  int32_t num_threads; /* 0: as many as OpenMP would take */
  int32_t unused;
} LlmcGatedArgs;

LLMC_API int32_t llmc_gated(const LlmcGatedArgs* args);

#endif
