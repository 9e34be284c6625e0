// The sum of the contexts of all levels by their gates, and the gradient by the gates.
#pragma once

#include "threads.h"

extern "C" {

// Rows of `levels` contexts and of one shared by `repeat` rows, by their gates: written to `total`. Or,
// `backward`, the gradients by the gates, from that by `total`.
struct GatedSumCall {  // mirrored in structs.py
  const void* const* contexts;
  const void* shared;
  void *gates, *total;
  long rows, c, levels, repeat, backward, threads, sixteen;
};
}

namespace {

template <class T>
struct GatedSum {
  const void* const* contexts;
  const T* shared;
  T *gates, *total;
  long c, levels, repeat;

  const T* context(long level, long row) const {
    return level == levels ? shared + row / repeat * c
                           : static_cast<const T*>(contexts[level]) + row * c;
  }

  void sum_rows(long first, long count) const {
    for (long i = first; i < first + count; i++) {
      const T* from[LEVELS + 1];
      vec gate[LEVELS + 1];
      for (long level = 0; level <= levels; level++) {
        from[level] = context(level, i);
        gate[level] = splat(load(gates + i * (levels + 1) + level, 1)[0]);
      }
      for_vectors(c, [&](long j, long n) {
        vec y = load(from[0] + j, n) * gate[0];
        for (long level = 1; level <= levels; level++) y += load(from[level] + j, n) * gate[level];
        store(total + i * c + j, y, n);
      });
    }
  }

  // Gradients by the gates, from that by `total`.
  void gate_rows(long first, long count) const {
    for (long i = first; i < first + count; i++)
      for (long level = 0; level <= levels; level++) {
        vec y{};
        const T *from = context(level, i), *by = total + i * c;
        for_vectors(c, [&](long j, long n) { y += load(from + j, n) * load(by + j, n); });
        store(gates + i * (levels + 1) + level, splat(sum(y)), 1);
      }
  }
};

template <class T>
void gated_sum(const GatedSumCall& call) {
  GatedSum<T> run{call.contexts, static_cast<const T*>(call.shared), static_cast<T*>(call.gates),
                  static_cast<T*>(call.total), call.c, call.levels, call.repeat};
  for_rows(call.rows, call.c, call.threads, [&](long first, long count) {
    call.backward ? run.gate_rows(first, count) : run.sum_rows(first, count);
  });
}

}  // namespace
