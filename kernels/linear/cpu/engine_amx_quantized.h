// Weights of 8 and 4 bits on AMX tiles: the integers of a tile, exact in bf16, are put into L1 just before their product, so that memory
// is read at the size of the integers. A tile product from zero is a step of quants.h; its sums leave the tile once per group. For many
// rows that takes as long as the product itself where a group is one step (32 depths), a quarter of it in groups of four.
#pragma once

#include "engine_amx.h"
#include "engine_quantized.h"

#if LLMC_AMX

namespace llmc {

struct AmxQuantizedEngine : AmxEngine {
  static unsigned enter(int64_t num_rows) {
    AmxEngine::enter(num_rows);
    return QuantizedEngine<BF16>::enter(num_rows);
  }
  static void leave(unsigned mode) {
    QuantizedEngine<BF16>::leave(mode);
    AmxEngine::leave(mode);
  }
};

template <int Bits>
struct AmxQuantizedDriver {
  static constexpr bool kQuantized = true;
  static constexpr int64_t kTileBytes = 16 * 32 * Bits / 8;

  // Two panels' tiles of a chunk, and the sums of all rows for them and for the two panels before.
  static int64_t scratch_bytes(const Tile<BF16, uint16_t>& t, const QuantizedPanels<BF16>& q) {
    return t.num_rows <= 16 ? 0 : 2 * chunk_steps(q) * (int64_t)sizeof(TileValues) + (t.num_rows + 31) / 32 * 2 * (int64_t)sizeof(Block);
  }

  template <class Out>
  static void run(const Tile<BF16, uint16_t>& t, const QuantizedPanels<BF16>& q, void* scratch, int64_t panel, int64_t panel_end,
                  Out&& row_out) {
    asm volatile("" ::: "memory");  // tile loads do not declare what they read
    if (t.num_rows > 16) {
      const int64_t num_blocks = (t.num_rows + 31) / 32;
      Block* sums = static_cast<Block*>(scratch);
      ManyRows many = {t, q, {sums, sums + num_blocks}, reinterpret_cast<TileValues*>(sums + 2 * num_blocks)};
      for (; panel + 2 <= panel_end; panel += 2) many.template run<2>(panel, row_out);
      if (panel < panel_end) many.template run<1>(panel, row_out);
      many.write_rows(t.num_rows, row_out);
      return;
    }
    by_fours(panel, panel_end, [&](auto count, int64_t first) { few_rows<count()>(t, q, first, panel_end, row_out); });
  }

 private:
  using TileValues = uint16_t[16 * 32];
  using Block = float[4][16][16];  // [2 * panel + tile of rows][row][column]

  // Steps whose tiles are held at once: whole groups, small enough for L1 unless a group is large.
  static int64_t chunk_steps(const QuantizedPanels<BF16>& q) { return (8 + q.group_steps - 1) / q.group_steps * q.group_steps; }

  static void add_scaled(Lanes scale, const float* group, float* sum) {
    lanes_store(sum, lanes_scaled(scale, lanes_load(group), lanes_load(sum)));
  }

  template <int P>
  static void widen_step(const QuantizedPanels<BF16>& q, int64_t panel, int64_t step, int64_t ahead, TileValues* out) {
    for (int p = 0; p < P; p++) {
      const uint8_t* weight = q.weight + (panel + p) * q.panel_bytes;
      _mm_prefetch((const char*)q.scales_at(panel + p, ahead), _MM_HINT_T0);  // without it a fifth of the time is lost
#pragma GCC unroll 8
      for (int64_t i = 0; i < kTileBytes; i += 64) _mm_prefetch((const char*)weight + ahead * kTileBytes + i, _MM_HINT_T0);
      widen_tile<Bits>(weight + step * kTileBytes, out[p]);
    }
  }

