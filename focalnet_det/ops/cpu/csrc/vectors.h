// Registers: `vec` is one, and every function is written once for all widths.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR 16
#define ROWS 12  // rows of a tile of a matrix product: 2 x ROWS sums fit the registers
#elif defined(__AVX__)
#define VECTOR 8
#define ROWS 6
#else
#define VECTOR 4
#define ROWS 6
#endif

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

// Products of bfloat16: by tile registers, or else by dot products of pairs.
#if HAS_TILES || (defined(__AVX512BF16__) && defined(__AVX512BW__))
#define HAS_BFLOAT16 1
#else
#define HAS_BFLOAT16 0
#endif

// Loops over registers are unrolled whole, or their arrays stay in memory.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr long V = VECTOR;
constexpr long PANEL = 2 * V;   // columns of a tile of a matrix product
constexpr long LEVELS = 8;      // at most

typedef float vec __attribute__((vector_size(4 * VECTOR)));
typedef float loose __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * VECTOR)));
typedef uint32_t uvec __attribute__((vector_size(4 * VECTOR)));
typedef uint16_t half __attribute__((vector_size(2 * VECTOR)));
typedef uint16_t loose_half __attribute__((vector_size(2 * VECTOR), aligned(2), may_alias));

inline vec splat(float x) { return x - vec{}; }  // unlike a sum, exact for -0
inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }

inline vec load(const uint16_t* p) {
  half bits = *reinterpret_cast<const loose_half*>(p);
#if defined(__AVX512F__)
  return (vec)((uvec)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#else
  return (vec)(__builtin_convertvector(bits, uvec) << 16);
#endif
}

inline void store(uint16_t* p, vec x) {  // to nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__)
  *reinterpret_cast<loose_half*>(p) = (half)_mm512_cvtneps_pbh((__m512)x);
#else
  uvec bits = (uvec)x;
  uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uvec nan = (uvec)(x != x);
  rounded = (rounded & ~nan) | (0x7fc0 & nan);
  *reinterpret_cast<loose_half*>(p) = __builtin_convertvector(rounded, half);
#endif
}

template <class T>
inline vec load(const T* p, long count) {
  if (count >= V) return load(p);
  T part[V] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

template <class T>
inline void store(T* p, vec x, long count) {
  if (count >= V) return store(p, x);
  T part[V];
  store(part, x);
  std::memcpy(p, part, count * sizeof(T));
}

// Calls `body(i, n)` for parts of n <= V of `count` values. Whole registers have their own copy of
// the loop: there n is a constant, and loads and stores test nothing.
template <class Body>
inline void for_vectors(long count, const Body& body) {
  long i = 0;
  for (; i + V <= count; i += V) body(i, V);
  if (i < count) body(i, count - i);
}

inline float sum(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (long i = 0; i < V; i++) total += x[i];
  return total;
#endif
}

inline long up(long x, long step) { return (x + step - 1) / step * step; }
inline long least(long a, long b) { return a < b ? a : b; }
inline long most(long a, long b) { return a > b ? a : b; }

// Only the first `count` values of a register.
inline vec first_lanes(vec x, long count) {
  ivec lane;
  for (int i = 0; i < V; i++) lane[i] = i;
  return count >= V ? x : lane < static_cast<int32_t>(count) ? x : vec{};
}

#if defined(__AVX512F__)
// 16 x 16 words of 32 bits.
inline void transpose(__m512i* r) {
  __m512i t[16];
  UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL
  for (int i = 0; i < 16; i += 4)
    UNROLL
    for (int j = 0; j < 2; j++) {  // columns 2 j and 2 j + 1 of each quarter, of four rows
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  UNROLL
  for (int j = 0; j < 4; j++) {
    __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    __m512i odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    __m512i even_below = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    __m512i odd_below = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even, even_below, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
  }
  UNROLL
  for (int i = 0; i < 16; i++) r[i] = t[i];
}
#endif

}  // namespace
