// Layer norm of rows in training, and its gradients.
#pragma once

#include "threads.h"

namespace {

// Layer norm of rows of c values. Statistics of a row: mean and inverse deviation.
template <class T>
void norm_rows(const void* x, const void* weight, const void* bias, void* out, float* statistics,
               float eps, long rows, long c, long threads) {
  const T *scale = static_cast<const T*>(weight), *shift = static_cast<const T*>(bias);
  for_rows(rows, c, threads, [&](long first, long count) {
    for (long i = first; i < first + count; i++) {
      const T* from = static_cast<const T*>(x) + i * c;
      T* to = static_cast<T*>(out) + i * c;
      vec total{}, squares{};
      for_vectors(c, [&](long j, long n) { total += load(from + j, n); });
      vec mean = splat(sum(total) / c);
      for_vectors(c, [&](long j, long n) {
        vec d = first_lanes(load(from + j, n) - mean, n);
        squares += d * d;
      });
      vec inverse = splat(1 / std::sqrt(sum(squares) / c + eps));
      for_vectors(c, [&](long j, long n) {
        vec y = (load(from + j, n) - mean) * inverse;
        store(to + j, y * load(scale + j, n) + load(shift + j, n), n);
      });
      statistics[2 * i] = mean[0], statistics[2 * i + 1] = inverse[0];
    }
  });
}

// Gradients of that by x, to which `residual` is added if there is one, and, summed over the rows, by
// weight and bias.
template <class T>
void norm_backward(const void* gradient, const void* x, const void* weight, const float* statistics,
                   const void* residual, void* grad_x, float* grad_weight, float* grad_bias, long rows, long c, long threads) {
  const T* scale = static_cast<const T*>(weight);
  long pitch = up(c, 16);  // whole registers are added
  float* both = allocate(2 * pitch);
  column_sums(rows, 2 * pitch, both, threads, [&](long first, long count, float* sums) {
    for (long i = first; i < first + count; i++) {
      const T* from = static_cast<const T*>(x) + i * c;
      const T* by = static_cast<const T*>(gradient) + i * c;
      const T* more = residual ? static_cast<const T*>(residual) + i * c : nullptr;
      T* to = static_cast<T*>(grad_x) + i * c;
      vec mean = splat(statistics[2 * i]), inverse = splat(statistics[2 * i + 1]);
      vec total{}, product{};
      for_vectors(c, [&](long j, long n) {
        vec y = (load(from + j, n) - mean) * inverse, g = load(by + j, n);
        store(sums + j, load(sums + j) + g * y);
        store(sums + pitch + j, load(sums + pitch + j) + g);
        g *= load(scale + j, n);
        total += g, product += g * y;
      });
      vec shift = splat(sum(total) / c), slope = splat(sum(product) / c);
      for_vectors(c, [&](long j, long n) {
        vec y = (load(from + j, n) - mean) * inverse;
        vec g = load(by + j, n) * load(scale + j, n);
        vec result = (g - shift - y * slope) * inverse;
        store(to + j, more ? result + load(more + j, n) : result, n);
      });
    }
  });
  std::memcpy(grad_weight, both, c * sizeof(float));
  std::memcpy(grad_bias, both + pitch, c * sizeof(float));
  std::free(both);
}

}  // namespace