  // At most 16 rows: the panels stream past once, four at a time to hide the instruction's latency.
  template <int P, class Out>
  static void few_rows(const Tile<BF16, uint16_t>& t, const QuantizedPanels<BF16>& q, int64_t panel, int64_t panel_end, Out& row_out) {
    const int64_t steps = t.panel_elements / AmxDriver::kTileElements, a_bytes = t.x_stride * sizeof(uint16_t);
    // 2 KiB ahead in each stream; past the end of a panel it goes on in the panel that its stream visits next.
    constexpr int64_t kAhead = 2048 / kTileBytes;
    const bool more = panel + 2 * P <= panel_end;
    const auto ahead = [&](int64_t s) { return s + kAhead < steps ? s + kAhead : (more ? (P - 1) * steps + s + kAhead : s); };
    alignas(64) TileValues tiles[2][P];
    alignas(64) float sums[P][16][16], c[2][P][16][16];
    for (int p = 0; p < P; p++)
      for (int64_t r = 0; r < t.num_rows; r++) lanes_store(sums[p][r], lanes_zero());
    widen_step<P>(q, panel, 0, ahead(0), tiles[0]);
    for (int64_t s = 0, g = 0; s < steps; g++) {
      zero_tiles<P>();
      for (const int64_t end = std::min(s + q.group_steps, steps); s < end; s++) {
        if (s + 1 < steps) widen_step<P>(q, panel, s + 1, ahead(s + 1), tiles[(s + 1) & 1]);
        multiply_tiles<P>(t.x + s * 32, a_bytes, tiles[s & 1]);
      }
      store_tiles<P>(c[g & 1]);
      asm volatile("" ::: "memory");
      for (int p = 0; p < P; p++) {
        const Lanes scale = BF16::load16(q.scales_at(panel + p, s - 1));
        for (int64_t r = 0; r < t.num_rows; r++) add_scaled(scale, c[g & 1][p][r], sums[p][r]);
      }
    }
    for (int p = 0; p < P; p++)
      for (int64_t r = 0; r < t.num_rows; r++) AmxDriver::write_row(t, sums[p][r], panel + p, row_out(r));
  }

  // More than 16 rows: a chunk of two panels is widened once and stays in L1 while all rows pass.
  struct ManyRows {
    const Tile<BF16, uint16_t>& t;
    const QuantizedPanels<BF16>& q;
    Block* sums[2];     // of the panels at work and of those before
    TileValues* tiles;  // [panel][step of the chunk]
    int64_t panel = 0;
    // Finished sums that still wait to be rounded and written: row by row between the products of the next panels, as AmxDriver does.
    int64_t written = 0, before = 0, num_before = 0;

    template <class Out>
    void write_rows(int64_t count, Out& row_out) {
      for (const int64_t end = std::min(written + count, t.num_rows); written < end; written++) {
        const float(*row)[16][16] = sums[1][written / 32] + written % 32 / 16;
        for (int64_t p = 0; p < num_before; p++) AmxDriver::write_row(t, row[2 * p][written % 16], before + p, row_out(written));
      }
    }

    template <int P, class Out>
    void run(int64_t first, Out& row_out) {
      panel = first;
      const int64_t steps = t.panel_elements / AmxDriver::kTileElements, num_blocks = (t.num_rows + 31) / 32, chunk = chunk_steps(q);
      const int64_t rows_per_block = (32 * chunk + steps - 1) / steps;  // of those before, written per block of this chunk
      memset(sums[0], 0, num_blocks * sizeof(Block));
      for (int64_t begin = 0; begin < steps; begin += chunk) {
        const int64_t end = std::min(begin + chunk, steps);
        for (int p = 0; p < P; p++)
          for (int64_t s = begin; s < end; s++) {
            const uint8_t* tile = q.weight + (panel + p) * q.panel_bytes + s * kTileBytes;
#pragma GCC unroll 8
            for (int64_t i = 0; i < kTileBytes; i += 64) _mm_prefetch((const char*)tile + P * chunk * kTileBytes + i, _MM_HINT_T0);
            widen_tile<Bits>(tile, tiles[p * chunk + s - begin]);
          }
        asm volatile("" ::: "memory");
        for (int64_t b = 0; b < num_blocks; b++) {
          if (q.group_steps == 1)
            for (int i = 0; i < 2 * P; i++) short_groups(b * 32 + i / P * 16, i % P, begin, end, sums[0][b][i % P * 2 + i / P]);
          else
            long_groups<P>(b * 32, begin, end, sums[0][b]);
          write_rows(rows_per_block, row_out);
        }
      }
      write_rows(t.num_rows, row_out);
      std::swap(sums[0], sums[1]);
      written = 0;
      before = panel;
      num_before = P;
    }

