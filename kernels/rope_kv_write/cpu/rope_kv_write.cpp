// llmc::rope_kv_write on a CPU.
//
// Tokens are taken some at a time. Their rows of cos and sin become fp32 once for all heads, and their keys go into the cache
// head by head, since neighbouring tokens of one head share the cache lines of a K tile.
#include "rope_kv_write.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own AVX-512 headers set it off (gcc.gnu.org/PR105593)
#endif

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "linear/cpu/lanes.h"
#include "linear/cpu/matmul.h"
#include "paged_attention/cpu/paged_attention_quantized.h"

namespace {

using namespace llmc;
using llmc_pa::Fp8;
using llmc_pa::Int8;
using llmc_pa::kMaxHeadDim;
using llmc_pa::kQuantized;
using Args = LlmcRopeKVWriteArgs;

constexpr int64_t kTokens = 16;  // at a time at most, or heads: a K tile's cache line holds no more
constexpr int kSlack = 16;       // floats behind a row that may be read and mean nothing
constexpr int kTableFloats = 8704;  // 16 tokens of 256 rotated dimensions, one of kMaxHeadDim
static_assert(kTableFloats >= 2 * (kMaxHeadDim + kSlack));
constexpr int64_t kSerialTokens = 8;  // fewer are a few microseconds, which waking threads would cost again

// An element type as linear's lanes know it, and as paged attention does.
struct Float : F32 {
  using Stored = float;
};
struct Half : F16 {
  using Stored = llmc_pa::Fp16;
};
struct Brain : BF16 {
  using Stored = llmc_pa::Bf16;
};

#ifdef __AVX512F__
Lanes times(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
Lanes all(float x) { return {_mm512_set1_ps(x)}; }
#else
Lanes times(Lanes a, Lanes b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
#endif

template <class D>
Lanes rounded(Lanes x) {
  if constexpr (std::is_same_v<D, Float>) return x;
  typename D::Element held[16];
  D::store16(held, x);
  return D::load16(held);
}

// Sixteen running sums, one per dimension modulo 16, then a tree, as in rms_norm.
#ifdef __AVX512F__
float sum_of(Lanes sums) { return llmc_pa::reduce_add_256(_mm256_add_ps(_mm512_castps512_ps256(sums.v), _mm512_extractf32x8_ps(sums.v, 1))); }
#else
float sum_of(Lanes sums) { return llmc_pa::reduce_add_256(_mm256_add_ps(sums.lo, sums.hi)); }
#endif

int columns_from(int64_t d, int64_t end) { return static_cast<int>(std::min<int64_t>(16, end - d)); }

// What every token of a call shares: a norm's factor per dimension.
struct Norm {
  bool present = false;
  float factor[kMaxHeadDim + kSlack];

  void set(const void* weight, int32_t dtype, int64_t count, float offset) {
    present = weight != nullptr;
    for (int64_t d = 0; present && d < count; d++)
      factor[d] = offset + (dtype == LLMC_FLOAT32   ? static_cast<const float*>(weight)[d]
                            : dtype == LLMC_FLOAT16 ? F16::widen(static_cast<const uint16_t*>(weight)[d])
                                                    : BF16::widen(static_cast<const uint16_t*>(weight)[d]));
  }
};

// 1 / sqrt(mean(x^2) + eps) of up to kTokens heads, `stride` elements apart. All of them before the first is used: one waits for its
// own sum, several do so at once.
template <class D>
void find_scales(const typename D::Element* x, int64_t stride, int64_t count, const Args& a, float* scales) {
  float sums[kTokens] = {};
  for (int64_t i = 0; i < count; i++, x += stride) {
    Lanes squares = lanes_zero();
    for (int64_t d = 0; d < a.head_dim; d += 16) {
      const Lanes wide = load_columns<D>(x + d, columns_from(d, a.head_dim));
      squares = lanes_scaled(wide, wide, squares);
    }
    sums[i] = sum_of(squares);
  }
  for (int64_t i = 0; i < kTokens; i++) scales[i] = 1.0f / std::sqrt(sums[i] / static_cast<float>(a.head_dim) + static_cast<float>(a.eps));
}

// One head, normalised as it is read.
template <class D>
struct Head {
  const typename D::Element* x;
  const Norm& norm;
  float scale;
  bool round_first;

  Lanes read(int64_t d, int columns) const {
    const Lanes wide = load_columns<D>(x + d, columns);
    if (!norm.present) return wide;
    const Lanes quotient = times(wide, all(scale));
    return rounded<D>(times(round_first ? rounded<D>(quotient) : quotient, lanes_load(norm.factor + d)));
  }
};

// The tables' rows of some tokens in fp32: of each token cos, then sin with its first half negated.
struct Tables {
  int64_t rotated;
  float* rows;

  int64_t width() const { return rotated + kSlack; }
  const float* cos(int64_t token) const { return rows + token * 2 * width(); }
  const float* sin(int64_t token) const { return cos(token) + width(); }

  template <class P>
  void read(const Args& a, int64_t begin, int64_t end) const {
    using E = typename P::Element;
    float* to = rows;
    for (int64_t t = begin; t < end; t++, to += 2 * width()) {
      const E* cos = static_cast<const E*>(a.cos) + a.positions[t] * a.cos_stride;
      const E* sin = static_cast<const E*>(a.sin) + a.positions[t] * a.sin_stride;
      for (int64_t d = 0; d < rotated; d += 16) {
        lanes_store(to + d, load_columns<P>(cos + d, columns_from(d, rotated)));
        lanes_store(to + width() + d, load_columns<P>(sin + d, columns_from(d, rotated)));
      }
      for (int64_t d = 0; d < rotated / 2; d++) to[width() + d] = -to[width() + d];
    }
  }
};

// Dimension i with i + R/2, for i < R/2; the others as they are.
template <class D>
void turn(const Head<D>& head, const Args& a, const float* cos, const float* sin, typename D::Element* out) {
  const int64_t half = a.rotated / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const int columns = columns_from(i, half);
    const Lanes low = head.read(i, columns), high = head.read(half + i, columns);
    store_columns<D>(out + i, lanes_scaled(low, lanes_load(cos + i), times(high, lanes_load(sin + i))), columns);
    store_columns<D>(out + half + i, lanes_scaled(high, lanes_load(cos + half + i), times(low, lanes_load(sin + half + i))), columns);
  }
  for (int64_t d = a.rotated; d < a.head_dim; d += 16) {
    const int columns = columns_from(d, a.head_dim);
    store_columns<D>(out + d, head.read(d, columns), columns);
  }
}

// D: of q, k and v. C: of the caches.
template <class D, class C>
class Call {
  using E = typename D::Element;
  using T = typename D::Stored;

 public:
  Call(const Args& a, const Norm& q_norm, const Norm& k_norm) : a_(a), q_norm_(q_norm), k_norm_(k_norm) {
    lanes_ = llmc_pa::W == 16 && a.block_size % 16 == 0 ? 16 : 8;
  }

  void run(int64_t begin, int64_t end, const Tables& tables) const {
    for (int64_t t = begin; t < end; t++)
      for (int64_t h = 0; h < a_.num_heads; h += kTokens) turn_q(t, h, std::min(a_.num_heads, h + kTokens), tables.cos(t - begin), tables.sin(t - begin));
    for (int64_t h = 0; h < a_.num_kv_heads; h++) write(h, begin, end, tables);
  }

 private:
  // Heads [begin, end) of one token.
  void turn_q(int64_t t, int64_t begin, int64_t end, const float* cos, const float* sin) const {
    const E* q = static_cast<const E*>(a_.q) + t * a_.q_token_stride + begin * a_.q_head_stride;
    E* out = static_cast<E*>(a_.out) + (t * a_.num_heads + begin) * a_.head_dim;
    float scales[kTokens];
    if (q_norm_.present) find_scales<D>(q, a_.q_head_stride, end - begin, a_, scales);
    for (int64_t i = 0; i < end - begin; i++, q += a_.q_head_stride, out += a_.head_dim)
      turn<D>({q, q_norm_, scales[i], a_.round_first != 0}, a_, cos, sin, out);
  }

  // Tokens [begin, end) of one kv head.
  void write(int64_t h, int64_t begin, int64_t end, const Tables& tables) const {
    const E* k = static_cast<const E*>(a_.k) + begin * a_.k_token_stride + h * a_.k_head_stride;
    float scales[kTokens];
    if (k_norm_.present) find_scales<D>(k, a_.k_token_stride, end - begin, a_, scales);
    for (int64_t t = begin; t < end; t++, k += a_.k_token_stride) {
      if (a_.slot_mapping[t] < 0) continue;
      T turned[kMaxHeadDim];
      turn<D>({k, k_norm_, scales[t - begin], a_.round_first != 0}, a_, tables.cos(t - begin), tables.sin(t - begin), reinterpret_cast<E*>(turned));
      store(t, h, turned, static_cast<const T*>(a_.v) + t * a_.v_token_stride + h * a_.v_head_stride);
    }
  }

  void store(int64_t t, int64_t h, const T* k, const T* v) const {
    const int64_t block = a_.slot_mapping[t] / a_.block_size;
    const int offset = static_cast<int>(a_.slot_mapping[t] % a_.block_size), dim = static_cast<int>(a_.head_dim);
    C* k_tile = static_cast<C*>(a_.k_cache) + block * a_.k_cache_block_stride + h * a_.k_cache_head_stride;
    C* v_tile = static_cast<C*>(a_.v_cache) + block * a_.v_cache_block_stride + h * a_.v_cache_head_stride;
    if constexpr (kQuantized<C>) {
      float wide[kMaxHeadDim];
      llmc_pa::widen(k, dim, wide);
      llmc_pa::write_quantized(k_tile, true, offset, wide, dim, lanes_, a_.block_size);
      llmc_pa::widen(v, dim, wide);
      llmc_pa::write_quantized(v_tile, false, offset, wide, dim, lanes_, a_.block_size);
    } else {
      llmc_pa::write_k(k_tile, offset, k, dim, lanes_);
      memcpy(v_tile + static_cast<int64_t>(offset) * dim, v, static_cast<size_t>(dim) * sizeof(T));
    }
  }

  const Args& a_;
  const Norm &q_norm_, &k_norm_;
  int lanes_;  // tokens of a sub-tile of K
};

template <class D, class C>
void run(const Args& a, int threads) {
  Norm q_norm, k_norm;
  q_norm.set(a.q_weight, a.q_weight_dtype, a.head_dim, static_cast<float>(a.offset));
  k_norm.set(a.k_weight, a.k_weight_dtype, a.head_dim, static_cast<float>(a.offset));
  const Call<D, C> call(a, q_norm, k_norm);
  const int64_t room = std::min(kTokens, kTableFloats / (2 * (a.rotated + kSlack)));
  const int64_t at_once = std::clamp<int64_t>((a.num_tokens + threads - 1) / threads, 1, room);
  const int64_t parts = (a.num_tokens + at_once - 1) / at_once;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; part++) {
    float rows[kTableFloats];
    const Tables tables{a.rotated, rows};
    const int64_t begin = part * at_once, end = std::min(a.num_tokens, begin + at_once);
    if (a.table_dtype == LLMC_FLOAT32) tables.read<F32>(a, begin, end);
    if (a.table_dtype == LLMC_FLOAT16) tables.read<F16>(a, begin, end);
    if (a.table_dtype == LLMC_BFLOAT16) tables.read<BF16>(a, begin, end);
    call.run(begin, end, tables);
  }
}

template <class D>
void run_into(const Args& a, int threads) {
  switch (a.kv_dtype) {
    case LLMC_INT8: return run<D, Int8>(a, threads);
    case LLMC_FP8_E4M3: return run<D, Fp8>(a, threads);
    default: return run<D, typename D::Stored>(a, threads);
  }
}

bool floating(int32_t dtype) { return dtype == LLMC_FLOAT32 || dtype == LLMC_FLOAT16 || dtype == LLMC_BFLOAT16; }

int32_t check(const Args& a) {
  if (!floating(a.dtype) || !floating(a.table_dtype)) return LLMC_BAD_DTYPE;
  if (a.kv_dtype != a.dtype && a.kv_dtype != LLMC_INT8 && a.kv_dtype != LLMC_FP8_E4M3) return LLMC_BAD_DTYPE;
  if ((a.q_weight && !floating(a.q_weight_dtype)) || (a.k_weight && !floating(a.k_weight_dtype))) return LLMC_BAD_DTYPE;
  if (a.num_tokens < 0 || a.num_heads < 1 || a.num_kv_heads < 1 || a.num_positions < 0 || a.num_blocks < 0 || a.num_threads < 0) return LLMC_BAD_SHAPE;
  if (a.head_dim < 8 || a.head_dim > kMaxHeadDim || a.head_dim % 8 != 0) return LLMC_BAD_SHAPE;
  if (a.rotated < 2 || a.rotated > a.head_dim || a.rotated % 2 != 0) return LLMC_BAD_SHAPE;
  if (a.block_size < 8 || a.block_size > 65536 || a.block_size % 8 != 0) return LLMC_BAD_SHAPE;
  if (a.num_tokens == 0) return LLMC_OK;
  if (!a.q || !a.k || !a.v || !a.positions || !a.cos || !a.sin || !a.slot_mapping || !a.out) return LLMC_BAD_SHAPE;
  if (a.num_blocks > 0 && (!a.k_cache || !a.v_cache)) return LLMC_BAD_SHAPE;
  for (int64_t t = 0; t < a.num_tokens; t++) {
    if (a.positions[t] < 0 || a.positions[t] >= a.num_positions) return LLMC_BAD_INDEX;
    if (a.slot_mapping[t] >= a.num_blocks * a.block_size) return LLMC_BAD_INDEX;
  }
  return LLMC_OK;
}

}  // namespace

