// Kernels for CPUs: depthwise convolutions, norms, products and whole blocks of focal modulation, NHWC.
// Arithmetic is float32, but for products of bfloat16. Built for the CPU it runs on, see
// library_build.py; this file has the functions that library.py calls.

#include "block.h"
#include "mlp_branch.h"
#include "modulation_branch.h"
#include "roi_align.h"

extern "C" {

void focalnet_set_threads(void* parallel) {
  openmp_parallel = reinterpret_cast<parallel_type>(parallel);
}

void focalnet_set_gemm(void* sgemm) { gemm = reinterpret_cast<gemm_type>(sgemm); }

// All of these structs are mirrored in structs.py. `sixteen`: all arrays but float ones are bfloat16, else
// float32. Null pointers are left out.

struct DepthwiseCall {  // the convolution before and after GELU and mask; `flip`: taps turned around
  const void *x, *kernel;
  const float* valid;
  void *before, *after;
  long n, h, w, c, size, flip, threads, sixteen;
};

void focalnet_depthwise(const DepthwiseCall* p) {
  (p->sixteen ? convolve<uint16_t> : convolve<float>)(p->x, p->kernel, p->valid, p->before, p->after,
                                                      {p->n, p->h, p->w, p->c}, p->size, p->flip,
                                                      p->threads);
}

struct DepthwiseWeightCall {  // the gradient by the kernel
  const void *x, *gradient;
  void* out;
  long n, h, w, c, size, threads, sixteen;
};

void focalnet_depthwise_weight(const DepthwiseWeightCall* p) {
  Map map{p->n, p->h, p->w, p->c};
  if (p->sixteen)
    weight_gradient(static_cast<const uint16_t*>(p->x), static_cast<const uint16_t*>(p->gradient), map,
                    p->size, static_cast<uint16_t*>(p->out), p->threads);
  else
    weight_gradient(static_cast<const float*>(p->x), static_cast<const float*>(p->gradient), map,
                    p->size, static_cast<float*>(p->out), p->threads);
}

struct NormCall {
  const void *x, *weight, *bias;
  void* out;
  float* statistics;
  long rows, c, threads, sixteen;
  float eps;
};

void focalnet_norm(const NormCall* p) {
  (p->sixteen ? norm_rows<uint16_t> : norm_rows<float>)(p->x, p->weight, p->bias, p->out, p->statistics,
                                                        p->eps, p->rows, p->c, p->threads);
}

struct NormBackwardCall {
  const void *gradient, *x, *weight;
  const float* statistics;
  const void* residual;
  void* grad_x;
  float *grad_weight, *grad_bias;
  long rows, c, threads, sixteen;
};

void focalnet_norm_backward(const NormBackwardCall* p) {
  auto run = p->sixteen ? norm_backward<uint16_t> : norm_backward<float>;
  run(p->gradient, p->x, p->weight, p->statistics, p->residual, p->grad_x, p->grad_weight, p->grad_bias,
      p->rows, p->c, p->threads);
}

void focalnet_gelu(const GeluCall* p) { (p->sixteen ? gelu_rows<uint16_t> : gelu_rows<float>)(*p); }

void focalnet_level_backward(const LevelBackwardCall* p) {
  (p->sixteen ? level_backward<uint16_t> : level_backward<float>)(*p);
}

void focalnet_gelu_pair(const GeluPairCall* p) {
  (p->sixteen ? gelu_pair<uint16_t> : gelu_pair<float>)(*p);
}

void focalnet_residual(const ResidualCall* p) {
  (p->sixteen ? residual<uint16_t> : residual<float>)(*p);
}

void focalnet_gate(const GateCall* p) { (p->sixteen ? gate<uint16_t> : gate<float>)(*p); }

void focalnet_gate_backward(const GateBackwardCall* p) {
  (p->sixteen ? gate_backward<uint16_t> : gate_backward<float>)(*p);
}

void focalnet_gated_sum(const GatedSumCall* p) {
  (p->sixteen ? gated_sum<uint16_t> : gated_sum<float>)(*p);
}

void focalnet_roi_align(const Pyramid* pyramid) {
  for_each(pyramid->count, pyramid->threads,
           [&](long i) { pool<false>(*pyramid, i, 0, pyramid->c); });
}

// Gradients by the maps are added to them, from those by the results.
void focalnet_roi_align_backward(const Pyramid* pyramid) {
  const Pyramid& p = *pyramid;
  for_each((p.c + CHANNELS - 1) / CHANNELS, p.threads, [&](long group) {
    for (long i = 0; i < p.count; i++)
      pool<true>(p, i, group * CHANNELS, least(p.c, (group + 1) * CHANNELS));
  });
}

// Whether blocks with matrices in bfloat16 are taken.
long focalnet_has_tiles() {
#if HAS_TILES
  return may_use_tiles();
#else
  return HAS_BFLOAT16;
#endif
}

struct ProductCall {  // out (m, n) = a b, or with `add` that more; row-major or, turned, transposed
  const float *a, *b;
  float* out;
  long a_width, b_width, a_turned, b_turned, m, n, k, add, threads;
};

void focalnet_product(const ProductCall* p) {
  tile_product({p->a, p->a_width, p->a_turned != 0}, {p->b, p->b_width, p->b_turned != 0}, p->out, p->m,
               p->n, p->k, p->add, p->threads);
}

void focalnet_modulation(const ModulationCall* call) { run_branch<ModulationBranch>(*call); }

void focalnet_mlp(const MlpCall* call) { run_branch<MlpBranch>(*call); }

void focalnet_block(const Block* block) {
#if HAS_BFLOAT16
  if (block->sixteen_products) return run_block<uint16_t>(*block);
#endif
  run_block<float>(*block);
}
}
