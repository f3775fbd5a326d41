// bf16 on processors with AMX: the order of sums that tiles have, and the engine that keeps it on vector registers.
//
// TDPBF16PS adds products in pairs: over 32 of them the even ones and the odd ones are summed apart, each by fused multiply-adds from
// zero, then their sum is added to what was there; denormals count as zero throughout (Intel, Architecture Instruction Set Extensions
// Programming Reference, TDPBF16PS). q.k runs over dimensions in such groups of 32, p.v over keys in groups that start at multiples
// of 32; weights are rounded to bf16 before they meet V, as bf16 implementations on tensor cores do (their sum, the denominator, is of
// the unrounded ones). Softmax is taken over a whole segment at once.
//
// Few rows go through vector registers, many through tiles (paged_attention_amx.h): the same bits.
#pragma once
#include "amx.h"
#include "paged_attention_tile.h"

namespace llmc_pa {

// While it lives, and if asked to, denormals are zero to this thread's vector instructions, as they always are to tiles.
class DenormalsAreZero {
 public:
  explicit DenormalsAreZero(bool wanted) : mode_(_mm_getcsr()) {
    if (wanted) _mm_setcsr(mode_ | 0x8040);
  }
  ~DenormalsAreZero() { _mm_setcsr(mode_); }
  DenormalsAreZero(const DenormalsAreZero&) = delete;
  DenormalsAreZero& operator=(const DenormalsAreZero&) = delete;

