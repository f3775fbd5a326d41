/* quantized_embedding: rows of a quantised packed matrix, dequantised. C interface. */
#ifndef LLMC_QUANTIZED_EMBEDDING_H
#define LLMC_QUANTIZED_EMBEDDING_H

#include "llmc_types.h"

typedef struct {
  int64_t struct_bytes; /* sizeof(LlmcQuantizedEmbeddingArgs) */
  const int64_t* ids;   /* [count], contiguous */
  const void* weight;   /* packed integers of W [num_rows, k] */
  const void* scales;   /* [num_rows / 16, ceil(k / group), 16] of dtype */
  void* y;              /* [count, k] of dtype, rows y_stride elements apart */
  int64_t count, num_rows, k, y_stride;
  int64_t group;       /* depths that share a scale, a multiple of 32 */
  int32_t bits;        /* 8 or 4 */
  int32_t dtype;       /* of scales and y */
  int32_t num_threads; /* 0: as many as OpenMP would take */
} LlmcQuantizedEmbeddingArgs;

/* weight * scale, rounded once to dtype. LLMC_BAD_INDEX, with nothing written, if an id lies outside [0, num_rows). */
LLMC_API int32_t llmc_quantized_embedding(const LlmcQuantizedEmbeddingArgs* args);

#endif
