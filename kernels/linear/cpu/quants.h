// Integers of 8 and 4 bits as the values that engines multiply.
//
// A weight is an integer in the order of the 16-bit packed layout: [panel][pair of depths][16 columns][2]; 4-bit weights lie two to a
// byte, the even depth in the low half, 8 added. A scale is [panel][group][16 columns], in the element type. Every integer is exact in
// fp32 and in bf16.
//
// Order of one output, at every level: per step of 32 depths the even depths in order and the odd depths in order, each from zero, then
// even + odd; the steps of a group in order; then sum = scale * group + sum in one rounding, group by group. All in fp32.
#pragma once

#include "lanes.h"

namespace llmc {

constexpr int64_t kStepDepths = 32;

// Where the panels of a quantised weight lie.
template <class D>
struct QuantizedPanels {
  const uint8_t* weight;              // the first panel
  const typename D::Element* scales;  // its scales
  int64_t panel_bytes, groups, group_steps;

  const typename D::Element* scales_at(int64_t panel, int64_t step) const { return scales + (panel * groups + step / group_steps) * 16; }
};

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

// Sixteen columns by two depths of a quantised panel against one row of x. A row has two running sums; which columns and depths their
// lanes hold is this struct's own affair, `finish` gives even + odd by column.
template <int Bits>
struct PairProduct {
#ifdef __AVX512F__
  using Broadcast = __m512;
  static Broadcast broadcast(const float* x) {
    double both;
    memcpy(&both, x, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
  }
  static Lanes widen(__m128i a) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a))}; }
  static Lanes fma(Lanes w, Broadcast x, Lanes sum) { return {_mm512_fmadd_ps(w.v, x, sum.v)}; }
  static Lanes finish(Lanes low, Lanes high) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_add_ps(_mm512_permutex2var_ps(low.v, even, high.v), _mm512_permutex2var_ps(low.v, odd, high.v))};
  }
#else
  using Broadcast = __m256;
  static Broadcast broadcast(const float* x) {
    double both;
    memcpy(&both, x, 8);
    return _mm256_castpd_ps(_mm256_set1_pd(both));
  }
  static Lanes widen(__m128i a) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)))};
  }
  static Lanes fma(Lanes w, Broadcast x, Lanes sum) { return {_mm256_fmadd_ps(w.lo, x, sum.lo), _mm256_fmadd_ps(w.hi, x, sum.hi)}; }
  static __m256 even_plus_odd(__m256 a, __m256 b) {  // eight columns; shuffles leave their middle quarters swapped
    const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sums), 0xd8));
  }
  static Lanes finish(Lanes low, Lanes high) { return {even_plus_odd(low.lo, low.hi), even_plus_odd(high.lo, high.hi)}; }
#endif
  // (column 0 even, column 0 odd, column 1 even, ...) of columns 0..7 and of columns 8..15
  Lanes low, high;
  explicit PairProduct(const uint8_t* at) {
    __m128i a, b;
    Quants<Bits>::load(at, a, b);
    low = widen(a);
    high = widen(b);
  }
  void add(const float* x, Lanes& low_sum, Lanes& high_sum) const {
    const Broadcast pair = broadcast(x);
    low_sum = fma(low, pair, low_sum);
    high_sum = fma(high, pair, high_sum);
  }
};

#ifdef __AVX512F__
// Four bits are looked up: the low four bits of a lane choose one of sixteen floats.
template <>
struct PairProduct<4> {
  Lanes even, odd;
  explicit PairProduct(const uint8_t* at) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
    even.v = _mm512_permutexvar_ps(both, values);
    odd.v = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), values);
  }
  void add(const float* x, Lanes& even_sum, Lanes& odd_sum) const {
    even_sum = lanes_fma(even, x[0], even_sum);
    odd_sum = lanes_fma(odd, x[1], odd_sum);
  }
  static Lanes finish(Lanes even_sum, Lanes odd_sum) { return lanes_add(even_sum, odd_sum); }
};
#endif

#ifdef __AVX512BF16__
// One AMX tile, 16 columns by 32 depths, as bf16.
template <int Bits>
inline void widen_tile(const uint8_t* tile, uint16_t* out) {
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++) {
    const PairProduct<Bits> pair(tile + j * 32);
    _mm512_storeu_si512(out + j * 32, (__m512i)_mm512_cvtne2ps_pbh(pair.high.v, pair.low.v));
  }
}

// Four bits are looked up here too. Five bits of a 16-bit lane choose; the highest of them belongs to the other depth, so the table
// stands twice.
template <>
inline void widen_tile<4>(const uint8_t* tile, uint16_t* out) {
  alignas(32) static constexpr uint16_t kValues[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                       0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  const __m512i values = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i*)kValues));
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(tile + j * 16)));
    const __m512i chosen = _mm512_or_si512(both, _mm512_slli_epi32(both, 12));
    _mm512_storeu_si512(out + j * 32, _mm512_permutexvar_epi16(chosen, values));
  }
}
#endif

}  // namespace llmc
