// Focal modulation in training: norm, modulation and residual sum in one call, float32. What is computed
// and what is kept is what training.py says, of all pixels at once.
#pragma once

#include "branch_parts.h"

extern "C" {

struct ModulationCall {  // mirrored in structs.py
  BranchCall call;
  Affine f, h, proj, grad_f, grad_h, grad_proj;
  Engines square, narrow;  // of the layers with C outputs, and of the gates
  float *kernels[LEVELS], *grad_kernels[LEVELS];
  // Kept: query and modulator without bias, projected context, levels before their GELU. The modulator
  // is null where the first level is kept instead, and the other way around.
  float *query, *context, *modulator, *before[LEVELS];
  long sizes[LEVELS];
  long levels;
  float divisor;
};
}

namespace {

// The product of query and modulator beside the latter, which is kept as it is.
struct Gated {
  const float *query, *query_bias, *bias;
  float* gated;
  long c;
  vec operator()(long i, long j, vec x, long n) const {
    vec y = (load(query + i * c + j, n) + load(query_bias + j, n)) * (x + load(bias + j, n));
    store(gated + i * c + j, y, n);
    return x;
  }
};

// From the gradient by that product: those by query and modulator, the latter in its place.
struct GatedBackward {
  const float *query, *query_bias, *modulator, *bias;
  float* grad_query;
  long c;
  vec operator()(long i, long j, vec x, long n) const {
    store(grad_query + i * c + j, x * (load(modulator + i * c + j, n) + load(bias + j, n)), n);
    return x * (load(query + i * c + j, n) + load(query_bias + j, n));
  }
};

struct ModulationBranch : Surroundings {
  const ModulationCall& m;
  Layer query, context, gate, h, proj;
  float *modulator, *before[LEVELS];
  // Not kept
  float *gates, *after[LEVELS], *mean, *shared, *aggregated, *gated;

  explicit ModulationBranch(const ModulationCall& m)
      : Surroundings(m.call), m(m), query(square(m.f)), context(square(part(m.f, c, c))),
        gate{part(m.f, 2 * c, c), m.narrow, m.levels + 1, c, rows, threads}, h(square(m.h)),
        proj(square(m.proj)), modulator(m.modulator) {
    for (long level = 0; level < m.levels; level++) before[level] = m.before[level];
  }

  Layer square(const Affine& layer) const { return {layer, m.square, c, c, rows, threads}; }
  Map map() const { return {call.n, call.h, call.w, c}; }
  long size() const { return rows * c; }
  long room() const {
    return Surroundings::room() + (m.levels + 9) * (size() + 32) +
           2 * (rows * (m.levels + 1) + 32) + 6 * (call.n * c + 32);
  }

  void project(Memory& memory) {
    prepare(memory);
    gates = memory.take(rows * (m.levels + 1));
    gate.forward(normed, gates, WithBias{gate.weights.bias, 1 / m.divisor});
  }

  void contextualise(Memory& memory) {
    const float* last = m.context;
    for (long level = 0; level < m.levels; level++) {
      after[level] = memory.take(size());
      if (call.gradient && before[level]) {
        gelu_rows<float>({before[level], nullptr, nullptr, after[level], rows, c, threads});
      } else {
        if (call.gradient) before[level] = memory.take(size());
        convolve<float>(last, m.kernels[level], nullptr, before[level], after[level], map(),
                        m.sizes[level], false, threads);
      }
      last = after[level];
    }
    mean = memory.take(call.n * c), shared = memory.take(call.n * c);
    for (long image = 0; image < call.n; image++)
      column_sums(pixels, c, mean + image * c, threads, [&](long first, long some, float* sums) {
        for (const float* row = last + (image * pixels + first) * c; some--; row += c)
          for_vectors(c, [&](long j, long n) { store(sums + j, load(sums + j) + load(row + j, n)); });
      });
    for (long i = 0; i < call.n * c; i++) mean[i] /= pixels;
    gelu_rows<float>({mean, nullptr, nullptr, shared, call.n, c, 1});
    aggregated = memory.take(size());
    sum_by_gates(gates, aggregated, false);
  }

