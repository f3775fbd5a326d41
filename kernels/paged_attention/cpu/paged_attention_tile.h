// Attention of up to kMaxRows query rows over one chunk of keys, and what joins chunks and segments. For bf16 on processors with AMX
// paged_attention_pairs.h stands in place of the chunks.
//
// Keys are cut at absolute positions: chunks of kChunk inside segments of kSegment. Online softmax runs chunk by chunk within
// a segment; segments are joined in order. A row's sums over its visible keys run in key order, one lane or one element each,
// with the same operations for every number of rows R: a row's bits depend on its own keys alone. Keys that a row may not see
// never enter its sums, not even times zero, since a NaN there would come through.
#pragma once
#include <type_traits>

#include "paged_attention_layout.h"

namespace llmc_pa {

constexpr int kChunk = 64;
constexpr int kSegment = 256;
constexpr int kScoreStride = kChunk + W;  // a sub-tile of 8 tokens stores W scores; the last may run past the chunk

// What all rows of one call share.
struct Numbers {
  int D;         // head_dim
  int padded;    // D rounded up to kGroup: stride of q and of sums in scratch
  int lanes;     // tokens of a K sub-tile
  int lanes_log2;
  float scale;
  float softcap;
};

// Where a chunk's K sub-tiles and the V rows beside them lie; entry i starts at key i * lanes of the chunk. A sub-tile is
// lanes * D elements in a row, of K as of V. `next_k` are the sub-tiles of the chunk after, only ever prefetched: blocks lie
// anywhere, so the hardware's own prefetcher starts anew at each.
template <class T>
struct ChunkPointers {
  const T* k[kChunk / 8];
  const T* v[kChunk / 8];
  const T* next_k[kChunk / 8];
};

template <int BYTES>
static inline void prefetch(const void* p) {
  for (int i = 0; i < BYTES; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T0);
}

// Running softmax of rows: maximum, denominator, and numerators as `sums` [rows, padded] in load_v's order.
struct RowState {
  float* max;
  float* denominator;
  float* sums;
};

// The keys that any of some rows sees; lo >= hi: none.
struct Span {
  int lo, hi;
};
static inline Span span_of(int rows, const int* lo, const int* hi, int most) {
  Span all{most, 0};
  for (int r = 0; r < rows; ++r) {
    if (lo[r] >= hi[r]) continue;
    all.lo = lo[r] < all.lo ? lo[r] : all.lo;
    all.hi = hi[r] > all.hi ? hi[r] : all.hi;
  }
  return all;
}

// scores[r][i * lanes + t] = scale * q[r].k[token t of sub-tile i], i < NT
template <class T, int R, int NT>
static inline void score_tiles(const Numbers& n, const T* const* k, const T* const* v, const float* q, float* scores) {
  const LaneMask mask = lane_mask(n.lanes);
  const int64_t step = 2 * n.lanes, row = n.padded;
  const T* at[NT];
  const T* ahead[NT];  // V of the same keys is wanted next
  Vec sum[NT][R];
  for (int i = 0; i < NT; ++i) {
    at[i] = k[i];
    ahead[i] = v[i];
    for (int r = 0; r < R; ++r) sum[i][r] = v_zero();
  }
  for (const float* end = q + n.D; q != end; q += 2) {
    Vec a[NT], b[NT];
    for (int i = 0; i < NT; ++i) {
      load_k(at[i], n.lanes, mask, &a[i], &b[i]);
      prefetch<2 * W * sizeof(T)>(ahead[i]);
      at[i] += step;
      ahead[i] += step;
    }
    for (int r = 0; r < R; ++r) {
      const Vec q0 = v_set(q[r * row]), q1 = v_set(q[r * row + 1]);
      for (int i = 0; i < NT; ++i) sum[i][r] = v_fma(b[i], q1, v_fma(a[i], q0, sum[i][r]));
    }
  }
  const Vec scale = v_set(n.scale);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NT; ++i) v_store(scores + r * kScoreStride + i * n.lanes, v_mul(sum[i][r], scale));
}

