/* rope_kv_write: q and k normalised per head and rotated, k and v written into the paged cache. C interface.
 *
 * The caches are those of paged_attention.h, their private order included. */
#ifndef LLMC_ROPE_KV_WRITE_H
#define LLMC_ROPE_KV_WRITE_H

#include "llmc_types.h"

/* Strides count elements. The last dimension of every tensor is contiguous. */
typedef struct {
  int64_t struct_bytes;        /* sizeof(LlmcRopeKVWriteArgs) */
  const void* q;               /* [T, H, D] */
  const void* k;               /* [T, J, D] */
  const void* v;               /* [T, J, D] */
  const int64_t* positions;    /* [T], rows of cos and sin */
  const void* cos;             /* [P, R]: x * cos + rotate_half(x) * sin on the first R dimensions of a head */
  const void* sin;             /* [P, R] */
  const void* q_weight;        /* [D]: x / sqrt(mean(x^2) + eps) * (offset + weight) before the rotation; NULL: none */
  const void* k_weight;        /* [D]; NULL: none */
  void* k_cache;               /* [num_blocks, J, block_size, D (+ 4)], written */
  void* v_cache;               /* as k_cache */
  const int64_t* slot_mapping; /* [T], block * block_size + offset; negative: not written */
  void* out;                   /* [T, H, D], contiguous: q, normalised and rotated */
  int64_t num_tokens, num_heads, num_kv_heads, head_dim;           /* T, H, J, D */
  int64_t rotated, num_positions, num_blocks, block_size;          /* R, P */
  int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  int64_t cos_stride, sin_stride;                                  /* between positions */
  int64_t k_cache_block_stride, k_cache_head_stride, v_cache_block_stride, v_cache_head_stride;
  double eps, offset;
  int32_t round_first;    /* nonzero: a norm's quotient is rounded to dtype before the weight is applied */
  int32_t dtype;          /* of q, k, v and out */
  int32_t kv_dtype;       /* of the caches: dtype, LLMC_INT8 or LLMC_FP8_E4M3 */
  int32_t table_dtype;    /* of cos and sin */
  int32_t q_weight_dtype; /* ignored without q_weight */
  int32_t k_weight_dtype;
  int32_t num_threads; /* 0: as many as OpenMP would take */
  int32_t unused;
} LlmcRopeKVWriteArgs;

/* A token's bits depend on its own values and position alone. Computed in fp32; rounded to dtype after the norm and at the end.
 * Returns LLMC_OK, LLMC_BAD_STRUCT, LLMC_BAD_DTYPE, LLMC_BAD_SHAPE, LLMC_BAD_INDEX (a position past the tables, a slot past the cache). */
LLMC_API int32_t llmc_rope_kv_write(const LlmcRopeKVWriteArgs* args);

/* One sentence for what it returned. */
LLMC_API const char* llmc_rope_kv_write_message(int32_t code);

#endif
