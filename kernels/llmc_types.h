/* Types shared by every kernel's C interface. Plain C, no torch. */
#ifndef LLMC_TYPES_H
#define LLMC_TYPES_H

#include <stdint.h>

#ifdef __cplusplus
#define LLMC_API extern "C" __attribute__((visibility("default")))
#else
#define LLMC_API
#endif

/* Element types. The numbers are part of the interface. */
enum {
  LLMC_FLOAT32 = 0,
  LLMC_FLOAT16 = 1,
  LLMC_BFLOAT16 = 2,
  LLMC_INT8 = 3,     /* KV caches only: with a float32 scale per token and head */
  LLMC_FP8_E4M3 = 4, /* KV caches only: the "fn" variant, no infinity, largest value 448; the scale is 1 */
};

/* What an entry point returns. Anything but LLMC_OK means that nothing was written. */
enum {
  LLMC_OK = 0,
  LLMC_BAD_STRUCT = 1, /* struct_bytes is not that of this build: caller and kernels disagree on the interface */
  LLMC_BAD_DTYPE = 2,
  LLMC_BAD_SHAPE = 3,
  LLMC_BAD_INDEX = 4,    /* an id lies outside the matrix */
  LLMC_NO_HARDWARE = 5,  /* this process may not use AMX, or the level lacks the instructions */
  LLMC_NO_MEMORY = 6,
  LLMC_PEER_LOST = 7,    /* another process of the group ended; what was to be written is not whole */
};

/* Rows of a packed weight are handled 16 at a time; K of 16-bit types is padded to 32. */
enum { LLMC_PACK_N = 16, LLMC_PACK_K = 32 };

#endif
