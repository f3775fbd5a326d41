#include "quantized_linear.h"

#include "linear/cpu/matmul.h"

int32_t llmc_quantized_linear(const LlmcQuantizedLinearArgs* a) {
  if (!a || a->struct_bytes != (int64_t)sizeof(LlmcQuantizedLinearArgs)) return LLMC_BAD_STRUCT;
  if (a->bits != 8 && a->bits != 4) return LLMC_BAD_DTYPE;
  if (a->m < 0 || a->n < 1 || a->k < 1 || a->num_threads < 0 || a->group < 1 || a->group % LLMC_PACK_K) return LLMC_BAD_SHAPE;
  if (a->m > 1 && (a->x_stride < 0 || a->y_stride < a->n)) return LLMC_BAD_SHAPE;
  const llmc::MatmulJob job = {a->weight, a->bias, 0, a->m, a->scales};
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
  call.bits = a->bits;
  call.group = a->group;
  return llmc::matmul(call);
}
