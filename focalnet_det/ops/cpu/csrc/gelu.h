// GELU and its derivative.
#pragma once

#include "vectors.h"

namespace {

// erf(x / sqrt 2) as a quotient of polynomials in x^2, fitted on |x| < 5.6; error 4.5e-7.
inline vec error_function(vec x) {
  vec bound = splat(5.6f);
  vec z = x > bound ? bound : x < -bound ? -bound : x;
  vec t = z * z;
  vec p = t * 4.4291002865293194e-08f + 1.271301880478859e-05f;
  p = p * t + 0.000347695779055357f;
  p = p * t + 0.009414482861757278f;
  p = p * t + 0.06875166296958923f;
  p = p * t + 0.797884464263916f;
  vec q = t * 1.1802159178841976e-06f + 7.510100840590894e-05f;
  q = q * t + 0.0019129618303850293f;
  q = q * t + 0.028939926996827126f;
  q = q * t + 0.25283312797546387f;
  q = q * t + 1.0f;
  return z * p / q;
}


// exp(x) for x <= 0: 2^n times a polynomial on half a binary digit.
inline vec exponential(vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  vec shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  ivec n = (ivec)shifted - 0x4b400000;
  vec r = x - (shifted - 12582912.0f) * 0.693359375f;
  r = r + (shifted - 12582912.0f) * 2.12194440e-4f;
  vec y = r * (1.0f / 720) + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return y * (vec)((n + 127) << 23);
}

// GELU, its derivative, or both, of values that lie in memory as T.
template <class T>
struct Gelu {
  static vec value(vec x) {
    vec half_x = x * 0.5f;
    return half_x * error_function(x) + half_x;
  }
  static void pair(vec x, vec& value, vec& slope) {
    vec probability = error_function(x) * 0.5f + 0.5f;
    value = x * probability;
    slope = probability + x * exponential(x * x * -0.5f) * 0.398942280401432678f;
  }
  static vec slope(vec x) {
    vec unused, result;
    pair(x, unused, result);
    return result;
  }
};

#if defined(__AVX512F__)
// A function as cubic polynomials, each on a quarter from -4 to 3.5; 0 before, a line beyond.
struct Table {
  static constexpr float LEAST = -4.25f, GREATEST = 3.5f;
  alignas(64) float powers[4][32] = {};

  template <class Function>
  Table(const Function& function, float constant, float slope) {
    // Each goes through four values, those at both ends among them.
    constexpr double POINTS[] = {-1, -0.4472135954999579, 0.4472135954999579, 1};
    powers[0][31] = constant, powers[1][31] = slope;
    for (int i = 1; i < 31; i++) {
      double x[4], d[4];
      for (int k = 0; k < 4; k++) x[k] = LEAST + i * 0.25 + 0.125 * (1 + POINTS[k]);
      for (int k = 0; k < 4; k++) d[k] = function(x[k]);
      for (int step = 1; step < 4; step++)  // Newton's divided differences
        for (int k = 3; k >= step; k--) d[k] = (d[k] - d[k - 1]) / (x[k] - x[k - step]);
      double c[4] = {d[3]};
      for (int k = 2; k >= 0; k--) {
        for (int power = 3; power > 0; power--) c[power] = c[power - 1] - x[k] * c[power];
        c[0] = d[k] - x[k] * c[0];
      }
      for (int power = 0; power < 4; power++) powers[power][i] = c[power];
    }
  }

  // The number of an interval, in the lowest bits.
  static __m512i find(vec x) {
    constexpr float INTEGERS = 12582912.0f;  // where floats are: 1.5 * 2^23
    __m512 clamped = _mm512_min_ps(_mm512_max_ps((__m512)x, _mm512_set1_ps(LEAST)),
                                   _mm512_set1_ps(GREATEST));
    return _mm512_castps_si512(_mm512_fmadd_round_ps(
        clamped, _mm512_set1_ps(4), _mm512_set1_ps(INTEGERS - 4 * LEAST),
        _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  }

  vec operator()(vec x, __m512i interval) const {
    vec y{};
    UNROLL
    for (int i = 3; i >= 0; i--)
      y = y * x + (vec)_mm512_permutex2var_ps(_mm512_load_ps(powers[i]), interval,
                                              _mm512_load_ps(powers[i] + 16));
    return y;
  }
};

inline double normal(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752); }
const Table VALUES([](double x) { return x * normal(x); }, 0, 1);
const Table SLOPES(
    [](double x) { return normal(x) + x * std::exp(-x * x / 2) * 0.39894228040143268; }, 1, 0);

// A tenth of what rounding to bfloat16 adds, in half the operations. Of infinity: NaN.
template <>
struct Gelu<uint16_t> {
  static vec value(vec x) { return VALUES(x, Table::find(x)); }
  static vec slope(vec x) { return SLOPES(x, Table::find(x)); }
  static void pair(vec x, vec& value, vec& slope) {
    __m512i interval = Table::find(x);
    value = VALUES(x, interval), slope = SLOPES(x, interval);
  }
};
#endif

}  // namespace
