/* embedding: rows of a packed matrix, bit for bit. C interface. */
#ifndef LLMC_EMBEDDING_H
#define LLMC_EMBEDDING_H

#include "llmc_types.h"

typedef struct {
  int64_t struct_bytes; /* sizeof(LlmcEmbeddingArgs) */
  const int64_t* ids;   /* [count], contiguous */
  const void* weight;   /* packed [num_rows, k] */
  void* y;              /* [count, k], rows y_stride elements apart */
  int64_t count, num_rows, k, y_stride;
  int32_t dtype;
  int32_t num_threads; /* 0: as many as OpenMP would take */
} LlmcEmbeddingArgs;

/* LLMC_BAD_INDEX, with nothing written, if an id lies outside [0, num_rows). */
LLMC_API int32_t llmc_embedding(const LlmcEmbeddingArgs* args);

#endif
