// C entry point of llmc::paged_attention and llmc::paged_attend on a CPU. No torch, usable from C, C++ and ctypes.
//
// Cache tensors are [num_blocks, num_kv_heads, block_size, head_dim], for LLMC_INT8 head_dim + 4: the scales take four bytes per
// token. The order inside one tile is private to this kernel (paged_attention_layout.h, paged_attention_quantized.h); zeroed
// memory is a valid empty cache.
#pragma once
#include "llmc_types.h"

// What llmc_paged_attention returns. Nothing was written when it is not LLMC_PA_OK.
enum llmc_pa_status {
  LLMC_PA_OK = 0,
  LLMC_PA_BAD_STRUCT_SIZE = 1,    // struct_size is not that of this header
  LLMC_PA_BAD_DTYPE = 2,          // dtype unknown, or kv_dtype none that goes with it
  LLMC_PA_BAD_SHAPE = 3,          // negative size, head_dim or block_size no multiple of 8, heads no multiple of kv heads
  LLMC_PA_BAD_POINTER = 4,        // a pointer that the sizes need is null
  LLMC_PA_BAD_QUERY_START = 5,    // query_start_loc does not start at 0, falls, or ends past num_tokens
  LLMC_PA_BAD_SEQ_LEN = 6,        // seq_len negative or longer than its block table row
  LLMC_PA_BAD_BLOCK = 7,          // a block id that a query row needs is outside [0, num_blocks)
  LLMC_PA_BAD_SLOT = 8,           // a slot lies past the last block
  LLMC_PA_BAD_NUMBER = 9,         // window or softcap negative, or a number that is not finite
  LLMC_PA_NO_MEMORY = 10,         // scratch memory could not be allocated
};

// Strides count elements. The last dimension (head_dim) of q, k, v, out and of cache tiles is contiguous.
typedef struct llmc_paged_attention_args {
  uint32_t struct_size;           // sizeof(llmc_paged_attention_args)
  int32_t num_threads;            // 0: what OpenMP would use
  int32_t dtype;                  // of q, k, v and out (LLMC_FLOAT32, ...)
  int32_t kv_dtype;               // of the caches: dtype, LLMC_INT8 or LLMC_FP8_E4M3
  int32_t sinks_dtype;            // of sinks; ignored without sinks
  float scale;                    // times q.k
  float softcap;                  // 0: none; else scores become softcap * tanh(score / softcap)
  int32_t reserved;               // 0
  int64_t window;                 // keys a query sees, its own included; 0: all
  int64_t num_tokens;             // T
  int64_t num_seqs;               // B
  int64_t num_heads;              // H
  int64_t num_kv_heads;           // Hkv
  int64_t head_dim;               // D
  int64_t num_blocks;             // NB
  int64_t block_size;
  int64_t max_blocks;             // M
  const void* q;                  // [T, H, D]
  const void* k;                  // [T, Hkv, D]; null with v and slot_mapping: paged_attend, nothing is written
  const void* v;                  // [T, Hkv, D] or null
  void* k_cache;                  // [NB, Hkv, block_size, D (+ 4)], written
  void* v_cache;                  // [NB, Hkv, block_size, D (+ 4)], written
  const int64_t* slot_mapping;    // [T], negative: not written; or null
  const int32_t* block_tables;    // [B, M]
  const int32_t* seq_lens;        // [B]
  const int32_t* query_start_loc; // [B + 1]
  const void* sinks;              // [H] or null
  void* out;                      // [T, H, D] contiguous
  int64_t q_token_stride, q_head_stride;
  int64_t k_token_stride, k_head_stride;
  int64_t v_token_stride, v_head_stride;
  int64_t k_cache_block_stride, k_cache_head_stride;
  int64_t v_cache_block_stride, v_cache_head_stride;
  int64_t block_table_stride;
} llmc_paged_attention_args;

// Write k and v (if given) of every token with a slot, then attend. The bits of an output row depend on its own sequence up to its
// own position alone: not on the batch, the chunking of the prompt, block ids or the number of threads.
LLMC_API int llmc_paged_attention(const llmc_paged_attention_args* args);

// One sentence for a status.
LLMC_API const char* llmc_paged_attention_message(int status);
