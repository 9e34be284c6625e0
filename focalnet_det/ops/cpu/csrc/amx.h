// Matrix products in bfloat16 by the tile registers of AMX.
#pragma once

#include "bfloat16.h"

#if HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if HAS_TILES
// Rows reach to the next multiple of 32, k is one, panels are [k / 32][2][OPERAND]. Needs TileRegisters.
template <class Done>
inline void multiply(const uint16_t* a, long pitch, long rows, const uint16_t* panels, long panel,
                     long k, long n, const Done& done) {
  alignas(64) float sums[32 * PANEL];
  long bytes = pitch * sizeof(uint16_t);
  for (long j = 0; j < n; j += PANEL, panels += panel)
    for (long i = 0; i < rows; i += 32) {
      const uint16_t *left = a + i * pitch, *below = left + 16 * pitch, *right = panels;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (long p = 0; p < k; p += 32, right += 2 * OPERAND) {
        _tile_loadd(4, left + p, bytes);
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + OPERAND, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below + p, bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, PANEL * 4);
      _tile_stored(1, sums + 16, PANEL * 4);
      _tile_stored(2, sums + 16 * PANEL, PANEL * 4);
      _tile_stored(3, sums + 16 * PANEL + 16, PANEL * 4);
      for (long r = 0; r < least(32, rows - i); r++) {
        done(i + r, j, load(sums + r * PANEL));
        done(i + r, j + V, load(sums + r * PANEL + V));
      }
    }
}

// All eight as 16 rows of 64 bytes, while this lives.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() { _tile_release(); }
};

// Linux hands the registers out to processes that ask.
bool may_use_tiles() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  static const bool granted = !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
  return granted;
}
#endif

}  // namespace
