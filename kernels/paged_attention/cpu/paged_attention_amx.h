// bf16 on AMX tiles, for many query rows: 16 rows by 16 keys (or dimensions) by 32 dimensions (or keys) per instruction.
//
// A K sub-tile of 16 tokens is in the order of a tile already. V is put into that order per item and segment: a pair of keys side by
// side, even dimensions in one tile and odd ones in the next, which is the order of load_v. A key that a row may not see has the weight
// zero there, which hides it unless V holds a NaN or an infinity: then vector registers take the segment, which pass such keys over.
#pragma once
#include "paged_attention_pairs.h"

#if LLMC_AMX

namespace llmc_pa {

constexpr int kTileElements = 16 * 32;
constexpr int kBlockRows = 2 * kTileRows;                 // query rows whose scores are held at once
constexpr int kWeightStride = kSegment + 32;              // of a block's weights, elements

static inline bool tiles_fit(const Numbers& n) { return n.D % 32 == 0 && n.lanes == 16 && llmc::amx_permission(); }

// Two keys' 32 dimensions as pairs: the even ones, then (at the next tile) the odd ones.
static inline void pair_keys(__m512i first, __m512i second, Bf16* out) {
  const __mmask32 high = 0xaaaaaaaau;
  _mm512_store_si512(out, _mm512_mask_blend_epi16(high, first, _mm512_slli_epi32(second, 16)));
  _mm512_store_si512(out + kTileElements, _mm512_mask_blend_epi16(high, _mm512_srli_epi32(first, 16), second));
}

// V of keys [lo, hi) of a segment into the order of tiles, the rest of the groups they lie in as zeros. Returns whether all is finite.
static inline bool pair_values(const Numbers& n, const SegmentPointers& at, int lo, int hi, Bf16* out) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i top = _mm512_setzero_si512();
  const auto load = [&](int key, int d) {
    return key < lo || key >= hi ? _mm512_setzero_si512() : _mm512_loadu_si512(at.v[key >> 4] + static_cast<int64_t>(key & 15) * n.D + d);
  };
  for (int t = lo & ~(kPairGroup - 1); t < hi; t += kPairGroup)
    for (int pair = 0; pair < 16; ++pair) {
      Bf16* to = out + static_cast<int64_t>(t) * n.D + pair * 32;
      for (int d = 0; d < n.D; d += 32, to += 2 * kTileElements) {
        const __m512i first = load(t + 2 * pair, d), second = load(t + 2 * pair + 1, d);
        top = _mm512_max_epu16(top, _mm512_max_epu16(_mm512_and_si512(first, magnitude), _mm512_and_si512(second, magnitude)));
        pair_keys(first, second, to);
      }
    }
  return _mm512_cmpge_epu16_mask(top, _mm512_set1_epi16(0x7f80)) == 0;
}