template <class T, int R>
static inline void score_chunk(const Numbers& n, const ChunkPointers<T>& at, const float* q, int lo, int hi, float* scores) {
  constexpr int NT = R * 4 <= 2 * kMaxRows ? 4 : 2;  // enough independent sums to hide the latency of fma
  int i = lo >> n.lanes_log2;
  const int end = (hi + n.lanes - 1) >> n.lanes_log2;
  for (; i + NT <= end; i += NT) score_tiles<T, R, NT>(n, at.k + i, at.v + i, q, scores + i * n.lanes);
  for (; i < end; ++i) score_tiles<T, R, 1>(n, at.k + i, at.v + i, q, scores + i * n.lanes);
}

// Turn one row's scores in [lo, hi) into exp(score - maximum) and bring the row's state to the new maximum.
static inline void softmax_row(const Numbers& n, float* scores, int lo, int hi, float* max, float* denominator, float* sums) {
  const int first = lo & ~(W - 1);
  const bool whole = ((lo | hi) & (W - 1)) == 0;
  Vec high = v_set(-kInf);
  for (int i = first; i < hi; i += W) {
    Vec s = v_load(scores + i);
    if (n.softcap > 0.0f) s = v_softcap(s, v_set(n.softcap));
    if (!whole) s = v_keep_range(s, i, lo, hi);
    if (n.softcap > 0.0f || !whole) v_store(scores + i, s);
    high = v_max(high, s);
  }
  const float top = v_reduce_max(high);
  const float next = top > *max ? top : *max;
  const Vec shift = v_set(next == -kInf ? 0.0f : next);
  Vec total = v_zero();
  for (int i = first; i < hi; i += W) {
    const Vec e = v_exp(v_sub(v_load(scores + i), shift));
    v_store(scores + i, e);
    total = v_add(total, e);
  }
  const float chunk = v_reduce_add(total);
  if (next > *max) {
    const Vec keep = v_exp(v_set(*max - next));
    *denominator = __builtin_fmaf(*denominator, v_first(keep), chunk);
    for (int d = 0; d < n.padded; d += W) v_store(sums + d, v_mul(v_load(sums + d), keep));
    *max = next;
  } else {
    *denominator += chunk;
  }
}

// sums[r][d0 ...] += p[r][t] * v[t][d0 ...] for t in [lo, hi), NP groups of dimensions at once
template <class T, int R, int NP, bool TAIL>
static inline void value_groups(const Numbers& n, const ChunkPointers<T>& at, int d0, int lo, int hi, const float* p, float* sums) {
  Vec acc[NP][2][R];
  for (int g = 0; g < NP; ++g)
    for (int h = 0; h < 2; ++h)
      for (int r = 0; r < R; ++r) acc[g][h][r] = v_load(sums + static_cast<int64_t>(r) * n.padded + d0 + g * kGroup + h * W);
  for (int t = lo; t < hi;) {
    const int tile = t >> n.lanes_log2, inside = t & (n.lanes - 1);
    const int end = hi < (tile + 1) << n.lanes_log2 ? hi : (tile + 1) << n.lanes_log2;
    const T* row = at.v[tile] + static_cast<int64_t>(inside) * n.D + d0;
    const T* ahead = at.next_k[tile] + static_cast<int64_t>(inside) * n.D + d0;
    for (; t < end; ++t, row += n.D, ahead += n.D) {
      prefetch<NP * kGroup * sizeof(T)>(ahead);
      Vec x[NP][2];
      for (int g = 0; g < NP; ++g) load_v<TAIL>(row + g * kGroup, n.D - d0, x[g]);
      for (int r = 0; r < R; ++r) {
        const Vec weight = v_set(p[r * kScoreStride + t]);
        for (int g = 0; g < NP; ++g)
          for (int h = 0; h < 2; ++h) acc[g][h][r] = v_fma(weight, x[g][h], acc[g][h][r]);
      }
    }
  }
  for (int g = 0; g < NP; ++g)
    for (int h = 0; h < 2; ++h)
      for (int r = 0; r < R; ++r) v_store(sums + static_cast<int64_t>(r) * n.padded + d0 + g * kGroup + h * W, acc[g][h][r]);
}

// From dimension d on, NP groups at once while that many are left, then half as many.
template <class T, int R, int NP>
static inline void value_ladder(const Numbers& n, const ChunkPointers<T>& at, int d, int lo, int hi, const float* p, float* sums) {
  for (; d + NP * kGroup <= n.D; d += NP * kGroup) value_groups<T, R, NP, false>(n, at, d, lo, hi, p, sums);
  if constexpr (NP > 1) {
    if (d < n.D) value_ladder<T, R, NP / 2>(n, at, d, lo, hi, p, sums);
  } else {
    if (d < n.D) value_groups<T, R, 1, true>(n, at, d, lo, hi, p, sums);
  }
}

