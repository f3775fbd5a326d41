// Quantised panels back to the panels that the engines read: value = (weight * scale), rounded once to the element type.
//
// A weight is an integer of 8 or 4 bits, in the order of the 16-bit packed layout: [panel][pair of depths][16 columns][2], and 4-bit
// weights two to a byte, the even depth in the low half, 8 added. A scale is [panel][group][16 columns], in the element type.
// Integers and scales are exact in fp32 and so is their product of at most 8 + 24 bits rounded once; hence one rounding in bf16 and fp16.
#pragma once

#include "lanes.h"

namespace llmc {

#ifdef __AVX512F__
static inline Lanes lanes_mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Lanes lanes_from_int8(__m128i a) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a))}; }
// Columns 0..7 and 8..15 of sixteen, each twice: what a run of pairs is multiplied with.
static inline void lanes_twice(Lanes a, Lanes& low, Lanes& high) {
  const __m512i order = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  low.v = _mm512_permutexvar_ps(order, a.v);
  high.v = _mm512_permutexvar_ps(_mm512_add_epi32(order, _mm512_set1_epi32(8)), a.v);
}
#else
static inline Lanes lanes_mul(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
static inline Lanes lanes_from_int8(__m128i a) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)))};
}
static inline void lanes_twice(Lanes a, Lanes& low, Lanes& high) {
  const __m256i first = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), second = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
  low = {_mm256_permutevar8x32_ps(a.lo, first), _mm256_permutevar8x32_ps(a.lo, second)};
  high = {_mm256_permutevar8x32_ps(a.hi, first), _mm256_permutevar8x32_ps(a.hi, second)};
}
#endif

// Sixteen columns by two depths: 32 weights as signed bytes, in memory order, halves of eight columns.
template <int Bits>
struct Quants;

template <>
struct Quants<8> {
  static constexpr int64_t kPairBytes = 32;
  static void load(const uint8_t* p, __m128i& low, __m128i& high) {
    low = _mm_loadu_si128((const __m128i*)p);
    high = _mm_loadu_si128((const __m128i*)(p + 16));
  }
};

template <>
struct Quants<4> {
  static constexpr int64_t kPairBytes = 16;
  static void load(const uint8_t* p, __m128i& low, __m128i& high) {
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8), both = _mm_loadu_si128((const __m128i*)p);
    const __m128i even = _mm_sub_epi8(_mm_and_si128(both, mask), eight);
    const __m128i odd = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(both, 4), mask), eight);
    low = _mm_unpacklo_epi8(even, odd);
    high = _mm_unpackhi_epi8(even, odd);
  }
};

// Sixteen products of the low half and of the high half, as 32 elements.
template <class D>
static inline void store_products(typename D::Element* out, Lanes low, Lanes high) {
  D::store16(out, low);
  D::store16(out + 16, high);
}
#ifdef __AVX512BF16__
template <>
inline void store_products<BF16>(uint16_t* out, Lanes low, Lanes high) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
}
#endif

// Makes 32 elements, sixteen columns by two depths, out of their integers and the columns' scales.
template <class D, int Bits>
struct PairMaker {
  Lanes low_scale, high_scale;
  explicit PairMaker(Lanes scales) { lanes_twice(scales, low_scale, high_scale); }
  void make(const uint8_t* at, typename D::Element* out) const {
    __m128i low, high;
    Quants<Bits>::load(at, low, high);
    store_products<D>(out, lanes_mul(lanes_from_int8(low), low_scale), lanes_mul(lanes_from_int8(high), high_scale));
  }
};

#ifdef __AVX512BF16__
// Four bits in fewer steps: a nibble u = q + 8 in the top of a float's fraction makes 16 + u, and (16 + u) * scale - 24 * scale is the
// exact product q * scale, since 24 * scale is exact too.
template <>
struct PairMaker<BF16, 4> {
  __m512 scale, offset;
  explicit PairMaker(Lanes scales) : scale(scales.v), offset(_mm512_mul_ps(scales.v, _mm512_set1_ps(-24))) {}
  __m512 product(__m512i nibble_in_fraction) const {
    constexpr int kAndThenOr = 0xea;
    const __m512i fraction = _mm512_set1_epi32(0x00780000), sixteen = _mm512_set1_epi32(0x41800000);
    const __m512i value = _mm512_ternarylogic_epi32(nibble_in_fraction, fraction, sixteen, kAndThenOr);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(value), scale, offset);
  }
  void make(const uint8_t* at, uint16_t* out) const {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
    const __m512 even = product(_mm512_slli_epi32(both, 19)), odd = product(_mm512_slli_epi32(both, 15));
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
  }
};

// One AMX tile: 16 columns by 32 depths, all of one group.
template <int Bits>
static inline void dequantize_tile(const uint8_t* tile, Lanes scales, uint16_t* out) {
  const PairMaker<BF16, Bits> maker(scales);
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++) maker.make(tile + j * Quants<Bits>::kPairBytes, out + j * 32);
}
#endif

// One panel of k depths into the engines' layout for D. group: a multiple of 32.
template <class D, int Bits>
void dequantize_panel(const uint8_t* panel, const typename D::Element* scales, int64_t k, int64_t group, typename D::Element* out) {
  if constexpr (D::kPaired) {
    const int64_t pairs = (k + 31) / 32 * 16;
    for (int64_t begin = 0, g = 0; begin < pairs; begin += group / 2, g++) {
      const int64_t end = begin + group / 2 < pairs ? begin + group / 2 : pairs;
      const PairMaker<D, Bits> maker(D::load16(scales + g * 16));
      for (int64_t j = begin; j < end; j++) {
        const uint8_t* at = panel + j * Quants<Bits>::kPairBytes;
        _mm_prefetch((const char*)at + 2048, _MM_HINT_T0);
        maker.make(at, out + j * 32);
      }
    }
  } else {
    // fp32 panels are [depth][16]: the two depths of a pair go to two rows, and a last, padded depth is left out.
    for (int64_t d = 0; d < k; d += 2) {
      __m128i low, high;
      Quants<Bits>::load(panel + d / 2 * Quants<Bits>::kPairBytes, low, high);
      const Lanes scale = D::load16(scales + d / group * 16);
      const __m128i picks = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
      low = _mm_shuffle_epi8(low, picks);
      high = _mm_shuffle_epi8(high, picks);
      D::store16(out + d * 16, lanes_mul(lanes_from_int8(_mm_unpacklo_epi64(low, high)), scale));
      if (d + 1 < k) D::store16(out + (d + 1) * 16, lanes_mul(lanes_from_int8(_mm_unpackhi_epi64(low, high)), scale));
    }
  }
}

}  // namespace llmc
