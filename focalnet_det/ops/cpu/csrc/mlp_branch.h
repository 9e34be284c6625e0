// The MLP in training: norm, MLP and residual sum in one call, float32.
#pragma once

#include "branch_parts.h"

extern "C" {

struct MlpCall {  // mirrored in structs.py
  BranchCall call;
  Affine fc1, fc2, grad_fc1, grad_fc2;
  Engines fc1_engines, fc2_engines;
  float* hidden;  // kept: before its bias and GELU, (rows, width)
  long width;
};
}

namespace {

// GELU beside the sums, which are kept as they are.
struct HiddenGelu {
  const float* bias;
  float* after;
  long width;
  vec operator()(long i, long j, vec x, long n) const {
    store(after + i * width + j, Gelu<float>::value(x + load(bias + j, n)), n);
    return x;
  }
};

// The gradient by the hidden layer from that by its GELU, which is computed again.
struct HiddenBackward {
  const float *hidden, *bias;
  float* after;
  long width;
  vec operator()(long i, long j, vec x, long n) const {
    vec value, slope;
    Gelu<float>::pair(load(hidden + i * width + j, n) + load(bias + j, n), value, slope);
    store(after + i * width + j, value, n);
    return x * slope;
  }
};

struct MlpBranch : Surroundings {
  const MlpCall& m;
  Layer fc1, fc2;

  explicit MlpBranch(const MlpCall& m)
      : Surroundings(m.call), m(m), fc1{m.fc1, m.fc1_engines, m.width, c, rows, threads},
        fc2{m.fc2, m.fc2_engines, c, m.width, rows, threads} {}

  long room() const { return Surroundings::room() + rows * (2 * m.width + 2 * c) + 128; }

  void forward(Memory memory) {
    prepare(memory);
    float* after = memory.take(rows * m.width);
    fc1.forward(normed, m.hidden, HiddenGelu{m.fc1.bias, after, m.width});
    fc2.forward(after, call.out, residual(m.fc2.bias));
  }

  void backward(Memory memory) {
    prepare(memory);
    const float* grad_out = branch_gradient(memory);
    float *grad_hidden = memory.take(rows * m.width), *after = memory.take(rows * m.width);
    fc2.input_gradient(grad_out, grad_hidden, false,
                       HiddenBackward{m.hidden, m.fc1.bias, after, m.width});
    fc2.weight_gradient(grad_out, after, m.grad_fc2);
    fc1.weight_gradient(grad_hidden, normed, m.grad_fc1);
    float* grad_normed = memory.take(rows * c);
    fc1.input_gradient(grad_hidden, grad_normed);
    finish_backward(grad_normed);
  }
};

template <class Branch, class Call>
void run_branch(const Call& call) {
  Branch branch(call);
  Memory memory{branch_scratch.get(branch.room())};
  call.call.gradient ? branch.backward(memory) : branch.forward(memory);
}

}  // namespace