template <class T, int R>
static inline void value_chunk(const Numbers& n, const ChunkPointers<T>& at, int lo, int hi, const float* p, float* sums) {
  constexpr int NP = R * 8 <= 2 * kMaxRows ? 4 : R * 4 <= 2 * kMaxRows ? 2 : 1;  // sums of 2 * NP * R vectors stay in registers
  if (lo < hi) value_ladder<T, R, NP>(n, at, 0, lo, hi, p, sums);
}

// One chunk for R rows; row r sees keys [lo[r], hi[r]) of it (empty: the row is left as it is).
template <class T, int R>
static void attend_tile(const Numbers& n, const ChunkPointers<T>& at, const float* q, const int* lo, const int* hi, RowState state) {
  alignas(64) float scores[R * kScoreStride];
  const auto [low, high] = span_of(R, lo, hi, kChunk);
  int common_lo = 0, common_hi = kChunk;
  for (int r = 0; r < R; ++r) {
    common_lo = lo[r] > common_lo ? lo[r] : common_lo;
    common_hi = hi[r] < common_hi ? hi[r] : common_hi;
  }
  if (low >= high) return;
  score_chunk<T, R>(n, at, q, low, high, scores);
  for (int r = 0; r < R; ++r)
    if (lo[r] < hi[r])
      softmax_row(n, scores + r * kScoreStride, lo[r], hi[r], state.max + r, state.denominator + r, state.sums + static_cast<int64_t>(r) * n.padded);
  const bool shared = common_lo < common_hi;
  if (shared) {
    // Each row's own ends stand alone, so that its sum still runs in key order and over its own keys only.
    for (int r = 0; r < R; ++r)
      value_chunk<T, 1>(n, at, lo[r], common_lo, scores + r * kScoreStride, state.sums + static_cast<int64_t>(r) * n.padded);
    value_chunk<T, R>(n, at, common_lo, common_hi, scores, state.sums);
  }
  for (int r = 0; r < R; ++r)
    value_chunk<T, 1>(n, at, shared ? common_hi : lo[r], hi[r], scores + r * kScoreStride, state.sums + static_cast<int64_t>(r) * n.padded);
}

// Join a segment into the total of the segments before it.
static inline void merge_segment(const Numbers& n, float part_max, float part_denominator, const float* part_sums, float* max, float* denominator,
                                 float* sums) {
  const float next = part_max > *max ? part_max : *max;
  const float shift = next == -kInf ? 0.0f : next;
  const float old_factor = exp_scalar(*max - shift), new_factor = exp_scalar(part_max - shift);
  *denominator = __builtin_fmaf(*denominator, old_factor, part_denominator * new_factor);
  *max = next;
  const Vec a = v_set(old_factor), b = v_set(new_factor);
  for (int d = 0; d < n.padded; d += W) v_store(sums + d, v_fma(v_load(sums + d), a, v_mul(v_load(part_sums + d), b)));
}

// Divide, add the sink (an extra logit that takes weight and gives nothing), round, store. No visible key: zeros.
// Read: the type that V was read as, whose order the sums are in.
template <class T, class Read>
static inline void finish_row(const Numbers& n, const float* sink, float max, float denominator, float* sums, T* out) {
  float factor = 1.0f;
  if (sink != nullptr) {
    const float next = *sink > max ? *sink : max;
    factor = exp_scalar(max - next);
    denominator = __builtin_fmaf(denominator, factor, exp_scalar(*sink - next));
  }
  factor = denominator == 0.0f ? 0.0f : factor / denominator;
  const Vec times = v_set(factor);
  for (int d = 0; d < n.padded; d += W) v_store(sums + d, v_mul(v_load(sums + d), times));
  for (int d = 0; d < n.D; d += kGroup) {
    if constexpr (std::is_same_v<T, Bf16> && std::is_same_v<Read, float>) into_bf16_order(sums + d);
    store_group(out + d, sums + d, n.D - d);
  }
}

}  // namespace llmc_pa