int32_t llmc_rope_kv_write(const LlmcRopeKVWriteArgs* a) {
  if (!a || a->struct_bytes != (int64_t)sizeof(LlmcRopeKVWriteArgs)) return LLMC_BAD_STRUCT;
  if (const int32_t code = check(*a); code != LLMC_OK || a->num_tokens == 0) return code;
  const int64_t elements = a->num_tokens * (a->num_heads + 2 * a->num_kv_heads) * a->head_dim;
  const int threads = a->num_tokens < kSerialTokens ? 1 : num_threads_for(a->num_threads, elements * 8, elements * 4);
  switch (a->dtype) {
    case LLMC_FLOAT32: run_into<Float>(*a, threads); break;
    case LLMC_FLOAT16: run_into<Half>(*a, threads); break;
    default: run_into<Brain>(*a, threads); break;
  }
  return LLMC_OK;
}

const char* llmc_rope_kv_write_message(int32_t code) {
  switch (code) {
    case LLMC_OK: return "ok";
    case LLMC_BAD_STRUCT: return "rope_kv_write: the argument struct has another size; caller and kernels come from different versions";
    case LLMC_BAD_DTYPE: return "rope_kv_write: q, k, v must share one of float32, float16, bfloat16; caches are of that type, int8 or fp8 e4m3";
    case LLMC_BAD_SHAPE: return "rope_kv_write: head_dim and block_size must be multiples of 8, the tables even and no wider than a head";
    case LLMC_BAD_INDEX: return "rope_kv_write: a position lies past the tables or a slot past the last block";
  }
  return "rope_kv_write: unknown status";
}