 private:
  unsigned mode_;
};

constexpr int kTileRows = 16;       // query rows of a tile
constexpr int kFewestTileRows = 5;  // with fewer, vector registers are faster

#if LLMC_AMX

// Whether attention over a cache of this element runs in the order of pairs.
template <class C>
constexpr bool kPairs = std::is_same_v<C, Bf16>;

constexpr int kPairGroup = 32;
constexpr int kVectorRows = 4;  // rows at once: 4 x 2 pairs of sums, operands and broadcasts fit in 32 registers
constexpr int kSegmentStride = kSegment + W;

// The sub-tiles of one segment's keys, as in ChunkPointers.
struct SegmentPointers {
  const Bf16* k[kSegment / 8];
  const Bf16* v[kSegment / 8];
};

// A row's q.k in [lo, hi) becomes exp(score - maximum), handed to put(i, 16 of them) for i = lo rounded down, + 16, ...; those outside
// [lo, hi) are 0. Sets the row's maximum and denominator.
template <class Put>
static inline void weigh_row(const Numbers& n, float* scores, int lo, int hi, float* max, float* denominator, Put put) {
  const int first = lo & ~(W - 1);
  const bool whole = ((lo | hi) & (W - 1)) == 0;
  const Vec scale = v_set(n.scale);
  Vec high = v_set(-kInf);
  for (int i = first; i < hi; i += W) {
    Vec s = v_mul(v_load(scores + i), scale);
    if (n.softcap > 0.0f) s = v_softcap(s, v_set(n.softcap));
    if (!whole) s = v_keep_range(s, i, lo, hi);
    v_store(scores + i, s);
    high = v_max(high, s);
  }
  const float top = v_reduce_max(high);
  *max = top > -kInf ? top : -kInf;  // not NaN
  const Vec shift = v_set(*max == -kInf ? 0.0f : *max);
  Vec total = v_zero();
  for (int i = first; i < hi; i += W) {
    const Vec e = v_exp(v_sub(v_load(scores + i), shift));
    total = v_add(total, e);
    put(i, e);
  }
  *denominator = v_reduce_add(total);
}

// scores[r][i * lanes + t] = q[r].k[token t of sub-tile i], i < NT. next: NT sub-tiles wanted soon.
template <int R, int NT>
static inline void score_pairs(const Numbers& n, const Bf16* const* k, const Bf16* const* next, const float* q, float* scores) {
  const LaneMask mask = lane_mask(n.lanes);
  const int64_t step = 2 * n.lanes, row = n.padded;
  const Bf16* at[NT];
  const Bf16* ahead[NT];
  Vec sum[NT][R];
  for (int i = 0; i < NT; ++i) {
    at[i] = k[i];
    ahead[i] = next[i];
    for (int r = 0; r < R; ++r) sum[i][r] = v_zero();
  }
  for (int d0 = 0; d0 < n.D; d0 += kPairGroup) {
    Vec even[NT][R], odd[NT][R];
    for (int i = 0; i < NT; ++i)
      for (int r = 0; r < R; ++r) even[i][r] = odd[i][r] = v_zero();
    const float* end = q + (n.D - d0 < kPairGroup ? n.D : d0 + kPairGroup);
    for (const float* at_q = q + d0; at_q != end; at_q += 2) {
      Vec q0[R], q1[R];
      for (int r = 0; r < R; ++r) {
        q0[r] = v_set(at_q[r * row]);
        q1[r] = v_set(at_q[r * row + 1]);
      }
      for (int i = 0; i < NT; ++i) {
        Vec a, b;
        load_k(at[i], n.lanes, mask, &a, &b);
        _mm_prefetch(reinterpret_cast<const char*>(ahead[i]), _MM_HINT_T0);
        at[i] += step;
        ahead[i] += step;
        for (int r = 0; r < R; ++r) {
          even[i][r] = v_fma(a, q0[r], even[i][r]);
          odd[i][r] = v_fma(b, q1[r], odd[i][r]);
        }
      }
    }
    for (int i = 0; i < NT; ++i)
      for (int r = 0; r < R; ++r) sum[i][r] = v_add(sum[i][r], v_add(even[i][r], odd[i][r]));
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NT; ++i) v_store(scores + r * kSegmentStride + i * n.lanes, sum[i][r]);
}

// sums[r][d0 ...] += p[r][t] * v[t][d0 ...] for t in [lo, hi), NP groups of dimensions at once
template <int R, int NP, bool TAIL>
static inline void value_pairs(const Numbers& n, const SegmentPointers& at, int d0, int lo, int hi, const float* p, float* sums) {
  for (int t = lo; t < hi;) {
    Vec chain[2][NP][2][R];  // [even and odd keys][group][half][row]
    for (int parity = 0; parity < 2; ++parity)
      for (int g = 0; g < NP; ++g)
        for (int h = 0; h < 2; ++h)
          for (int r = 0; r < R; ++r) chain[parity][g][h][r] = v_zero();
    const auto add = [&](Vec (&sum)[NP][2][R], const Bf16* row, int key, const Bf16* ahead) {
      prefetch<NP * kGroup * sizeof(Bf16)>(ahead);
      Vec x[NP][2];
      for (int g = 0; g < NP; ++g) load_v<TAIL>(row + g * kGroup, n.D - d0, x[g]);
      for (int r = 0; r < R; ++r) {
        const Vec weight = v_set(p[r * kSegmentStride + key]);
        for (int g = 0; g < NP; ++g)
          for (int h = 0; h < 2; ++h) sum[g][h][r] = v_fma(weight, x[g][h], sum[g][h][r]);
      }
    };
    const int group_end = std::min(hi, (t & ~(kPairGroup - 1)) + kPairGroup);
    while (t < group_end) {
      const int tile = t >> n.lanes_log2, inside = t & (n.lanes - 1), end = std::min(group_end, (tile + 1) << n.lanes_log2);
      const Bf16* row = at.v[tile] + static_cast<int64_t>(inside) * n.D + d0;
      const int64_t ahead = (tile + 1) << n.lanes_log2 < hi ? at.v[tile + 1] - at.v[tile] : 0;
      if (t & 1) {
        add(chain[1], row, t++, row + ahead);
        row += n.D;
      }
      for (; t + 2 <= end; t += 2, row += 2 * n.D) {
        add(chain[0], row, t, row + ahead);
        add(chain[1], row + n.D, t + 1, row + n.D + ahead);
      }
      if (t < end) add(chain[0], row, t++, row + ahead);
    }
    for (int g = 0; g < NP; ++g)
      for (int h = 0; h < 2; ++h)
        for (int r = 0; r < R; ++r) {
          float* sum = sums + static_cast<int64_t>(r) * n.padded + d0 + g * kGroup + h * W;
          v_store(sum, v_add(v_load(sum), v_add(chain[0][g][h][r], chain[1][g][h][r])));
        }
  }
}

// From dimension d on, NP groups at once while that many are left, then half as many.
template <int R, int NP>
static inline void value_pairs_ladder(const Numbers& n, const SegmentPointers& at, int d, int lo, int hi, const float* p, float* sums) {
  for (; d + NP * kGroup <= n.D; d += NP * kGroup) value_pairs<R, NP, false>(n, at, d, lo, hi, p, sums);
  if constexpr (NP > 1) {
    if (d < n.D) value_pairs_ladder<R, NP / 2>(n, at, d, lo, hi, p, sums);
  } else {
    if (d < n.D) value_pairs<R, 1, true>(n, at, d, lo, hi, p, sums);
  }
}

template <int R>
static inline void value_segment(const Numbers& n, const SegmentPointers& at, int lo, int hi, const float* p, float* sums) {
  if (lo < hi) value_pairs_ladder<R, R == 1 ? 4 : R == 2 ? 2 : 1>(n, at, 0, lo, hi, p, sums);
}

// R rows over a segment; row r sees keys [lo[r], hi[r]) of it. Sets the state of those that see any.
template <int R>
static void attend_rows(const Numbers& n, const SegmentPointers& at, const float* q, const int* lo, const int* hi, RowState state) {
  constexpr int NT = R == 1 ? 4 : 2;  // enough independent sums to hide the latency of fma
  alignas(64) float scores[R * kSegmentStride];
  const auto [low, high] = span_of(R, lo, hi, kSegment);
  int common_lo = 0, common_hi = kSegment;
  bool same = true;
  for (int r = 0; r < R; ++r) {
    same = same && lo[r] == lo[0] && hi[r] == hi[0];
    common_lo = std::max(common_lo, lo[r]);
    common_hi = std::min(common_hi, hi[r]);
  }
  if (low >= high) return;
  int i = low >> n.lanes_log2;
  const int end = (high + n.lanes - 1) >> n.lanes_log2;
  // Behind the last K the first V is fetched.
  const int first = i;
  for (; i + NT <= end; i += NT) score_pairs<R, NT>(n, at.k + i, i + 2 * NT <= end ? at.k + i + NT : at.v + first, q, scores + i * n.lanes);
  for (; i < end; ++i) score_pairs<R, 1>(n, at.k + i, i + 2 <= end ? at.k + i + 1 : at.v + first, q, scores + i * n.lanes);
  for (int r = 0; r < R; ++r) {
    if (lo[r] >= hi[r]) continue;
    float* row = scores + r * kSegmentStride;
    weigh_row(n, row, lo[r], hi[r], state.max + r, state.denominator + r, [row](int at_key, Vec e) {
      const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(e));
      v_store(row + at_key, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
    });
  }
  // Where rows see different keys, each row's own ends stand alone, cut where groups are.
  if (!same) {
    common_lo = (common_lo + kPairGroup - 1) & ~(kPairGroup - 1);
    common_hi &= ~(kPairGroup - 1);
  }
  const bool shared = common_lo < common_hi;
  for (int r = 0; r < R && !same; ++r)
    value_segment<1>(n, at, lo[r], shared ? common_lo : hi[r], scores + r * kSegmentStride, state.sums + static_cast<int64_t>(r) * n.padded);
  if (!shared) return;
  value_segment<R>(n, at, common_lo, common_hi, scores, state.sums);
  for (int r = 0; r < R && !same; ++r)
    value_segment<1>(n, at, common_hi, hi[r], scores + r * kSegmentStride, state.sums + static_cast<int64_t>(r) * n.padded);
}

// Any number of rows over a segment on vector registers; `state` starts as nothing seen. q: [rows, padded], fp32.
static inline void attend_vectors(const Numbers& n, const SegmentPointers& at, const float* q, int rows, const int* lo, const int* hi,
                                  RowState state) {
  for (int r = 0; r < rows; r += kVectorRows) {
    const int64_t shift = static_cast<int64_t>(r) * n.padded;
    const RowState part{state.max + r, state.denominator + r, state.sums + shift};
    switch (std::min(kVectorRows, rows - r)) {
      case 1: attend_rows<1>(n, at, q + shift, lo + r, hi + r, part); break;
      case 2: attend_rows<2>(n, at, q + shift, lo + r, hi + r, part); break;
      case 3: attend_rows<3>(n, at, q + shift, lo + r, hi + r, part); break;
      default: attend_rows<4>(n, at, q + shift, lo + r, hi + r, part); break;
    }
  }
}

#else

template <class C>
constexpr bool kPairs = false;

#endif

}  // namespace llmc_pa