  void sum_by_gates(float* gates, float* total, bool backward) const {
    const void* contexts[LEVELS];
    for (long level = 0; level < m.levels; level++) contexts[level] = after[level];
    gated_sum<float>({contexts, shared, gates, total, rows, c, m.levels, pixels, backward, threads});
  }

  void forward(Memory memory) {
    project(memory);
    query.forward(normed, m.query);
    context.forward(normed, m.context, WithBias{context.weights.bias, 1});
    contextualise(memory);
    modulate(memory, modulator ? modulator : memory.take(size()));
    proj.forward(gated, call.out, residual(m.proj.bias));
  }

  void modulate(Memory& memory, float* out) {
    modulator = out, gated = memory.take(size());
    h.forward(aggregated, modulator, Gated{m.query, m.f.bias, m.h.bias, gated, c});
  }

  void backward(Memory memory) {
    project(memory);
    contextualise(memory);
    if (modulator) {
      gated = memory.take(size());
      ::gate<float>({m.query, m.f.bias, modulator, m.h.bias, gated, rows, c, threads});
    } else {
      modulate(memory, memory.take(size()));
    }
    const float* grad_out = branch_gradient(memory);
    proj.weight_gradient(grad_out, gated, m.grad_proj);
    float *grad_modulator = memory.take(size()), *grad_query = memory.take(size());
    proj.input_gradient(grad_out, grad_modulator, false,
                        GatedBackward{m.query, m.f.bias, modulator, m.h.bias, grad_query, c});
    float *grad_normed = memory.take(size()), *grad_aggregated = memory.take(size());
    query.weight_gradient(grad_query, normed, m.grad_f);
    query.input_gradient(grad_query, grad_normed);
    h.weight_gradient(grad_modulator, aggregated, m.grad_h);
    h.input_gradient(grad_modulator, grad_aggregated);

    float* grad_gates = memory.take(rows * (m.levels + 1));
    sum_by_gates(grad_gates, grad_aggregated, true);
    float* grad_context = contexts_backward(grad_aggregated, grad_query, memory);
    if (m.divisor != 1)
      for (long i = 0; i < rows * (m.levels + 1); i++) grad_gates[i] /= m.divisor;
    context.weight_gradient(grad_context, normed, part(m.grad_f, c, c));
    context.input_gradient(grad_context, grad_normed, true);
    gate.weight_gradient(grad_gates, normed, part(m.grad_f, 2 * c, c));
    gate.input_gradient(grad_gates, grad_normed, true);
    finish_backward(grad_normed);
  }

  // The gradient by the projected context, which is written to `spare`.
  float* contexts_backward(const float* grad_aggregated, float* spare, Memory& memory) {
    long n = call.n;
    float *grad_shared = memory.take(n * c), *grad_mean = memory.take(n * c);
    for (long image = 0; image < n; image++)
      column_sums(pixels, c, grad_shared + image * c, threads, [&](long first, long some, float* sums) {
        for (long i = image * pixels + first; some--; i++) {
          float gate = gates[i * (m.levels + 1) + m.levels];
          for_vectors(c, [&](long j, long count) {
            store(sums + j, load(sums + j) + load(grad_aggregated + i * c + j, count) * gate);
          });
        }
      });
    level_backward<float>({grad_shared, nullptr, nullptr, mean, nullptr, grad_mean, n, c, 0, 1, 1});
    for (long i = 0; i < n * c; i++) grad_mean[i] /= pixels;

    float *grad_next = grad_mean, *grad_level = memory.take(size());
    for (long level = m.levels - 1; level >= 0; level--) {
      level_backward<float>({grad_aggregated, gates + level, grad_next, before[level], nullptr,
                             grad_level, rows, c, m.levels + 1,
                             level == m.levels - 1 ? pixels : 1, threads});
      ::weight_gradient<float>(level ? after[level - 1] : m.context, grad_level, map(),
                               m.sizes[level], m.grad_kernels[level], threads);
      convolve<float>(grad_level, m.kernels[level], nullptr, spare, nullptr, map(), m.sizes[level],
                      true, threads);
      grad_next = spare;
    }
    return spare;
  }
};

}  // namespace
