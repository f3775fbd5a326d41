/* all_reduce: the sum over processes of one machine, through memory they share. C interface. */
#ifndef LLMC_ALL_REDUCE_H
#define LLMC_ALL_REDUCE_H

#include "llmc_types.h"

/* How much memory a group of `ranks` shares, zeroed at first. */
LLMC_API int64_t llmc_all_reduce_bytes(int64_t ranks);

/* Make this process rank `rank` of `ranks`; `shared` is the group's memory and stays mapped for the life of the process. */
LLMC_API int32_t llmc_all_reduce_join(void* shared, int64_t bytes, int64_t rank, int64_t ranks);

/* End every wait of the group, now and later, with LLMC_PEER_LOST. Any process of the group may call it, from any thread. */
LLMC_API void llmc_all_reduce_abort(void* shared);

typedef struct {
  int64_t struct_bytes; /* sizeof(LlmcAllReduceArgs) */
  const void* x;        /* [n], contiguous, the same n on every rank */
  void* y;              /* [n], contiguous: the sum in rank order, in fp32, rounded once */
  int64_t n;
  int64_t ranks; /* those of the group, or the program was compiled for another */
  int32_t dtype;
  int32_t unused;
} LlmcAllReduceArgs;

LLMC_API int32_t llmc_all_reduce(const LlmcAllReduceArgs* args);

#endif
