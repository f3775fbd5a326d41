// Quantised weights on vector registers: integers widened to fp32 as they are read, fp32 multiply-add. The order is that of quants.h.
#pragma once

#include <algorithm>

#include "amx.h"
#include "engine_fma.h"
#include "quants.h"

namespace llmc {

template <class D>
struct QuantizedEngine {
  using X = float;
  static constexpr int64_t kDepthMultiple = kStepDepths;
  static constexpr int64_t kBlockBytes = 512 << 10;  // prepared rows kept in half the L2 cache
  static constexpr bool kTakesRawRows = false;
  // Rows that share a widened weight: 1, 2, 4, 8 as the registers hold.
#if LLMC_AMX
  static constexpr int kMaxRows = std::is_same_v<D, BF16> ? 2 : 8;  // more go to the tiles
#elif defined(__AVX512F__)
  static constexpr int kMaxRows = 8;
#else
  static constexpr int kMaxRows = 2;
#endif

  // Where AMX computes larger batches of bf16, denormals count as zero here too.
  static unsigned enter(int64_t) {
    const unsigned mode = _mm_getcsr();
#if LLMC_AMX
    if constexpr (std::is_same_v<D, BF16>) _mm_setcsr(mode | 0x8040);
    asm volatile("" ::: "memory");
#endif
    return mode;
  }
  static void leave(unsigned mode) {
    asm volatile("" ::: "memory");
    _mm_setcsr(mode);
  }
  static void prepare(X* out, const typename D::Element* row, int64_t k, int64_t depth) { FmaEngine<D>::prepare(out, row, k, depth); }
};

template <class D, int Bits>
struct QuantizedDriver {
  static constexpr bool kQuantized = true;
  using Element = typename D::Element;
  using Engine = QuantizedEngine<D>;

  static int64_t scratch_bytes(const Tile<D, float>&, const QuantizedPanels<D>&) { return 0; }

  template <class Out>
  static void run(const Tile<D, float>& t, const QuantizedPanels<D>& q, void*, int64_t panel, int64_t panel_end, Out&& row_out) {
    for (; panel < panel_end; panel++)
      for (int64_t r = 0; r < t.num_rows;) r += largest_block<Engine::kMaxRows>(t, q, r, panel, row_out);
  }

 private:
  template <int R, class Out>
  static int64_t largest_block(const Tile<D, float>& t, const QuantizedPanels<D>& q, int64_t first, int64_t panel, Out& row_out) {
    if constexpr (R > 1)
      if (t.num_rows - first < R) return largest_block<R / 2>(t, q, first, panel, row_out);
    block<R>(t, q, first, panel, row_out);
    return R;
  }

  template <int R, class Out>
  static void block(const Tile<D, float>& t, const QuantizedPanels<D>& q, int64_t first, int64_t panel, Out& row_out) {
    const uint8_t* at = q.weight + panel * q.panel_bytes;
    const Element* scales = q.scales_at(panel, 0);
    const float* x = t.x + first * t.x_stride;
    const int64_t steps = (t.k + kStepDepths - 1) / kStepDepths;
    Lanes sums[R];
    for (int r = 0; r < R; r++) sums[r] = lanes_zero();
    for (int64_t s = 0; s < steps; scales += 16) {
      Lanes group[R];
      for (int r = 0; r < R; r++) group[r] = lanes_zero();
      _mm_prefetch((const char*)scales + 512, _MM_HINT_T0);  // both streams go on in the next panel
      for (const int64_t end = std::min(s + q.group_steps, steps); s < end; s++, x += kStepDepths, at += 16 * Quants<Bits>::kPairBytes) {
        Lanes a[R], b[R];
        for (int r = 0; r < R; r++) a[r] = b[r] = lanes_zero();
#pragma GCC unroll 4
        for (int j = 0; j < 16; j++) {
          const uint8_t* pair = at + j * Quants<Bits>::kPairBytes;
          if (j * Quants<Bits>::kPairBytes % 64 == 0) _mm_prefetch((const char*)pair + 2048, _MM_HINT_T0);
          const PairProduct<Bits> weights(pair);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) weights.add(x + r * t.x_stride + 2 * j, a[r], b[r]);
        }
        for (int r = 0; r < R; r++) group[r] = lanes_add(group[r], PairProduct<Bits>::finish(a[r], b[r]));
      }
      const Lanes scale = D::load16(scales);
      for (int r = 0; r < R; r++) sums[r] = lanes_scaled(scale, group[r], sums[r]);
    }
    const int64_t column = panel * 16, columns = t.n - column;
    for (int r = 0; r < R; r++) {
      if (t.bias) sums[r] = lanes_add(sums[r], load_columns<D>(t.bias + column, columns));
      store_columns<D>(row_out(first + r) + column, sums[r], columns);
    }
  }
};

}  // namespace llmc
