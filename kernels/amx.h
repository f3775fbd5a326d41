// Asking Linux for the tile registers, and setting them up.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define LLMC_AMX 1

#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace llmc {

// Whether this process may use tiles; the kernel is asked once.
inline bool amx_permission() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return granted;
}

// Eight tiles of 64 bytes a row; tile i has rows[i] of them.
inline void configure_tiles(const uint8_t (&rows)[8]) {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = rows[i];
  }
  asm volatile("" ::"r"(&config) : "memory");  // the intrinsic declares eight bytes of it as read
  _tile_loadconfig(&config);
}

}  // namespace llmc

#endif
