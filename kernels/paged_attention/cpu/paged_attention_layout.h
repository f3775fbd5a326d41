// The private order inside a cache tile, and the loads and stores that know it.
//
// K tile: sub-tiles of `lanes` tokens (lanes = W, or 8 where the block size is no multiple of 16), so that one vector lane is
//   one token and q.k needs no sum across lanes. Sub-tile, fp32 and fp16: [D][lanes]; bf16: [D / 2][lanes][2], since one load
//   then gives two dimensions, each a shift or a mask away from fp32.
// V tile: [block_size][D], plain. V is read in groups of 2 * W dimensions as two vectors: the low and high half, or for bf16
//   the even and the odd dimensions, again a mask and a shift. Sums keep that order; only the last store knows it.
#pragma once
#include "paged_attention_simd.h"

namespace llmc_pa {

constexpr int kGroup = 2 * W;  // dimensions of a V group

#if LLMC_PA_AVX512
using LaneMask = __mmask16;
static inline LaneMask lane_mask(int lanes) { return static_cast<LaneMask>((1u << lanes) - 1u); }
#else
struct LaneMask {};  // 8 lanes are the whole vector
static inline LaneMask lane_mask(int) { return {}; }
#endif

// ---- K: two dimensions d and d + 1 (d even) of `lanes` tokens; `p` points at the sub-tile's dimension d --------------------
#if LLMC_PA_AVX512
static inline void load_k(const Bf16* p, int, LaneMask m, Vec* a, Vec* b) {
  const __m512i x = _mm512_maskz_loadu_epi32(m, p);
  *a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  *b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
static inline void load_k(const Fp16* p, int lanes, LaneMask m, Vec* a, Vec* b) {
  *a = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
  *b = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p + lanes));
}
static inline void load_k(const float* p, int lanes, LaneMask m, Vec* a, Vec* b) {
  *a = _mm512_maskz_loadu_ps(m, p);
  *b = _mm512_maskz_loadu_ps(m, p + lanes);
}
#else
static inline void load_k(const Bf16* p, int, LaneMask, Vec* a, Vec* b) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  *b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
static inline void load_k(const Fp16* p, int, LaneMask, Vec* a, Vec* b) {
  *a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  *b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
static inline void load_k(const float* p, int, LaneMask, Vec* a, Vec* b) {
  *a = _mm256_loadu_ps(p);
  *b = _mm256_loadu_ps(p + 8);
}
#endif

// Write one token's K into its place: `tile` is the [block_size, D] tile, `offset` the token's row in the block.
template <class T>
static inline void write_k(T* tile, int offset, const T* k, int D, int lanes) {
  T* p = tile + static_cast<int64_t>(offset & ~(lanes - 1)) * D + (offset & (lanes - 1));
  for (int d = 0; d < D; ++d, p += lanes) *p = k[d];
}
static inline void write_k(Bf16* tile, int offset, const Bf16* k, int D, int lanes) {
  Bf16* p = tile + static_cast<int64_t>(offset & ~(lanes - 1)) * D + 2 * (offset & (lanes - 1));
  for (int d = 0; d < D; d += 2, p += 2 * lanes) memcpy(p, k + d, 4);
}

// ---- V: the kGroup dimensions at `p` as two vectors; a tail group has `n` < kGroup of them, the rest read as zero ------------
template <bool TAIL>
static inline void load_v(const Bf16* p, int n, Vec x[2]) {
#if LLMC_PA_AVX512
  const __m512i w = TAIL ? _mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1u), p) : _mm512_loadu_si512(p);
  x[0] = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
  x[1] = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
#else
  (void)n;  // 8 is the only tail of 16
  const __m256i w = TAIL ? _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
                         : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  x[0] = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  x[1] = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
#endif
}
template <bool TAIL>
static inline void load_v(const Fp16* p, int n, Vec x[2]) {
#if LLMC_PA_AVX512
  const unsigned m = TAIL ? (1u << n) - 1u : ~0u;
  x[0] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)m, p));
  x[1] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)(m >> 16), p + 16));
#else
  (void)n;
  x[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  x[1] = TAIL ? v_zero() : _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
#endif
}
template <bool TAIL>
static inline void load_v(const float* p, int n, Vec x[2]) {
#if LLMC_PA_AVX512
  const unsigned m = TAIL ? (1u << n) - 1u : ~0u;
  x[0] = _mm512_maskz_loadu_ps((__mmask16)m, p);
  x[1] = _mm512_maskz_loadu_ps((__mmask16)(m >> 16), p + 16);
#else
  (void)n;
  x[0] = v_load(p);
  x[1] = TAIL ? v_zero() : v_load(p + 8);
#endif
}

// Round the sums of one group (order of load_v) to T, nearest even, and store all kGroup dimensions in their own order.
static inline void store_whole_group(float* out, const float* sums) { memcpy(out, sums, kGroup * sizeof(float)); }
static inline void store_whole_group(Fp16* out, const float* sums) {
  for (int i = 0; i < kGroup; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(sums + i), _MM_FROUND_TO_NEAREST_INT));
}
#if LLMC_PA_AVX512
static inline __m512i bf16_in_high_half(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  // A NaN stays one: rounding could carry into infinity.
  return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
}
static inline void store_whole_group(Bf16* out, const float* sums) {
  const __m512i even = _mm512_srli_epi32(bf16_in_high_half(v_load(sums)), 16), odd = bf16_in_high_half(v_load(sums + W));
  _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xaaaaaaaau, even, odd));
}
#else
static inline __m256i bf16_in_high_half(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // a NaN stays one: rounding could carry into infinity
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
static inline void store_whole_group(Bf16* out, const float* sums) {
  for (int i = 0; i < W; i += 8) {
    const __m256i even = _mm256_srli_epi32(bf16_in_high_half(_mm256_loadu_ps(sums + i)), 16);
    const __m256i odd = _mm256_and_si256(bf16_in_high_half(_mm256_loadu_ps(sums + W + i)), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * i), _mm256_or_si256(even, odd));
  }
}
#endif
// A group of sums in plain order into that of bf16: even dimensions, then odd ones.
static inline void into_bf16_order(float* sums) {
  float plain[kGroup];
  memcpy(plain, sums, sizeof(plain));
  for (int i = 0; i < W; ++i) {
    sums[i] = plain[2 * i];
    sums[W + i] = plain[2 * i + 1];
  }
}
template <class T>
static inline void store_group(T* out, const float* sums, int n) {
  if (n >= kGroup) return store_whole_group(out, sums);
  T whole[kGroup];
  store_whole_group(whole, sums);
  memcpy(out, whole, static_cast<size_t>(n) * sizeof(T));
}

}  // namespace llmc_pa
