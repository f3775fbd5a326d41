// The engine on AMX tiles: bf16, 16 rows by 16 columns by 32 depths per instruction.
//
// Order of one output: TDPBF16PS over depth in steps of 32; inside one the hardware's own order (even and odd depths apart, pair by
// pair). One row alone runs through the same instruction with a one-row tile, so decode and prefill get the same bits.
// The instruction rounds to nearest, treats denormal inputs as zero and flushes denormal results, whatever MXCSR says.
#pragma once

#include "amx.h"

#if LLMC_AMX

#include <type_traits>

#include "engine_fma.h"

namespace llmc {

struct AmxEngine {
  using X = uint16_t;
  static constexpr int64_t kDepthMultiple = 32;
  static constexpr int64_t kBlockBytes = 1 << 20;
  static constexpr bool kTakesRawRows = true;

  // Tiles 0..3 accumulate, 4..5 hold rows of x, 6..7 panels (small: 4 rows of x, 5..7 panels).
  static unsigned enter(int64_t num_rows) {
    const uint8_t rows = num_rows < 16 ? (uint8_t)num_rows : 16, second = num_rows <= 16 ? 16 : rows;
    configure_tiles({rows, rows, rows, rows, rows, second, 16, 16});
    return 0;
  }
  static void leave(unsigned) { _tile_release(); }
  static void prepare(X* out, const uint16_t* row, int64_t k, int64_t depth) {
    memcpy(out, row, k * sizeof(X));
    memset(out + k, 0, (depth - k) * sizeof(X));
  }
};

// The first P accumulators (1, 2 or 4) set to zero, and stored.
template <int P>
inline void zero_tiles() {
  _tile_zero(0);
  if constexpr (P > 1) _tile_zero(1);
  if constexpr (P > 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <int P>
inline void store_tiles(float (*c)[16][16]) {
  _tile_stored(0, c[0], 64);
  if constexpr (P > 1) _tile_stored(1, c[1], 64);
  if constexpr (P > 2) {
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
  }
}

// Panels four at a time while there are four, then two and one: f(their number as a constant, the first of them).
template <class F>
inline void by_fours(int64_t panel, int64_t panel_end, F&& f) {
  for (; panel + 4 <= panel_end; panel += 4) f(std::integral_constant<int, 4>(), panel);
  if (panel + 2 <= panel_end) {
    f(std::integral_constant<int, 2>(), panel);
    panel += 2;
  }
  if (panel < panel_end) f(std::integral_constant<int, 1>(), panel);
}

// At most 16 rows of x by P tiles of weights that were stored just before, added to the accumulators: one step of depth 32.
template <int P>
inline void multiply_tiles(const uint16_t* x, int64_t row_bytes, const uint16_t (*w)[16 * 32]) {
  asm volatile("" ::: "memory");  // the stores before come before the loads below
  _tile_loadd(4, x, row_bytes);
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

struct AmxDriver {
  static constexpr bool kQuantized = false;
  using X = uint16_t;
  static constexpr int64_t kTileElements = 16 * 32;  // 1 KiB of a panel, depth 32

  template <class Out>
  static void run(const Tile<BF16, X>& t, int64_t panel, int64_t panel_end, Out&& row_out) {
    asm volatile("" ::: "memory");  // tile loads do not declare what they read
    if (t.num_rows <= 16) {
      by_fours(panel, panel_end, [&](auto count, int64_t first) { few_rows<count()>(t, first, panel_end, row_out); });
      return;
    }
    alignas(64) Block blocks[2];
    Pending pending;
    for (; panel + 2 <= panel_end; panel += 2) many_rows<2>(t, panel, panel_end, blocks, pending, row_out);
    if (panel < panel_end) many_rows<1>(t, panel, panel_end, blocks, pending, row_out);
    while (pending.next < pending.rows) pending.finish_row(t, row_out);
  }

  static void write_row(const Tile<BF16, X>& t, const float* sums, int64_t panel, uint16_t* y) {
    const int64_t column = panel * 16, columns = t.n - column;
    Lanes sum = lanes_load(sums);
    if (t.bias) sum = lanes_add(sum, load_columns<BF16>(t.bias + column, columns));
    store_columns<BF16>(y + column, sum, columns);
  }

 private:
  using Block = float[4][16][16];  // [2 * panel + tile of rows][row][column]

  // A finished block of 32 rows whose sums still wait to be rounded and written. That is done row by row between the tile products
  // of the next block: at once, the stores to so many distant rows would hold the products up (35 % of the time at K = 1024).
  struct Pending {
    const Block* block = nullptr;
    int64_t first = 0, rows = 0, next = 0, panel = 0, num_panels = 0;

    template <class Out>
    void finish_row(const Tile<BF16, X>& t, Out& row_out) {
      const int64_t r = next++;
      uint16_t* y = row_out(first + r);
      const float *low = (*block)[r / 16][r % 16], *high = (*block)[2 + r / 16][r % 16];
      const int64_t column = panel * 16;
      if (!t.bias && num_panels == 2 && t.n - column >= 32) {  // the common case: one whole cache line
        _mm512_storeu_si512(y + column, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(high), _mm512_load_ps(low)));
        return;
      }
      for (int64_t p = 0; p < num_panels; p++) write_row(t, p ? high : low, panel + p, y);
    }
  };

  // At most 16 rows: the panels stream past once, four at a time to hide the instruction's latency.
  template <int P, class Out>
  static void few_rows(const Tile<BF16, X>& t, int64_t panel, int64_t panel_end, Out& row_out) {
    const int64_t steps = t.panel_elements / kTileElements, a_bytes = t.x_stride * sizeof(X);
    const uint16_t* w = t.weight + panel * t.panel_elements;
    const X* x = t.x;
    zero_tiles<P>();
    // 4 KiB ahead over all streams; past the end of a panel it goes on in the panel that its stream visits next.
    constexpr int64_t kAhead = 4 / P;
    const bool more = panel + 2 * P <= panel_end;
    for (int64_t s = 0; s < steps; s++) {
      const int64_t ahead = s + kAhead < steps ? s + kAhead : (more ? P * steps + s + kAhead - steps : s);
      const uint16_t* at = w + s * kTileElements;
      const char* next = (const char*)(w + ahead * kTileElements);
      _tile_loadd(4, x + s * 32, a_bytes);
      fetch(next);
      _tile_loadd(5, at, 64);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (P > 1) {
        fetch(next + t.panel_elements * 2);
        _tile_loadd(6, at + t.panel_elements, 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (P > 2) {
        fetch(next + t.panel_elements * 4);
        _tile_loadd(7, at + t.panel_elements * 2, 64);
        _tile_dpbf16ps(2, 4, 7);
        fetch(next + t.panel_elements * 6);
        _tile_loadd(5, at + t.panel_elements * 3, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    alignas(64) float c[P][16][16];
    store_tiles<P>(c);
    for (int p = 0; p < P; p++)
      for (int64_t r = 0; r < t.num_rows; r++) write_row(t, c[p][r], panel + p, row_out(r));
  }

  static void fetch(const char* p) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm_prefetch(p + i * 64, _MM_HINT_T0);
  }

  // More than 16 rows: two tiles of rows against P panels; the panels stay in L2 while all rows pass.
  template <int P, class Out>
  static void many_rows(const Tile<BF16, X>& t, int64_t panel, int64_t panel_end, Block* blocks, Pending& pending, Out& row_out) {
    const int64_t steps = t.panel_elements / kTileElements, a_bytes = t.x_stride * sizeof(X), num_blocks = (t.num_rows + 31) / 32;
    const uint16_t* w = t.weight + panel * t.panel_elements;
    const int64_t rows_per_step = (32 + steps - 1) / steps;
    // The next panels are brought into L2 meanwhile, spread over all steps.
    const int64_t lines_per_step = (P * 16 + num_blocks - 1) / num_blocks;
    const char* next = (const char*)(w + P * t.panel_elements);
    const char* const next_end = next + (panel_end - panel - P) * t.panel_elements * sizeof(X);
    for (int64_t b = 0; b < num_blocks; b++) {
      const X *x0 = t.x + b * 32 * t.x_stride, *x1 = x0 + 16 * t.x_stride;
      const int64_t rows = t.num_rows - b * 32 < 32 ? t.num_rows - b * 32 : 32;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t s = 0; s < steps; s++) {
        for (int64_t i = 0; i < lines_per_step && next < next_end; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        _tile_loadd(4, x0 + s * 32, a_bytes);
        _tile_loadd(6, w + s * kTileElements, 64);
        _tile_loadd(5, x1 + s * 32, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (P > 1) {
          _tile_loadd(7, w + t.panel_elements + s * kTileElements, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
        for (int64_t i = 0; i < rows_per_step && pending.next < pending.rows; i++) pending.finish_row(t, row_out);
      }
      Block& block = blocks[pending.block == &blocks[0] ? 1 : 0];
      _tile_stored(0, block[0], 64);
      _tile_stored(1, block[1], 64);
      if constexpr (P > 1) {
        _tile_stored(2, block[2], 64);
        _tile_stored(3, block[3], 64);
      }
      pending.block = &block;
      pending.first = b * 32;
      pending.rows = rows;
      pending.next = 0;
      pending.panel = panel;
      pending.num_panels = P;
    }
  }
};

}  // namespace llmc

#endif
