// Quantised weights against at most 16 rows on AMX: each tile is dequantised into L1 just before its product, so that memory is read
// once and at the size of the integers. The tiles hold the same values, and the products come in the same order, as in AmxDriver.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "dequantize.h"
#include "engine_amx.h"

namespace llmc {

// Where the panels of a quantised weight lie.
struct QuantizedPanels {
  const uint8_t* weight;   // the first panel
  const uint16_t* scales;  // its scales
  int64_t panel_bytes, groups, group;
};

template <int Bits>
struct AmxQuantizedDriver {
  static constexpr int64_t kTileBytes = 16 * 32 * Bits / 8;

  template <class Out>
  static void run(const Tile<BF16, uint16_t>& t, const QuantizedPanels& q, int64_t panel, int64_t panel_end, Out&& row_out) {
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

  static const uint16_t* scales_at(const QuantizedPanels& q, int64_t panel, int64_t step) {
    return q.scales + (panel * q.groups + step * 32 / q.group) * 16;
  }

  template <int P>
  static void dequantize_step(const QuantizedPanels& q, int64_t panel, int64_t step, int64_t ahead, TileValues* out) {
    for (int p = 0; p < P; p++) {
      const uint8_t* weight = q.weight + (panel + p) * q.panel_bytes;
      _mm_prefetch((const char*)scales_at(q, panel + p, ahead), _MM_HINT_T0);  // without it a fifth of the time is lost
#pragma GCC unroll 8
      for (int64_t i = 0; i < kTileBytes; i += 64) _mm_prefetch((const char*)weight + ahead * kTileBytes + i, _MM_HINT_T0);
      dequantize_tile<Bits>(weight + step * kTileBytes, BF16::load16(scales_at(q, panel + p, step)), out[p]);
    }
  }

  template <int P, class Out>
  static void few_rows(const Tile<BF16, uint16_t>& t, const QuantizedPanels& q, int64_t panel, int64_t panel_end, Out& row_out) {
    const int64_t steps = t.panel_elements / AmxDriver::kTileElements, a_bytes = t.x_stride * sizeof(uint16_t);
    _tile_zero(0);
    if constexpr (P > 1) _tile_zero(1);
    if constexpr (P > 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    // 2 KiB ahead in each stream; past the end of a panel it goes on in the panel that its stream visits next.
    constexpr int64_t kAhead = 2048 / kTileBytes;
    const bool more = panel + 2 * P <= panel_end;
    const auto ahead = [&](int64_t s) { return s + kAhead < steps ? s + kAhead : (more ? (P - 1) * steps + s + kAhead : s); };
    alignas(64) TileValues tiles[2][P];
    dequantize_step<P>(q, panel, 0, ahead(0), tiles[0]);
    for (int64_t s = 0; s < steps; s++) {
      if (s + 1 < steps) dequantize_step<P>(q, panel, s + 1, ahead(s + 1), tiles[(s + 1) & 1]);
      const TileValues* w = tiles[s & 1];
      asm volatile("" ::: "memory");  // the stores above come before the loads below
      _tile_loadd(4, t.x + s * 32, a_bytes);
      _tile_loadd(5, w[0], 64);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (P > 1) {
        _tile_loadd(6, w[1], 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (P > 2) {
        _tile_loadd(7, w[2], 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, w[3], 64);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    alignas(64) float c[P][16][16];
    _tile_stored(0, c[0], 64);
    if constexpr (P > 1) _tile_stored(1, c[1], 64);
    if constexpr (P > 2) {
      _tile_stored(2, c[2], 64);
      _tile_stored(3, c[3], 64);
    }
    for (int p = 0; p < P; p++)
      for (int64_t r = 0; r < t.num_rows; r++) AmxDriver::write_row(t, c[p][r], panel + p, row_out(r));
  }
};

}  // namespace llmc

#endif