// Scores of T tiles of rows against the 32 keys of two K sub-tiles.
template <int T>
static inline void score_tiles_amx(const Bf16* q, int D, const Bf16* k0, const Bf16* k1, float* scores) {
  const int64_t q_bytes = D * sizeof(Bf16), score_bytes = kSegmentStride * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (T > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int d = 0; d < D; d += 32) {
    _tile_loadd(4, q + d, q_bytes);
    _tile_loadd(6, k0 + d * 16, 64);
    _tile_loadd(7, k1 + d * 16, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (T > 1) {
      _tile_loadd(5, q + static_cast<int64_t>(kTileRows) * D + d, q_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, scores, score_bytes);
  _tile_stored(1, scores + 16, score_bytes);
  if constexpr (T > 1) {
    _tile_stored(2, scores + kTileRows * kSegmentStride, score_bytes);
    _tile_stored(3, scores + kTileRows * kSegmentStride + 16, score_bytes);
  }
}

// Sums of T tiles of rows for dimensions [d, d + 32): the weights of keys [from, to) by V in the order of tiles.
template <int T>
static inline void value_tiles_amx(const Numbers& n, const Bf16* weights, const Bf16* v, int from, int to, int d, float* sums) {
  const int64_t weight_bytes = kWeightStride * sizeof(Bf16), sum_bytes = n.padded * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (T > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int t = from; t < to; t += kPairGroup) {
    const Bf16* tile = v + static_cast<int64_t>(t) * n.D + d * 32;
    _tile_loadd(4, weights + t, weight_bytes);
    _tile_loadd(6, tile, 64);
    _tile_loadd(7, tile + kTileElements, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (T > 1) {
      _tile_loadd(5, weights + kTileRows * kWeightStride + t, weight_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, sum_bytes);
  _tile_stored(1, sums + 16, sum_bytes);
  if constexpr (T > 1) {
    _tile_stored(2, sums + static_cast<int64_t>(kTileRows) * n.padded, sum_bytes);
    _tile_stored(3, sums + static_cast<int64_t>(kTileRows) * n.padded + 16, sum_bytes);
  }
}

// Up to T tiles of rows over a segment whose V is in `v`.
template <int T>
static void attend_block(const Numbers& n, const SegmentPointers& at, const Bf16* q, const Bf16* v, int rows, const int* lo, const int* hi,
                         RowState state) {
  alignas(64) float scores[T * kTileRows * kSegmentStride];
  alignas(64) Bf16 weights[T * kTileRows * kWeightStride];
  const auto [low, high] = span_of(rows, lo, hi, kSegment);
  if (low >= high) {
    memset(state.sums, 0, static_cast<size_t>(rows) * n.padded * sizeof(float));
    return;
  }
  const int from = low & ~(kPairGroup - 1), to = (high + kPairGroup - 1) & ~(kPairGroup - 1);
  for (int t = from; t < to; t += kPairGroup) {
    // A sub-tile without a visible key may lie nowhere; another in its place gives scores that no row reads.
    const auto k = [&](int key) { return at.k[std::clamp(key, low, high - 1) / 16]; };
    score_tiles_amx<T>(q, n.D, k(t), k(t + 16), scores + t);
  }
  asm volatile("" ::: "memory");  // tile loads and stores do not declare what they touch
  for (int r = 0; r < T * kTileRows; ++r) {
    Bf16* row = weights + r * kWeightStride;
    const bool sees = r < rows && lo[r] < hi[r];
    const int first = sees ? lo[r] & ~(W - 1) : to, last = sees ? (hi[r] + W - 1) & ~(W - 1) : to;
    const auto put = [row](int i, __m256i w) { _mm256_store_si256(reinterpret_cast<__m256i*>(row + i), w); };
    for (int i = from; i < first; i += W) put(i, _mm256_setzero_si256());
    for (int i = last; i < to; i += W) put(i, _mm256_setzero_si256());
    if (sees)
      weigh_row(n, scores + r * kSegmentStride, lo[r], hi[r], state.max + r, state.denominator + r,
                [put](int i, Vec e) { put(i, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(e))); });
  }
  asm volatile("" ::: "memory");
  for (int d = 0; d < n.D; d += 32) value_tiles_amx<T>(n, weights, v, from, to, d, state.sums + d);
  asm volatile("" ::: "memory");
}

// As attend_vectors; false: V is not finite and nothing was done. Rows are rounded up to tiles: `state` has room, q holds zeros there.
// q: [rows, D]. v: room for a segment's V as [kSegment / 32][D / 16][16][16][2].
static inline bool attend_tiles(const Numbers& n, const SegmentPointers& at, const Bf16* q, Bf16* v, int rows, const int* lo, const int* hi,
                                RowState state) {
  const auto [low, high] = span_of(rows, lo, hi, kSegment);
  if (!pair_values(n, at, low, high, v)) return false;
  llmc::configure_tiles({16, 16, 16, 16, 16, 16, 16, 16});
  asm volatile("" ::: "memory");
  for (int r = 0; r < rows; r += kBlockRows) {
    const RowState part{state.max + r, state.denominator + r, state.sums + static_cast<int64_t>(r) * n.padded};
    const Bf16* block = q + static_cast<int64_t>(r) * n.D;
    const int count = std::min(kBlockRows, rows - r);
    if (count > kTileRows) attend_block<2>(n, at, block, v, count, lo + r, hi + r, part);
    else attend_block<1>(n, at, block, v, count, lo + r, hi + r, part);
  }
  _tile_release();
  return true;
}

}  // namespace llmc_pa

#endif
