/* lora_add: a linear's result plus the low-rank term of each row's adapter. C interface. */
#ifndef LLMC_LORA_ADD_H
#define LLMC_LORA_ADD_H

#include "llmc_types.h"

/* Part i of the columns has A [rank, k] at offsets[i] of a pool row and B [rank, sizes[i]] behind it; offset -1: nothing is added. */
typedef struct {
  int64_t struct_bytes;   /* sizeof(LlmcLoraAddArgs) */
  const void* y;          /* [m, n], rows y_stride elements apart */
  const void* x;          /* [m, k], rows x_stride elements apart */
  const int32_t* slots;   /* [m]: row of the pool, or -1, which gives the row the bits it has in y */
  const void* pool;       /* [num_slots, slot_elements], contiguous */
  void* out;              /* [m, n], contiguous: y + (x A^T) B, summed in fp32, rounded once */
  const int64_t* sizes;   /* [num_parts], together n */
  const int64_t* offsets; /* [num_parts] */
  int64_t m, n, k, y_stride, x_stride, num_slots, slot_elements, num_parts, rank;
  int32_t dtype;      /* of y, x and out */
  int32_t pool_dtype; /* float32, float16 or bfloat16 */
  int32_t num_threads; /* 0: as many as OpenMP would take */
  int32_t unused;
} LlmcLoraAddArgs;

LLMC_API int32_t llmc_lora_add(const LlmcLoraAddArgs* args);

#endif
