/* SHA-256 (FIPS 180-4) of several messages of one length side by side. C interface. */
#ifndef LLMC_SHA256_H
#define LLMC_SHA256_H

#include "llmc_types.h"

enum { LLMC_SHA256_LANES = 16, LLMC_SHA256_BYTES = 32 };

typedef struct {
  int64_t struct_bytes;        /* sizeof(LlmcSha256Args) */
  const void* const* messages; /* num_messages addresses */
  uint8_t* digests;            /* [num_messages, LLMC_SHA256_BYTES], as hashlib's digest() */
  int64_t num_messages;        /* 1 to LLMC_SHA256_LANES; fewer take the same time */
  int64_t message_bytes;       /* of each, 0 to 2^60 */
} LlmcSha256Args;

/* LLMC_NO_HARDWARE from a build for a level without AVX-512. */
LLMC_API int32_t llmc_sha256(const LlmcSha256Args* args);

#endif