    // Sixteen rows by one panel, a group per step: the sums stay in registers. The products of four steps are stored while those of the
    // four before are added, since a load waits until the tile store that it reads from has reached the cache.
    void short_groups(int64_t row, int p, int64_t begin, int64_t end, float (*to)[16]) {
      const int64_t a_bytes = t.x_stride * sizeof(uint16_t);
      const uint16_t *x = t.x + row * t.x_stride + begin * 32, *scales = q.scales_at(panel + p, begin);
      const TileValues* w = tiles + p * chunk_steps(q);
      alignas(64) float c[2][4][16][16];
      __m512 sum[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++) sum[r] = _mm512_load_ps(to[r]);
      const auto add = [&](const uint16_t* scale, const float (*group)[16]) {
        const __m512 factor = BF16::load16(scale).v;
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) sum[r] = _mm512_fmadd_ps(factor, _mm512_load_ps(group[r]), sum[r]);
      };
      int64_t s = 0;
      const int64_t whole = (end - begin) / 4 * 4;
      for (; s < whole; s += 4) {
        zero_tiles<4>();
        _tile_loadd(4, x + s * 32, a_bytes);
        _tile_loadd(6, w[s], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, x + s * 32 + 32, a_bytes);
        _tile_loadd(7, w[s + 1], 64);
        _tile_dpbf16ps(1, 5, 7);
        _tile_loadd(4, x + s * 32 + 64, a_bytes);
        _tile_loadd(6, w[s + 2], 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, x + s * 32 + 96, a_bytes);
        _tile_loadd(7, w[s + 3], 64);
        _tile_dpbf16ps(3, 5, 7);
        asm volatile("" ::: "memory");
        if (s) {
          const auto* stored = c[(s / 4 + 1) % 2];
          const uint16_t* scale = scales + s * 16 - 64;
          add(scale, stored[0]);
          add(scale + 16, stored[1]);
          add(scale + 32, stored[2]);
          add(scale + 48, stored[3]);
        }
        store_tiles<4>(c[s / 4 % 2]);
        asm volatile("" ::: "memory");
      }
      for (int i = 0; s && i < 4; i++) add(scales + (s - 4 + i) * 16, c[(s / 4 + 1) % 2][i]);
      for (; s < end - begin; s++) {
        zero_tiles<1>();
        _tile_loadd(4, x + s * 32, a_bytes);
        _tile_loadd(6, w[s], 64);
        _tile_dpbf16ps(0, 4, 6);
        store_tiles<1>(c[0]);
        asm volatile("" ::: "memory");
        add(scales + s * 16, c[0][0]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++) _mm512_store_ps(to[r], sum[r]);
    }

    // 32 rows by P panels, groups of several steps.
    template <int P>
    void long_groups(int64_t row, int64_t begin, int64_t end, float (*to)[16][16]) {
      const int64_t a_bytes = t.x_stride * sizeof(uint16_t), chunk = chunk_steps(q);
      const uint16_t *x0 = t.x + row * t.x_stride, *x1 = x0 + 16 * t.x_stride;
      alignas(64) Block c[2];
      for (int64_t s = begin, g = 0; s < end; g++) {
        zero_tiles<2 * P>();
        for (const int64_t group_end = std::min(s + q.group_steps, end); s < group_end; s++) {
          _tile_loadd(4, x0 + s * 32, a_bytes);
          _tile_loadd(6, tiles[s - begin], 64);
          _tile_loadd(5, x1 + s * 32, a_bytes);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 5, 6);
          if constexpr (P > 1) {
            _tile_loadd(7, tiles[chunk + s - begin], 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
        store_tiles<2 * P>(c[g % 2]);
        asm volatile("" ::: "memory");
        for (int p = 0; p < P; p++) {
          const Lanes scale = BF16::load16(q.scales_at(panel + p, s - 1));
          for (int r = 0; r < 32; r++) add_scaled(scale, c[g % 2][2 * p][r], to[2 * p][r]);
        }
      }
    }
  };
};

}  // namespace llmc

#endif
