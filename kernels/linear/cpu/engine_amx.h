// The engine on AMX tiles: bf16, 16 rows by 16 columns by 32 depths per instruction.
//
// Order of one output: TDPBF16PS over depth in steps of 32; inside one the hardware's own order (even and odd depths apart, pair by
// pair). One row alone runs through the same instruction with a one-row tile, so decode and prefill get the same bits.
// The instruction rounds to nearest, treats denormal inputs as zero and flushes denormal results, whatever MXCSR says.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "engine_fma.h"

namespace llmc {

bool amx_permission();  // asks the kernel once per process

struct AmxEngine {
  using X = uint16_t;
  static constexpr int64_t kDepthMultiple = 32;
  static constexpr int64_t kBlockBytes = 1 << 20;
  static constexpr bool kTakesRawRows = true;

  // Tiles 0..3 accumulate, 4..5 hold rows of x, 6..7 panels (small: 4 rows of x, 5..7 panels).
  static void enter(int64_t num_rows) {
    struct alignas(64) Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    const uint8_t rows = num_rows < 16 ? (uint8_t)num_rows : 16;
    const bool small = num_rows <= 16;
    for (int i = 0; i < 8; i++) {
      config.row_bytes[i] = 64;
      config.rows[i] = (i < 4 || i == 4 || (i == 5 && !small)) ? rows : 16;
    }
    asm volatile("" ::"r"(&config) : "memory");  // the intrinsic declares eight bytes of it as read
    _tile_loadconfig(&config);
  }
  static void leave() { _tile_release(); }
  static void prepare(X* out, const uint16_t* row, int64_t k, int64_t depth) {
    memcpy(out, row, k * sizeof(X));
    memset(out + k, 0, (depth - k) * sizeof(X));
  }
};

struct AmxDriver {
  using X = uint16_t;
  static constexpr int64_t kTileElements = 16 * 32;  // 1 KiB of a panel, depth 32

  template <class Out>
  static void run(const Tile<BF16, X>& t, int64_t panel, int64_t panel_end, Out&& row_out) {
    asm volatile("" ::: "memory");  // tile loads do not declare what they read
    if (t.num_rows <= 16) {
      for (; panel + 4 <= panel_end; panel += 4) few_rows<4>(t, panel, panel_end, row_out);
      if (panel + 2 <= panel_end) {
        few_rows<2>(t, panel, panel_end, row_out);
        panel += 2;
      }
      if (panel < panel_end) few_rows<1>(t, panel, panel_end, row_out);
      return;
    }
    for (; panel + 2 <= panel_end; panel += 2) many_rows<2>(t, panel, row_out);
    if (panel < panel_end) many_rows<1>(t, panel, row_out);
  }

 private:
  // At most 16 rows: the panels stream past once, four at a time to hide the instruction's latency.
  template <int P, class Out>
  static void few_rows(const Tile<BF16, X>& t, int64_t panel, int64_t panel_end, Out& row_out) {
    const int64_t steps = t.panel_elements / kTileElements, a_bytes = t.x_stride * sizeof(X);
    const uint16_t* w = t.weight + panel * t.panel_elements;
    const X* x = t.x;
    _tile_zero(0);
    if constexpr (P > 1) _tile_zero(1);
    if constexpr (P > 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    // Prefetch this many steps ahead; past the end of a panel it goes on in the panel that its stream visits next.
    constexpr int64_t kAhead = 4;
    const bool more = panel + 2 * P <= panel_end;
    for (int64_t s = 0; s < steps; s++) {
      const int64_t ahead = s + kAhead < steps ? s + kAhead : s + kAhead - steps + (more ? P * steps : steps - kAhead);
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
    _tile_stored(0, c[0], 64);
    if constexpr (P > 1) _tile_stored(1, c[1], 64);
    if constexpr (P > 2) {
      _tile_stored(2, c[2], 64);
      _tile_stored(3, c[3], 64);
    }
    for (int p = 0; p < P; p++) finish(t, c[p], 0, t.num_rows, panel + p, row_out);
  }

  static void fetch(const char* p) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm_prefetch(p + i * 64, _MM_HINT_T1);
  }

  // More than 16 rows: two tiles of rows against P panels; the panels stay in L2 while all rows pass.
  template <int P, class Out>
  static void many_rows(const Tile<BF16, X>& t, int64_t panel, Out& row_out) {
    const int64_t steps = t.panel_elements / kTileElements, a_bytes = t.x_stride * sizeof(X);
    const uint16_t* w = t.weight + panel * t.panel_elements;
    alignas(64) float c[4][16][16];
    for (int64_t r = 0; r < t.num_rows; r += 32) {
      const X *x0 = t.x + r * t.x_stride, *x1 = x0 + 16 * t.x_stride;
      const bool two = t.num_rows - r > 16;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (two) {
        for (int64_t s = 0; s < steps; s++) {
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
        }
      } else {
        for (int64_t s = 0; s < steps; s++) {
          _tile_loadd(4, x0 + s * 32, a_bytes);
          _tile_loadd(6, w + s * kTileElements, 64);
          _tile_dpbf16ps(0, 4, 6);
          if constexpr (P > 1) {
            _tile_loadd(7, w + t.panel_elements + s * kTileElements, 64);
            _tile_dpbf16ps(2, 4, 7);
          }
        }
      }
      _tile_stored(0, c[0], 64);
      if constexpr (P > 1) _tile_stored(2, c[2], 64);
      if (two) {
        _tile_stored(1, c[1], 64);
        if constexpr (P > 1) _tile_stored(3, c[3], 64);
      }
      const int64_t rows0 = t.num_rows - r < 16 ? t.num_rows - r : 16, rows1 = t.num_rows - r - 16 < 16 ? t.num_rows - r - 16 : 16;
      for (int p = 0; p < P; p++) {
        finish(t, c[2 * p], r, rows0, panel + p, row_out);
        if (two) finish(t, c[2 * p + 1], r + 16, rows1, panel + p, row_out);
      }
    }
  }

  template <class Out>
  static void finish(const Tile<BF16, X>& t, const float (*c)[16], int64_t first, int64_t rows, int64_t panel, Out& row_out) {
    const int64_t column = panel * 16, columns = t.n - column;
    Lanes bias = lanes_zero();
    if (t.bias) bias = load_columns<BF16>(t.bias + column, columns);
    for (int64_t r = 0; r < rows; r++) {
      Lanes sum = lanes_load(c[r]);
      if (t.bias) sum = lanes_add(sum, bias);
      store_columns<BF16>(row_out(first + r) + column, sum, columns);
    }
  }
};

}  // namespace llmc

#endif
