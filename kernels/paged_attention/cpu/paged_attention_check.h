// Which keys a query sees, and whether a call is sound. Everything is checked before anything is written.
#pragma once
#include <algorithm>
#include <cmath>

#include "paged_attention.h"

namespace llmc_pa {

using Args = llmc_paged_attention_args;

struct Visible {
  int lo, hi;  // keys [lo, hi) of the sequence
};

static inline Visible visible(int position, int64_t window) {
  if (position < 0) return {0, 0};
  return {window > 0 && position + 1 > window ? static_cast<int>(position + 1 - window) : 0, position + 1};
}

static inline int query_rows(const Args& a, int64_t seq) { return a.query_start_loc[seq + 1] - a.query_start_loc[seq]; }

// Index of the first key any query row of the sequence sees.
static inline int first_visible(const Args& a, int64_t seq) { return visible(std::max(0, a.seq_lens[seq] - query_rows(a, seq)), a.window).lo; }

static inline bool known_dtype(int32_t dtype) { return dtype == LLMC_FLOAT32 || dtype == LLMC_FLOAT16 || dtype == LLMC_BFLOAT16; }

static inline bool known_kv_dtype(const Args& a) { return a.kv_dtype == a.dtype || a.kv_dtype == LLMC_INT8 || a.kv_dtype == LLMC_FP8_E4M3; }

static inline int check(const Args& a) {
  if (!known_dtype(a.dtype) || !known_kv_dtype(a) || (a.sinks != nullptr && !known_dtype(a.sinks_dtype))) return LLMC_PA_BAD_DTYPE;
  if (a.num_tokens < 0 || a.num_seqs < 0 || a.num_blocks < 0 || a.max_blocks < 0 || a.num_heads < 1 || a.num_kv_heads < 1) return LLMC_PA_BAD_SHAPE;
  if (a.num_tokens > INT32_MAX || a.num_seqs >= INT32_MAX || a.num_heads > 65536 || a.num_heads % a.num_kv_heads != 0) return LLMC_PA_BAD_SHAPE;
  if (a.head_dim < 8 || a.head_dim > 4096 || a.head_dim % 8 != 0 || a.block_size < 8 || a.block_size > 65536 || a.block_size % 8 != 0)
    return LLMC_PA_BAD_SHAPE;
  if (a.window < 0 || !(a.softcap >= 0.0f) || !std::isfinite(a.softcap) || !std::isfinite(a.scale)) return LLMC_PA_BAD_NUMBER;
  const bool tokens = a.num_tokens > 0, seqs = a.num_seqs > 0;
  const bool writes = a.k || a.v || a.slot_mapping;  // without all three, K and V are in the caches already
  if (tokens && (!a.q || !a.out || (writes && (!a.k || !a.v || !a.slot_mapping)))) return LLMC_PA_BAD_POINTER;
  if (tokens && a.num_blocks > 0 && (!a.k_cache || !a.v_cache)) return LLMC_PA_BAD_POINTER;
  if (!a.query_start_loc || (seqs && !a.seq_lens) || (seqs && a.max_blocks > 0 && !a.block_tables)) return LLMC_PA_BAD_POINTER;
  if (a.query_start_loc[0] != 0) return LLMC_PA_BAD_QUERY_START;
  for (int64_t t = 0; writes && t < a.num_tokens; ++t)
    if (a.slot_mapping[t] >= a.num_blocks * a.block_size) return LLMC_PA_BAD_SLOT;
  for (int64_t b = 0; b < a.num_seqs; ++b) {
    const int64_t end = a.query_start_loc[b + 1], length = a.seq_lens[b];
    if (end < a.query_start_loc[b] || end > a.num_tokens) return LLMC_PA_BAD_QUERY_START;
    if (length < 0) return LLMC_PA_BAD_SEQ_LEN;
    if (query_rows(a, b) == 0 || length == 0) continue;
    if (length > a.max_blocks * a.block_size) return LLMC_PA_BAD_SEQ_LEN;
    const int32_t* table = a.block_tables + b * a.block_table_stride;
    for (int64_t i = first_visible(a, b) / a.block_size; i < (length + a.block_size - 1) / a.block_size; ++i)
      if (table[i] < 0 || table[i] >= a.num_blocks) return LLMC_PA_BAD_BLOCK;
  }
  return LLMC_PA_OK;
}

}  // namespace llmc_pa
