// Parts of a branch in training, pixel by pixel, on rows of c values. `sixteen`: all arrays but float
// ones are bfloat16, else float32.
#pragma once

#include "gelu.h"
#include "threads.h"

extern "C" {

// All of these are mirrored in structs.py.

struct GeluCall {  // out = gelu(x + bias) * valid; null pointers count as 0 and 1
  const void *x, *bias;
  const float* valid;
  void* out;
  long rows, c, threads, sixteen;
};

// out = slope(before) * valid * (gates * grad_sum + grad_after); null pointers count as 1 and 0
struct LevelBackwardCall {
  const void *grad_sum, *gates, *grad_after, *before;
  const float* valid;
  void* out;
  // Rows from one value of the gates to the next, and rows that one of `grad_after` stands for.
  long rows, c, pitch, repeat, threads, sixteen;
};

// after = gelu(before + bias), gradient *= slope there; grad_bias: sums of the latter over the rows
struct GeluPairCall {
  const void *before, *bias;
  void *gradient, *after;
  float* grad_bias;
  long rows, c, threads, sixteen;
};

// branch = x + (branch + bias) * factor of each `repeat` rows; a null pointer counts as 1
struct ResidualCall {
  void* branch;
  const void *x, *bias;
  const float* factors;
  long rows, c, repeat, threads, sixteen;
};

struct GateCall {  // out = (query + query_bias) * (modulator + bias)
  const void *query, *query_bias, *modulator, *bias;
  void* out;
  long rows, c, threads, sixteen;
};

// From the gradient by that: those by query and modulator, the latter in its place, and their sums over
// the rows, one after the other.
struct GateBackwardCall {
  void* gradient;
  const void *query, *query_bias, *modulator, *bias;
  void* grad_query;
  float* sums;
  long rows, c, threads, sixteen;
};
}

namespace {

// A row of an array.
template <class T>
inline const T* row_of(const void* array, long row, long c) {
  return static_cast<const T*>(array) + row * c;
}
template <class T>
inline T* row_of(void* array, long row, long c) {
  return static_cast<T*>(array) + row * c;
}

template <class T>
void gelu_rows(const GeluCall& call) {
  long c = call.c;
  for_rows(call.rows, c, call.threads, [&](long first, long count) {
    const T *from = row_of<T>(call.x, first, c), *bias = static_cast<const T*>(call.bias);
    T* to = row_of<T>(call.out, first, c);
    long width = call.valid || bias ? c : count * c;  // else all rows are one
    for (long i = 0; i < count * c; i += width)
      for_vectors(width, [&](long j, long n) {
        vec y = load(from + i + j, n);
        y = Gelu<T>::value(bias ? y + load(bias + j, n) : y);
        store(to + i + j, call.valid ? y * call.valid[first + i / c] : y, n);
      });
  });
}

template <class T>
void level_backward(const LevelBackwardCall& call) {
  long c = call.c;
  const T* gates = static_cast<const T*>(call.gates);
  for_rows(call.rows, c, call.threads, [&](long first, long count) {
    for (long i = first; i < first + count; i++) {
      vec gate = gates ? splat(load(gates + i * call.pitch, 1)[0]) : splat(1);
      vec inside = call.valid ? splat(call.valid[i]) : splat(1);
      const T *by = row_of<T>(call.grad_sum, i, c), *before = row_of<T>(call.before, i, c);
      const T* after = call.grad_after ? row_of<T>(call.grad_after, i / call.repeat, c) : nullptr;
      T* to = row_of<T>(call.out, i, c);
      for_vectors(c, [&](long j, long n) {
        vec y = load(by + j, n) * gate;
        if (after) y += load(after + j, n);
        store(to + j, y * inside * Gelu<T>::slope(load(before + j, n)), n);
      });
    }
  });
}

template <class T>
void gelu_pair(const GeluPairCall& call) {
  const T* bias = static_cast<const T*>(call.bias);
  long c = call.c;
  column_sums(call.rows, c, call.grad_bias, call.threads, [&](long first, long count, float* sums) {
    for (long i = first; i < first + count; i++) {
      const T* from = row_of<T>(call.before, i, c);
      T *gradient = row_of<T>(call.gradient, i, c), *to = row_of<T>(call.after, i, c);
      for_vectors(c, [&](long j, long n) {
        vec value, slope;
        Gelu<T>::pair(load(from + j, n) + load(bias + j, n), value, slope);
        vec y = load(gradient + j, n) * slope;
        store(to + j, value, n);
        store(gradient + j, y, n);
        store(sums + j, load(sums + j) + y);
      });
    }
  });
}

template <class T>
void residual(const ResidualCall& call) {
  const T* bias = static_cast<const T*>(call.bias);
  for_rows(call.rows, call.c, call.threads, [&](long first, long count) {
    for (long i = first; i < first + count; i++) {
      vec factor = splat(call.factors ? call.factors[i / call.repeat] : 1);
      const T* from = row_of<T>(call.x, i, call.c);
      T* to = row_of<T>(call.branch, i, call.c);
      for_vectors(call.c, [&](long j, long n) {
        vec y = load(to + j, n) + load(bias + j, n);
        store(to + j, load(from + j, n) + y * factor, n);
      });
    }
  });
}

template <class T>
void gate(const GateCall& call) {
  const T *query_bias = static_cast<const T*>(call.query_bias), *bias = static_cast<const T*>(call.bias);
  for_rows(call.rows, call.c, call.threads, [&](long first, long count) {
    for (long i = first; i < first + count; i++) {
      const T *q = row_of<T>(call.query, i, call.c), *m = row_of<T>(call.modulator, i, call.c);
      T* to = row_of<T>(call.out, i, call.c);
      for_vectors(call.c, [&](long j, long n) {
        vec left = load(q + j, n) + load(query_bias + j, n);
        store(to + j, left * (load(m + j, n) + load(bias + j, n)), n);
      });
    }
  });
}

template <class T>
void gate_backward(const GateBackwardCall& call) {
  const T *query_bias = static_cast<const T*>(call.query_bias), *bias = static_cast<const T*>(call.bias);
  long c = call.c, pitch = up(c, 16);  // whole registers are added
  float* both = allocate(2 * pitch);
  column_sums(call.rows, 2 * pitch, both, call.threads, [&](long first, long count, float* sums) {
    for (long i = first; i < first + count; i++) {
      const T *q = row_of<T>(call.query, i, c), *m = row_of<T>(call.modulator, i, c);
      T *by = row_of<T>(call.gradient, i, c), *to = row_of<T>(call.grad_query, i, c);
      for_vectors(c, [&](long j, long n) {
        vec g = load(by + j, n);
        vec grad_q = g * (load(m + j, n) + load(bias + j, n));
        vec grad_m = g * (load(q + j, n) + load(query_bias + j, n));
        store(to + j, grad_q, n);
        store(by + j, grad_m, n);
        store(sums + j, load(sums + j) + grad_q);
        store(sums + pitch + j, load(sums + pitch + j) + grad_m);
      });
    }
  });
  std::memcpy(call.sums, both, c * sizeof(float));
  std::memcpy(call.sums + c, both + pitch, c * sizeof(float));
  std::free(both);
}

}  // namespace
