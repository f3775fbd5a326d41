// Engines on vector registers: fp32 multiply-add with widening (all types), and AVX512-BF16 pair products.
//
// Order of one output: fp32 FMA engine: the even depths in order, the odd depths in order, then even + odd.
// Pair engine: depth pairs in order, one vdpbf16ps each. Blocking over rows and panels never touches these chains.
#pragma once

#include "lanes.h"

namespace llmc {

// What an engine is given for one job: prepared rows, panels [panel_begin, panel_end).
template <class D, class X>
struct Tile {
  const X* x;
  int64_t x_stride;  // elements of X
  const typename D::Element* weight;
  const typename D::Element* bias;
  int64_t num_rows, n, k;
  int64_t panel_elements;  // elements of one packed panel
};

template <class D>
struct FmaEngine {
  using X = float;
  static constexpr int64_t kDepthMultiple = D::kPaired ? 2 : 1;  // prepared rows are zero-padded to it
  static constexpr int64_t kBlockBytes = 512 << 10;              // prepared rows kept in half the L2 cache
  static constexpr bool kTakesRawRows = !D::kPaired;
#ifdef __AVX512F__
  static constexpr int kMaxRows = 6;
  static constexpr int kPanels[kMaxRows + 1] = {0, 8, 4, 4, 3, 2, 2};  // by rows: accumulators fill the 32 registers
#else
  static constexpr int kMaxRows = 2;
  static constexpr int kPanels[kMaxRows + 1] = {0, 2, 1};
#endif
  static unsigned enter(int64_t) { return 0; }
  static void leave(unsigned) {}
  static void prepare(X* out, const typename D::Element* row, int64_t k, int64_t depth) {
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) lanes_store(out + i, D::load16(row + i));
    for (; i < k; i++) out[i] = D::widen(row[i]);
    for (; i < depth; i++) out[i] = 0;
  }

  template <int R, int P>
  static void micro(const Tile<D, X>& t, const X* x, const typename D::Element* w, Lanes (&out)[R][P]) {
    Lanes even[R][P], odd[R][P];
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) even[r][p] = odd[r][p] = lanes_zero();
    const int64_t pairs = D::kPaired ? (t.k + 1) / 2 : t.k / 2;
    for (int64_t j = 0; j < pairs; j++) {
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) {
        const typename D::Element* at = w + p * t.panel_elements + j * 32;
        _mm_prefetch((const char*)at + 1024, _MM_HINT_T0);
        if constexpr (!D::kPaired) _mm_prefetch((const char*)at + 1088, _MM_HINT_T0);
        Lanes we, wo;
        D::load_pair(at, we, wo);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          even[r][p] = lanes_fma(we, x[r * t.x_stride + 2 * j], even[r][p]);
          odd[r][p] = lanes_fma(wo, x[r * t.x_stride + 2 * j + 1], odd[r][p]);
        }
      }
    }
    if constexpr (!D::kPaired) {
      if (t.k % 2)
        for (int p = 0; p < P; p++)
          for (int r = 0; r < R; r++)
            even[r][p] = lanes_fma(D::load16(w + p * t.panel_elements + (t.k - 1) * 16), x[r * t.x_stride + t.k - 1], even[r][p]);
    }
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) out[r][p] = lanes_add(even[r][p], odd[r][p]);
  }
};

#ifdef __AVX512BF16__
struct PairEngine {
  using X = uint16_t;
  static constexpr int64_t kDepthMultiple = 2;
  static constexpr int64_t kBlockBytes = 512 << 10;
  static constexpr bool kTakesRawRows = true;
  static constexpr int kMaxRows = 12;
  static constexpr int kPanels[kMaxRows + 1] = {0, 8, 8, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2};
  static unsigned enter(int64_t) { return 0; }
  static void leave(unsigned) {}
  static void prepare(X* out, const uint16_t* row, int64_t k, int64_t depth) {
    memcpy(out, row, k * sizeof(X));
    for (int64_t i = k; i < depth; i++) out[i] = 0;
  }

  template <int R, int P>
  static void micro(const Tile<BF16, X>& t, const X* x, const uint16_t* w, Lanes (&out)[R][P]) {
    for (int r = 0; r < R; r++)
      for (int p = 0; p < P; p++) out[r][p] = lanes_zero();
    for (int64_t j = 0; j < (t.k + 1) / 2; j++) {
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) {
        const uint16_t* at = w + p * t.panel_elements + j * 32;
        _mm_prefetch((const char*)at + 1024, _MM_HINT_T0);
        __m512bh wv = (__m512bh)_mm512_loadu_si512(at);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          int32_t pair;
          memcpy(&pair, x + r * t.x_stride + 2 * j, 4);
          out[r][p].v = _mm512_dpbf16_ps(out[r][p].v, wv, (__m512bh)_mm512_set1_epi32(pair));
        }
      }
    }
  }
};
#endif

// Runs `E::micro` over rows [0, num_rows) and panels [panel, panel_end), and writes the finished rows.
template <class D, class E>
struct VectorDriver {
  static constexpr bool kQuantized = false;
  using X = typename E::X;
  using Element = typename D::Element;

  template <class Out>
  static void run(const Tile<D, X>& t, int64_t panel, int64_t panel_end, Out&& row_out) {
    const int64_t chunk = t.num_rows < E::kMaxRows ? t.num_rows : E::kMaxRows;
    while (panel < panel_end) {
      int64_t panels = panel_end - panel < E::kPanels[chunk] ? panel_end - panel : E::kPanels[chunk];
      for (int64_t r = 0; r < t.num_rows; r += chunk) {
        int64_t rows = t.num_rows - r < chunk ? t.num_rows - r : chunk;
        by_rows<1>(rows, panels, t, r, panel, row_out);
      }
      panel += panels;
    }
  }

 private:
  template <int R, class Out>
  static void by_rows(int64_t rows, int64_t panels, const Tile<D, X>& t, int64_t r, int64_t panel, Out& row_out) {
    if (rows == R) return by_panels<R, 1>(panels, t, r, panel, row_out);
    if constexpr (R < E::kMaxRows) by_rows<R + 1>(rows, panels, t, r, panel, row_out);
  }
  // A short last chunk of rows may ask for more panels at once than its own table entry; the table never falls with fewer rows.
  template <int R, int P, class Out>
  static void by_panels(int64_t panels, const Tile<D, X>& t, int64_t r, int64_t panel, Out& row_out) {
    if (panels == P) return block<R, P>(t, r, panel, row_out);
    if constexpr (P < E::kPanels[R]) by_panels<R, P + 1>(panels, t, r, panel, row_out);
  }
  template <int R, int P, class Out>
  static void block(const Tile<D, X>& t, int64_t first, int64_t panel, Out& row_out) {
    Lanes out[R][P];
    E::template micro<R, P>(t, t.x + first * t.x_stride, t.weight + panel * t.panel_elements, out);
    for (int p = 0; p < P; p++) {
      const int64_t column = (panel + p) * 16, columns = t.n - column;
      Lanes bias = lanes_zero();
      if (t.bias) bias = load_columns<D>(t.bias + column, columns);
      for (int r = 0; r < R; r++) {
        Lanes sum = t.bias ? lanes_add(out[r][p], bias) : out[r][p];
        store_columns<D>(row_out(first + r) + column, sum, columns);
      }
    }
  }
};

}  // namespace llmc
