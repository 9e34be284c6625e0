// Parts that both branches of a block have in training: layers with what follows them, norm, residual
// sum. A branch is one call forward and one backward, in memory that a thread keeps: on small maps the
// calls of its parts cost more than the parts, on larger ones fresh memory for results does.
#pragma once

#include "depthwise.h"
#include "depthwise_gradient.h"
#include "gated_sum.h"
#include "norm.h"
#include "pointwise.h"
#include "products.h"

extern "C" {

// Weight (outputs, inputs) and bias of a linear layer, or those of a norm, or gradients by them.
struct Affine {  // mirrored in structs.py
  float *weight, *bias;
};

// Engines of the three products of a layer, see products.h.
struct Engines {  // mirrored in structs.py
  long forward, input, weight;
};

// What both branches are called with.
struct BranchCall {  // mirrored in structs.py
  const float *x, *factors;  // the latter, of each image, or null
  const float* gradient;     // by the result; null forward
  float* out;                // the result, or the gradient by x
  Affine norm, grad_norm;
  long n, h, w, c, threads;
  float eps;
};
}

namespace {

thread_local Scratch branch_scratch;

struct Memory {
  float* next;

  float* take(long floats) {
    float* result = next;
    next += up(floats, 16) + 16;  // whole registers are written
    return result;
  }
};

inline Affine part(const Affine& layer, long first, long inputs) {
  return {layer.weight + first * inputs, layer.bias + first};
}

// What becomes of a finished sum at (i, j).

struct WithBias {
  const float* bias;
  float factor;
  vec operator()(long, long j, vec x, long n) const { return (x + load(bias + j, n)) * factor; }
};

struct WithResidual {  // the sum of a branch, times its image's factor, and the input
  const float *input, *bias, *factors;
  long c, pixels;
  vec operator()(long i, long j, vec x, long n) const {
    vec y = x + load(bias + j, n);
    return load(input + i * c + j, n) + (factors ? y * factors[i / pixels] : y);
  }
};

// A layer of `rows` rows without its bias, and its gradients.
struct Layer {
  Affine weights;
  Engines engines;
  long outputs, inputs, rows, threads;

  template <class Last = AsIs>
  void forward(const float* x, float* out, const Last& last = Last{}) const {
    product(engines.forward, {x, inputs, false}, {weights.weight, inputs, true}, out, rows, outputs,
            inputs, false, threads, last);
  }

  template <class Last = AsIs>
  void input_gradient(const float* gradient, float* out, bool add = false,
                      const Last& last = Last{}) const {
    product(engines.input, {gradient, outputs, false}, {weights.weight, inputs, false}, out, rows,
            inputs, outputs, add, threads, last);
  }

  void weight_gradient(const float* gradient, const float* x, const Affine& by) const {
    product(engines.weight, {gradient, outputs, true}, {x, inputs, false}, by.weight, outputs, inputs,
            rows, false, threads, AsIs{}, by.bias);
  }
};

// The layers that both branches have around them.
struct Surroundings {
  const BranchCall& call;
  long rows, pixels, c, threads;
  float *normed = nullptr, *statistics = nullptr;

  explicit Surroundings(const BranchCall& call)
      : call(call), rows(call.n * call.h * call.w), pixels(call.h * call.w), c(call.c),
        threads(call.threads) {}

  long room() const { return 2 * (rows * c + 32) + 2 * rows + 32; }

  void prepare(Memory& memory) {
    normed = memory.take(rows * c), statistics = memory.take(2 * rows);
    norm_rows<float>(call.x, call.norm.weight, call.norm.bias, normed, statistics, call.eps, rows, c,
                     threads);
  }

  WithResidual residual(const float* bias) const { return {call.x, bias, call.factors, c, pixels}; }

  // The gradient by the branch, from that by its sum with the input.
  const float* branch_gradient(Memory& memory) const {
    if (!call.factors) return call.gradient;
    float* out = memory.take(rows * c);
    for_rows(rows, c, threads, [&](long first, long some) {
      for (long i = first; i < first + some; i++)
        for_vectors(c, [&](long j, long n) {
          store(out + i * c + j, load(call.gradient + i * c + j, n) * call.factors[i / pixels], n);
        });
    });
    return out;
  }

  void finish_backward(const float* grad_normed) const {
    norm_backward<float>(grad_normed, call.x, call.norm.weight, statistics, call.gradient, call.out,
                         call.grad_norm.weight, call.grad_norm.bias, rows, c, threads);
  }
};

}  // namespace
