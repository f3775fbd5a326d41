// Weights of 8 bits on AMX tiles: integer times scale, rounded once to bf16, in the order of AmxDriver: the bits of `linear` on that
// matrix. For at most 16 rows each tile is made in L1 just before its product, so that memory is read once and at the size of the
// integers; for more rows some panels at once.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "engine_amx.h"
#include "quants.h"

namespace llmc {

struct AmxDequantizedDriver {
  static constexpr bool kQuantized = true;
  static constexpr int64_t kTileBytes = 16 * 32;

  static int64_t scratch_bytes(const Tile<BF16, uint16_t>& t, const QuantizedPanels<BF16>&) {
    return t.num_rows <= 16 ? 0 : held_panels(t) * t.panel_elements * (int64_t)sizeof(uint16_t);
  }

  template <class Out>
  static void run(Tile<BF16, uint16_t> t, const QuantizedPanels<BF16>& q, void* scratch, int64_t panel, int64_t panel_end, Out&& row_out) {
    if (t.num_rows > 16) return by_panels(t, q, static_cast<TileValues*>(scratch), panel, panel_end, row_out);
    asm volatile("" ::: "memory");  // tile loads do not declare what they read
    for (; panel + 4 <= panel_end; panel += 4) few_rows<4>(t, q, panel, panel_end, row_out);
    if (panel + 2 <= panel_end) {
      few_rows<2>(t, q, panel, panel_end, row_out);
      panel += 2;
    }
    if (panel < panel_end) few_rows<1>(t, q, panel, panel_end, row_out);
  }

 private:
  using TileValues = uint16_t[16 * 32];

  // Panels held at once; with their rows they stay in L2.
  static int64_t held_panels(const Tile<BF16, uint16_t>& t) {
    return std::max<int64_t>(4, (256 << 10) / (t.panel_elements * (int64_t)sizeof(uint16_t)) / 4 * 4);
  }

  // Sixteen columns by two depths: the product of an integer and a scale has 16 bits, exact in fp32, so that it is rounded once.
  static void dequantize_tile(const uint8_t* tile, const uint16_t* scales, uint16_t* out) {
    const __m512 by_column = BF16::load16(scales).v;
    const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512 low_scale = _mm512_permutexvar_ps(first, by_column);
    const __m512 high_scale = _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(8)), by_column);
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
      const PairProduct<8> pair(tile + j * 32);
      const __m512 low = _mm512_mul_ps(pair.low.v, low_scale), high = _mm512_mul_ps(pair.high.v, high_scale);
      _mm512_storeu_si512(out + j * 32, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }

  template <class Out>
  static void by_panels(Tile<BF16, uint16_t> t, const QuantizedPanels<BF16>& q, TileValues* held, int64_t panel, int64_t panel_end,
                        Out& row_out) {
    const int64_t steps = t.panel_elements / AmxDriver::kTileElements, at_once = held_panels(t);
    for (; panel < panel_end; panel += at_once) {
      const int64_t end = std::min(panel + at_once, panel_end);
      for (int64_t p = panel; p < end; p++)
        for (int64_t s = 0; s < steps; s++) {
          const uint8_t* tile = q.weight + p * q.panel_bytes + s * kTileBytes;
#pragma GCC unroll 8
          for (int64_t i = 0; i < kTileBytes; i += 64) _mm_prefetch((const char*)tile + 2048 + i, _MM_HINT_T0);
          dequantize_tile(tile, q.scales_at(p, s), held[(p - panel) * steps + s]);
        }
      t.weight = held[0] - panel * t.panel_elements;  // the driver counts panels from the weight's first
      AmxDriver::run(t, panel, end, row_out);
    }
  }

  template <int P>
  static void dequantize_step(const QuantizedPanels<BF16>& q, int64_t panel, int64_t step, int64_t ahead, TileValues* out) {
    for (int p = 0; p < P; p++) {
      const uint8_t* weight = q.weight + (panel + p) * q.panel_bytes;
      _mm_prefetch((const char*)q.scales_at(panel + p, ahead), _MM_HINT_T0);  // without it a fifth of the time is lost
#pragma GCC unroll 8
      for (int64_t i = 0; i < kTileBytes; i += 64) _mm_prefetch((const char*)weight + ahead * kTileBytes + i, _MM_HINT_T0);
      dequantize_tile(weight + step * kTileBytes, q.scales_at(panel + p, step), out[p]);
    }
  }

  template <int P, class Out>
  static void few_rows(const Tile<BF16, uint16_t>& t, const QuantizedPanels<BF16>& q, int64_t panel, int64_t panel_end, Out& row_out) {
    const int64_t steps = t.panel_elements / AmxDriver::kTileElements, a_bytes = t.x_stride * sizeof(uint16_t);
    zero_tiles<P>();
    // 2 KiB ahead in each stream; past the end of a panel it goes on in the panel that its stream visits next.
    constexpr int64_t kAhead = 2048 / kTileBytes;
    const bool more = panel + 2 * P <= panel_end;
    const auto ahead = [&](int64_t s) { return s + kAhead < steps ? s + kAhead : (more ? (P - 1) * steps + s + kAhead : s); };
    alignas(64) TileValues tiles[2][P];
    dequantize_step<P>(q, panel, 0, ahead(0), tiles[0]);
    for (int64_t s = 0; s < steps; s++) {
      if (s + 1 < steps) dequantize_step<P>(q, panel, s + 1, ahead(s + 1), tiles[(s + 1) & 1]);
      multiply_tiles<P>(t.x + s * 32, a_bytes, tiles[s & 1]);
    }
    alignas(64) float c[P][16][16];
    store_tiles<P>(c);
    for (int p = 0; p < P; p++)
      for (int64_t r = 0; r < t.num_rows; r++) AmxDriver::write_row(t, c[p][r], panel + p, row_out(r));
  }
};

}  // namespace llmc

#endif
