// Vectors of W floats, for AVX-512 (W = 16) and AVX2 with FMA and F16C (W = 8): just what paged attention needs.
//
// A product that feeds a sum is always an explicit fma, so results do not hang on the compiler's contraction rules.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <limits>

namespace llmc_pa {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

constexpr float kInf = std::numeric_limits<float>::infinity();

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LLMC_PA_AVX512 1
constexpr int W = 16;
constexpr int kMaxRows = 8;  // rows of one tile: 8 x 2 sums, operands and one broadcast fit in 32 registers
using Vec = __m512;

static inline Vec v_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void v_store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
static inline Vec v_set(float x) { return _mm512_set1_ps(x); }
static inline Vec v_zero() { return _mm512_setzero_ps(); }
static inline float v_first(Vec x) { return _mm512_cvtss_f32(x); }
static inline Vec v_add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec v_sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec v_mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec v_div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
static inline Vec v_max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec v_fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec v_fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
static inline Vec v_round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// value * 2^n, n whole; zero where x is less than bound.
static inline Vec v_scale_unless_less(Vec value, Vec n, Vec x, Vec bound) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), value, n);
}
static inline Vec v_abs(Vec x) { return _mm512_abs_ps(x); }
static inline Vec v_copysign(Vec magnitude, Vec sign) {
  const Vec bit = _mm512_set1_ps(-0.0f);
  return _mm512_or_ps(_mm512_andnot_ps(bit, magnitude), _mm512_and_ps(bit, sign));
}
// Lanes whose index (first + lane) lies in [lo, hi) stay; the others become -inf, whatever they held.
static inline Vec v_keep_range(Vec x, int first, int lo, int hi) {
  const int below = lo > first ? lo - first : 0;
  const int above = hi - first < W ? hi - first : W;
  const __mmask16 mask = static_cast<__mmask16>(((1u << above) - 1u) & ~((1u << below) - 1u));
  return _mm512_mask_mov_ps(_mm512_set1_ps(-kInf), mask, x);
}
static inline __m256 v_low(Vec x) { return _mm512_castps512_ps256(x); }
static inline __m256 v_high(Vec x) { return _mm512_extractf32x8_ps(x, 1); }
#else
constexpr int W = 8;
constexpr int kMaxRows = 4;
using Vec = __m256;

static inline Vec v_load(const float* p) { return _mm256_loadu_ps(p); }
static inline void v_store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
static inline Vec v_set(float x) { return _mm256_set1_ps(x); }
static inline Vec v_zero() { return _mm256_setzero_ps(); }
static inline float v_first(Vec x) { return _mm256_cvtss_f32(x); }
static inline Vec v_add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec v_sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec v_mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec v_div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
static inline Vec v_max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec v_fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec v_fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
static inline Vec v_round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec v_scale_unless_less(Vec value, Vec n, Vec x, Vec bound) {
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, bound, _CMP_LT_OQ), _mm256_mul_ps(value, power));
}
static inline Vec v_abs(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
static inline Vec v_copysign(Vec magnitude, Vec sign) {
  const Vec bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
}
static inline Vec v_keep_range(Vec x, int first, int lo, int hi) {
  const __m256i lane = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane), _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane));
  return _mm256_blendv_ps(_mm256_set1_ps(-kInf), x, _mm256_castsi256_ps(in));
}
#endif

static inline float reduce_add_256(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float reduce_max_256(__m256 x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
#if LLMC_PA_AVX512
static inline float v_reduce_add(Vec x) { return reduce_add_256(_mm256_add_ps(v_low(x), v_high(x))); }
static inline float v_reduce_max(Vec x) { return reduce_max_256(_mm256_max_ps(v_low(x), v_high(x))); }
#else
static inline float v_reduce_add(Vec x) { return reduce_add_256(x); }
static inline float v_reduce_max(Vec x) { return reduce_max_256(x); }
#endif

// e^x for x <= 0, about 1 ulp; exactly 1 at 0, exactly 0 below -87.3, NaN for NaN.
// Degree-6 polynomial after Cody-Waite reduction, as in Cephes' expf.
__attribute__((always_inline)) static inline Vec v_exp(Vec x) {
  const Vec floor = v_set(-87.3f);
  const Vec bounded = v_max(floor, x);  // this order of operands keeps a NaN
  const Vec n = v_round(v_mul(bounded, v_set(1.44269504089f)));
  Vec r = v_fnma(n, v_set(0.693359375f), bounded);
  r = v_fnma(n, v_set(-2.12194440e-4f), r);
  Vec p = v_set(1.9875691500e-4f);
  p = v_fma(p, r, v_set(1.3981999507e-3f));
  p = v_fma(p, r, v_set(8.3334519073e-3f));
  p = v_fma(p, r, v_set(4.1665795894e-2f));
  p = v_fma(p, r, v_set(1.6666665459e-1f));
  p = v_fma(p, r, v_set(5.0000001201e-1f));
  p = v_fma(v_mul(r, r), p, v_add(r, v_set(1.0f)));
  return v_scale_unless_less(p, n, x, floor);
}

static inline float exp_scalar(float x) { return v_first(v_exp(v_set(x))); }

// cap * tanh(x / cap). The error is a few units in the last place of cap, far below what fp32 sums already carry.
static inline Vec v_softcap(Vec x, Vec cap) {
  const Vec y = v_div(x, cap);
  const Vec e = v_exp(v_mul(v_abs(y), v_set(-2.0f)));
  const Vec t = v_div(v_sub(v_set(1.0f), e), v_add(v_set(1.0f), e));
  return v_mul(cap, v_copysign(t, y));
}

static inline float to_float(float x) { return x; }
static inline float to_float(Fp16 x) { return _cvtsh_ss(x.bits); }
static inline float to_float(Bf16 x) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(x.bits) << 16))); }

// `count` elements (a multiple of 8) as fp32.
static inline void widen(const float* from, int count, float* to) { memcpy(to, from, static_cast<size_t>(count) * sizeof(float)); }
static inline void widen(const Fp16* from, int count, float* to) {
  for (int i = 0; i < count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
}
static inline void widen(const Bf16* from, int count, float* to) {
  for (int i = 0; i < count; i += 8) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
  }
}

}  // namespace llmc_pa
