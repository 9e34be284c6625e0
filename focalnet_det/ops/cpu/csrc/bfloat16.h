// Matrix products in bfloat16, sums in float32. A left operand is rows of values of k; a right one is 16
// pairs of values of k, each of 16 columns, as tile registers and dot products of pairs take it.
#pragma once

#include "vectors.h"

namespace {

#if HAS_BFLOAT16
constexpr long OPERAND = 16 * 32;  // values of one

// A right operand: 16 columns of the product are rows of a weight (n, k) from there on. Values beyond
// it are zero.
inline void pack_operand(const uint16_t* weight, long n, long k, long row, long column,
                         uint16_t* out) {
  __m512i r[16];
  long count = k - column;
  __mmask32 inside = count >= 32 ? ~0u : (1u << count) - 1;
  UNROLL
  for (int i = 0; i < 16; i++)
    r[i] = row + i < n ? _mm512_maskz_loadu_epi16(inside, weight + (row + i) * k + column)
                       : _mm512_setzero_si512();
  transpose(r);
  UNROLL
  for (int i = 0; i < 16; i++) _mm512_store_si512(out + 32 * i, r[i]);
}
#endif

#if HAS_BFLOAT16 && !HAS_TILES
// Rows reach to the next multiple of ROWS, k to one of 32; panels are [k / 32][2][OPERAND].
template <class Done>
inline void multiply(const uint16_t* a, long pitch, long rows, const uint16_t* panels, long panel,
                     long k, long n, const Done& done) {
  for (long j = 0; j < n; j += PANEL, panels += panel)
    for (long i = 0; i < rows; i += ROWS) {
      __m512 sums[ROWS][2] = {};
      const uint16_t *left = a + i * pitch, *right = panels;
      for (long p = 0; p < k; p += 32, right += OPERAND)
        for (long pair = p; pair < p + 32; pair += 2, right += 32) {
          __m512bh first = (__m512bh)_mm512_loadu_si512(right);
          __m512bh second = (__m512bh)_mm512_loadu_si512(right + OPERAND);
          UNROLL
          for (int r = 0; r < ROWS; r++) {
            int32_t both;
            std::memcpy(&both, left + r * pitch + pair, sizeof both);
            __m512bh factor = (__m512bh)_mm512_set1_epi32(both);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], factor, first);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], factor, second);
          }
        }
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        if (i + r >= rows) break;
        done(i + r, j, (vec)sums[r][0]);
        done(i + r, j + V, (vec)sums[r][1]);
      }
    }
}
#endif

}  // namespace
