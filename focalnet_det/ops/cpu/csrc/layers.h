// Layers of a block in inference, with weights packed into the order of the products.
#pragma once

#include "amx.h"
#include "tiles.h"

namespace {

// Of the operands of matrix products: rows that their memory is a multiple of, and what k is.
template <class T>
constexpr long GRAIN = sizeof(T) == sizeof(float) || !HAS_TILES ? ROWS : 32;
template <class T>
constexpr long STEP = sizeof(T) == sizeof(float) ? 1 : 32;

template <class T>
struct Linear {  // weight (n, k), bias (n), packed
  const T* weight;
  const float* bias;
  long n, k;
  T* panels = nullptr;
  float* biases = nullptr;
  long depth() const { return up(k, STEP<T>); }
  long floats() const { return up(n, PANEL) * (depth() * sizeof(T) / sizeof(float) + 1); }
  float* place(float* memory) {
    biases = memory, panels = reinterpret_cast<T*>(memory + up(n, PANEL));
    return memory + floats();
  }
  void pack(long panel) const {
    T* out = panels + panel * depth() * PANEL;
    long first = panel * PANEL, count = least(PANEL, n - first);
#if HAS_BFLOAT16
    if constexpr (sizeof(T) == 2)
      for (long p = 0; p < depth(); p += 32, out += 2 * OPERAND) {
        pack_operand(weight, n, k, first, p, out);
        pack_operand(weight, n, k, first + 16, p, out + OPERAND);
      }
    else
#endif
      for (long begin = 0; begin < k; begin += 16)
        for (long column = 0; column < PANEL; column++) {
          const T* source = weight + (first + column) * k;
          for (long p = begin; p < least(begin + 16, k); p++)
            out[p * PANEL + column] = column < count ? source[p] : 0;
        }
    for (long column = 0; column < PANEL; column++)
      biases[first + column] = column < count ? bias[first + column] : 0.0f;
  }
};

struct Norm {  // null pointers: none
  const float *weight, *bias;
  float eps;
  // Rows of c values, `pitch` apart and zero from c to there; `out` may be `x`.
  template <class From, class To>
  void operator()(const From* x, long rows, long c, long pitch, To* out) const {
    for (long i = 0; i < rows; i++, x += pitch, out += pitch) {
      vec total{}, squares{};
      for (long j = 0; j < pitch; j += V) total += load(x + j);
      vec mean = splat(sum(total) / c);
      for (long j = 0; j < c; j += V) {
        vec d = load(x + j) - mean;
        if (j + V > c)
          for (long lane = c - j; lane < V; lane++) d[lane] = 0;
        squares += d * d;
      }
      vec scale = splat(1 / std::sqrt(sum(squares) / c + eps));
      for (long j = 0; j < c; j += V) {
        vec y = (load(x + j) - mean) * scale * load(weight + j, c - j) + load(bias + j, c - j);
        store(out + j, y);
      }
    }
  }
};

}  // namespace
