// Sixteen fp32 lanes, one per column of a panel, and the three element types in terms of them.
// AVX-512 holds them in one register, AVX2 in two; nothing above this file knows which.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "llmc_types.h"

namespace llmc {

#ifdef __AVX512F__
struct Lanes {
  __m512 v;
};
static inline Lanes lanes_zero() { return {_mm512_setzero_ps()}; }
static inline Lanes lanes_load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void lanes_store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
static inline Lanes lanes_add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Lanes lanes_fma(Lanes w, float x, Lanes acc) { return {_mm512_fmadd_ps(w.v, _mm512_set1_ps(x), acc.v)}; }
static inline Lanes lanes_scaled(Lanes scale, Lanes a, Lanes acc) { return {_mm512_fmadd_ps(scale.v, a.v, acc.v)}; }
#else
struct Lanes {
  __m256 lo, hi;
};
static inline Lanes lanes_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Lanes lanes_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void lanes_store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
static inline Lanes lanes_add(Lanes a, Lanes b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
static inline Lanes lanes_fma(Lanes w, float x, Lanes acc) {
  __m256 b = _mm256_set1_ps(x);
  return {_mm256_fmadd_ps(w.lo, b, acc.lo), _mm256_fmadd_ps(w.hi, b, acc.hi)};
}
static inline Lanes lanes_scaled(Lanes scale, Lanes a, Lanes acc) {
  return {_mm256_fmadd_ps(scale.lo, a.lo, acc.lo), _mm256_fmadd_ps(scale.hi, a.hi, acc.hi)};
}
#endif

struct F32 {
  using Element = float;
  static constexpr bool kPaired = false;  // packed as [k][16]
  static float widen(float a) { return a; }
  static Lanes load16(const float* p) { return lanes_load(p); }
  static void store16(float* p, Lanes a) { lanes_store(p, a); }
  // Weights of depth 2j and 2j + 1.
  static void load_pair(const float* p, Lanes& even, Lanes& odd) {
    even = lanes_load(p);
    odd = lanes_load(p + 16);
  }
};

struct F16 {
  using Element = uint16_t;
  static constexpr bool kPaired = true;  // packed as [k / 2][16][2]
  static float widen(uint16_t a) { return _cvtsh_ss(a); }
#ifdef __AVX512F__
  static Lanes load16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static void store16(uint16_t* p, Lanes a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)); }
  static void load_pair(const uint16_t* p, Lanes& even, Lanes& odd) {
    __m512i v = _mm512_loadu_si512(p);
    even.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
    odd.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)));
  }
#else
  static Lanes load16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
  }
  static void store16(uint16_t* p, Lanes a) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
  }
  static void split8(const uint16_t* p, __m256& even, __m256& odd) {
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                           0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    __m256i v = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)p), order);
    v = _mm256_permute4x64_epi64(v, 0xD8);  // evens in the low half, odds in the high half
    even = _mm256_cvtph_ps(_mm256_castsi256_si128(v));
    odd = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
  }
  static void load_pair(const uint16_t* p, Lanes& even, Lanes& odd) {
    split8(p, even.lo, odd.lo);
    split8(p + 16, even.hi, odd.hi);
  }
#endif
};

struct BF16 {
  using Element = uint16_t;
  static constexpr bool kPaired = true;
  static float widen(uint16_t a) {
    uint32_t bits = (uint32_t)a << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
#ifdef __AVX512F__
  static Lanes load16(const uint16_t* p) {
    __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))};
  }
  static void load_pair(const uint16_t* p, Lanes& even, Lanes& odd) {
    __m512i v = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));
  }
#ifdef __AVX512BF16__
  static void store16(uint16_t* p, Lanes a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
#else
  static void store16(uint16_t* p, Lanes a) {
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lsb);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
#endif
#else
  static Lanes load16(const uint16_t* p) {
    __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  }
  static __m256i round8(__m256 a) {
    __m256i bits = _mm256_castps_si256(a);
    __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    return _mm256_srli_epi32(rounded, 16);
  }
  static void store16(uint16_t* p, Lanes a) {
    __m256i both = _mm256_packus_epi32(round8(a.lo), round8(a.hi));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xD8));
  }
  static void load_pair(const uint16_t* p, Lanes& even, Lanes& odd) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 16));
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))};
  }
#endif
};

// Columns [0, columns) of sixteen; the rest reads as zero.
template <class D>
static inline Lanes load_columns(const typename D::Element* p, int64_t columns) {
  if (columns >= 16) return D::load16(p);
  typename D::Element full[16] = {};
  memcpy(full, p, columns * sizeof(full[0]));
  return D::load16(full);
}

// Rounds once and writes columns [0, columns).
template <class D>
static inline void store_columns(typename D::Element* p, Lanes a, int64_t columns) {
  if (columns >= 16) return D::store16(p, a);
  typename D::Element full[16];
  D::store16(full, a);
  memcpy(p, full, columns * sizeof(full[0]));
}

}  // namespace llmc
