#include "linear.h"

#include "matmul.h"

int32_t llmc_linear(const LlmcLinearArgs* a) {
  if (!a || a->struct_bytes != (int64_t)sizeof(LlmcLinearArgs)) return LLMC_BAD_STRUCT;
  if (a->m < 0 || a->n < 1 || a->k < 1 || a->num_threads < 0) return LLMC_BAD_SHAPE;
  if (a->m > 1 && (a->x_stride < 0 || a->y_stride < a->n)) return LLMC_BAD_SHAPE;
  const llmc::MatmulJob job = {a->weight, a->bias, 0, a->m};
  llmc::MatmulCall call = {};
  call.x = a->x;
  call.x_stride = a->x_stride;
  call.y = a->y;
  call.y_stride = a->y_stride;
  call.n = a->n;
  call.k = a->k;
  call.dtype = a->dtype;
  call.num_threads = a->num_threads;
  call.jobs = &job;
  call.num_jobs = 1;
  return llmc::matmul(call);
}
