// Matrix products in float32 by register tiles, whose results go on before they are stored.
#pragma once

#include "vectors.h"

namespace {

// Matrix products: a of `rows` rows, whose memory reaches to the next multiple of ROWS, times
// weights (n, k) that lie as panels[n / PANEL][k][PANEL]. `done(row, column, sums)` takes the
// results, V columns at a time.
template <class Done>
inline void multiply(const float* a, long pitch, long rows, const float* panels, long panel, long k,
                     long n, const Done& done) {
  for (long j = 0; j < n; j += PANEL, panels += panel)
    for (long i = 0; i < rows; i += ROWS) {
      vec sums[ROWS][2] = {};
      const float* left = a + i * pitch;
      for (long p = 0; p < k; p++) {
        vec first = load(panels + p * PANEL), second = load(panels + p * PANEL + V);
        UNROLL
        for (int r = 0; r < ROWS; r++) {
          vec factor = splat(left[r * pitch + p]);
          sums[r][0] += factor * first;
          sums[r][1] += factor * second;
        }
      }
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        if (i + r >= rows) break;
        done(i + r, j, sums[r][0]);
        done(i + r, j + V, sums[r][1]);
      }
    }
}

}  // namespace
