// K and V in eight bits: how a token is written, and how a chunk of keys becomes fp32 in scratch, where attention reads it.
//
// LLMC_INT8: symmetric, a float32 scale per token and kv head: scale = max |x| / 127, integer = x / scale to the nearest, ties to
//   even. A tile is [block_size, head_dim + 4] bytes: all integers in the order of an unquantised tile (K by sub-tiles
//   [head_dim][lanes], V [block_size][head_dim]), then block_size scales. A token that holds NaN or infinity gets a NaN for a scale,
//   so that it is not hidden.
// LLMC_FP8_E4M3: the value itself, scale 1, to the nearest, ties to even, held to [-448, 448]; NaN stays NaN.
//   Format: "FP8 Formats for Deep Learning", Micikevicius et al. 2022, arXiv:2209.05433.
#pragma once
#include "paged_attention_layout.h"

namespace llmc_pa {

struct Int8 {
  int8_t bits;
};
struct Fp8 {
  uint8_t bits;
};

constexpr int kMaxHeadDim = 4096;  // as check() holds it

// Whether a cache element is read by attention as it is, or made into fp32 first.
template <class C>
constexpr bool kQuantized = false;
template <>
constexpr bool kQuantized<Int8> = true;
template <>
constexpr bool kQuantized<Fp8> = true;

template <class C>
constexpr int kScaleBytes = 0;  // per token of a tile
template <>
constexpr int kScaleBytes<Int8> = 4;

static inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// One token's values; returns their scale.
static inline float quantize(const float* x, int D, Int8* out) {
  float top = 0.0f;
  uint32_t bad = 0;
  for (int d = 0; d < D; ++d) {
    const float a = __builtin_fabsf(x[d]);
    top = a > top ? a : top;
    bad |= (float_bits(x[d]) & 0x7fffffffu) >= 0x7f800000u ? 1u : 0u;
  }
  if (bad != 0) {
    for (int d = 0; d < D; ++d) out[d].bits = 1;
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = top / 127.0f;
  // A scale below the smallest float is 0, and so are the integers. A denormal one may be rounded so far down that they pass 127.
  const float divisor = scale == 0.0f ? kInf : scale;
  for (int d = 0; d < D; ++d) {
    const float q = __builtin_rintf(x[d] / divisor);
    out[d].bits = static_cast<int8_t>(q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q);
  }
  return scale;
}

static inline float quantize(const float* x, int D, Fp8* out) {
  for (int d = 0; d < D; ++d) {
    const uint32_t bits = float_bits(x[d]), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    // Normal numbers: the exponent's bias goes from 127 to 7, three bits of fraction stay. Below 2^-6: multiples of 2^-9.
    const uint32_t normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    const float small_value = magnitude < 0x3c800000u ? __builtin_fabsf(x[d]) : 0.0f;
    const uint32_t small = static_cast<uint32_t>(static_cast<int32_t>(__builtin_rintf(small_value * 512.0f)));
    const uint32_t held = magnitude >= 0x43e00000u ? 0x7eu : magnitude < 0x3c800000u ? small : normal;  // 448 and above: the largest
    out[d].bits = static_cast<uint8_t>(sign | (magnitude > 0x7f800000u ? 0x7fu : held));
  }
  return 1.0f;
}

// Eight values as fp32.
static inline __m256 widen8(const Int8* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline __m256 widen8(const Fp8* p) {
  // As fp16 with the same fraction the number is 2^-8 of itself, denormal ones included; 0x7f is the one NaN.
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i magnitude = _mm_and_si128(x, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7e00));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x80)), 8);
  const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign), nan);
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}

// Write one token of one head: integers at their places of the tile, the scale behind them.
template <class C>
static inline void write_quantized(C* tile, bool is_k, int offset, const float* x, int D, int lanes, int64_t block_size) {
  C values[kMaxHeadDim];
  const float scale = quantize(x, D, values);
  if (is_k) {
    C* p = tile + static_cast<int64_t>(offset & ~(lanes - 1)) * D + (offset & (lanes - 1));
    for (int d = 0; d < D; ++d, p += lanes) *p = values[d];
  } else {
    memcpy(tile + static_cast<int64_t>(offset) * D, values, static_cast<size_t>(D));
  }
  if constexpr (kScaleBytes<C> != 0) memcpy(tile + block_size * D + offset * kScaleBytes<C>, &scale, sizeof(scale));
}

// The scales of the `lanes` tokens from `offset` on.
template <class C>
static inline void load_scales(const C* tile, int64_t block_size, int D, int offset, int lanes, float* scales) {
  if constexpr (kScaleBytes<C> != 0) {
    memcpy(scales, tile + block_size * D + offset * kScaleBytes<C>, static_cast<size_t>(lanes) * sizeof(float));
  } else {
    for (int t = 0; t < lanes; ++t) scales[t] = 1.0f;
  }
}

// One sub-tile of K, [D][lanes], and the V rows beside it, [lanes][D], into fp32 of the same order. `offset` is its first token's.
template <class C>
static inline void expand_k(const C* tile, int64_t block_size, int D, int offset, int lanes, float* out) {
  float scales[16];
  load_scales(tile, block_size, D, offset, lanes, scales);
  const C* from = tile + static_cast<int64_t>(offset) * D;
  const __m256 low = _mm256_loadu_ps(scales), high = lanes == 16 ? _mm256_loadu_ps(scales + 8) : low;
  for (int i = 0; i < D * lanes; i += 16) {
    _mm256_storeu_ps(out + i, _mm256_mul_ps(widen8(from + i), low));
    _mm256_storeu_ps(out + i + 8, _mm256_mul_ps(widen8(from + i + 8), high));
  }
}
template <class C>
static inline void expand_v(const C* tile, int64_t block_size, int D, int offset, int lanes, float* out) {
  float scales[16];
  load_scales(tile, block_size, D, offset, lanes, scales);
  const C* from = tile + static_cast<int64_t>(offset) * D;
  for (int t = 0; t < lanes; ++t, from += D, out += D) {
    const __m256 scale = _mm256_set1_ps(scales[t]);
    for (int d = 0; d < D; d += 8) _mm256_storeu_ps(out + d, _mm256_mul_ps(widen8(from + d), scale));
  }
}

}  // namespace llmc_pa
