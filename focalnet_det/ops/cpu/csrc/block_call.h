// What a whole block in inference is called with.
#pragma once

#include "vectors.h"

extern "C" {

struct Block {  // mirrored in structs.py
  const void* x;  // (N, H, W, C)
  void* out;
  const float* valid;  // (N, H, W)
  const void *f_weight, *h_weight, *proj_weight, *fc1_weight, *fc2_weight;
  const float *norm1_weight, *norm1_bias, *f_bias, *h_bias, *proj_bias, *ln_weight, *ln_bias;
  const float *gamma1, *norm2_weight, *norm2_bias, *fc1_bias, *fc2_bias, *gamma2;
  const float* kernels[LEVELS];
  long sizes[LEVELS];
  // Whether `x` and `out`, and whether the matrices, are bfloat16, else float32.
  long sixteen_maps, sixteen_products;
  long n, h, w, c, hidden, levels, post_norm, threads;
  float norm1_eps, ln_eps, norm2_eps, divisor;
};
}
