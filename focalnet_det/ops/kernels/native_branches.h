// Whole branches of a block in training in one call each, float32, with a norm before them and the
// residual sum after. On small maps the calls of their parts cost more than the parts, on larger ones
// fresh memory for results does. What is computed and what is kept is what training.py says, of all
// pixels at once.
//
// A part of native.cpp, which has the parts of branches. Matrix products are those of the library that
// PyTorch brings, whose entry point comes from Python.

namespace {

// Fortran's sgemm: column-major, all arguments by address. Sides are read from the lower half of 64
// bits where the library's integers have 32.
typedef void (*gemm_type)(const char* turn_a, const char* turn_b, const int64_t* m,
                          const int64_t* n, const int64_t* k, const float* alpha, const float* a,
                          const int64_t* a_width, const float* b, const int64_t* b_width,
                          const float* beta, float* c, const int64_t* c_width);
gemm_type gemm = nullptr;

// A row-major matrix, or its transpose; the width is that of the memory.
struct Matrix {
  const float* data;
  int64_t width;
  bool turned;
};

// out = a b + before * out, row-major, (m, n), sums over k.
void product(Matrix a, Matrix b, float* out, int64_t m, int64_t n, int64_t k, float before = 0) {
  float one = 1;
  // Read as column-major, all three are transposed.
  gemm(b.turned ? "T" : "N", a.turned ? "T" : "N", &n, &m, &k, &one, b.data, &b.width, a.data,
       &a.width, &before, out, &n);
}

// Weight (outputs, inputs) and bias of a linear layer, or those of a norm.
struct Affine {
  float *weight, *bias;

  Affine part(long first, long inputs) const { return {weight + first * inputs, bias + first}; }
};

struct Rows {
  long count, threads;

  // Without the bias.
  void linear(const float* x, Affine layer, float* out, long outputs, long inputs) const {
    product({x, inputs, false}, {layer.weight, inputs, true}, out, count, outputs, inputs);
  }

  void add(float* x, const float* bias, long c, float factor = 1) const {
    for_rows(count, c, threads, [&](long first, long some) {
      for (float* row = x + first * c; some--; row += c)
        for_vectors(c, [&](long j, long n) {
          store(row + j, (load(row + j, n) + load(bias + j, n)) * factor, n);
        });
    });
  }

  void input_gradient(const float* gradient, Affine layer, float* out, long outputs, long inputs,
                      bool add = false) const {
    product({gradient, outputs, false}, {layer.weight, inputs, false}, out, count, inputs, outputs,
            add);
  }

  void weight_gradient(const float* gradient, const float* x, Affine by, long outputs,
                       long inputs) const {
    product({gradient, outputs, true}, {x, inputs, false}, by.weight, outputs, inputs, count);
  }

  void bias_gradient(const float* gradient, Affine by, long outputs) const {
    sum(gradient, by.bias, outputs);
  }

  void sum(const float* x, float* out, long c) const {
    column_sums(count, c, out, threads, [&](long first, long some, float* sums) {
      for (const float* row = x + first * c; some--; row += c)
        for_vectors(c, [&](long j, long n) { store(sums + j, load(sums + j) + load(row + j, n)); });
    });
  }

  // x times the factor of each image of `pixels` rows.
  void scale(const float* x, const float* factors, long pixels, float* out, long c) const {
    for_rows(count, c, threads, [&](long first, long some) {
      for (long i = first; i < first + some; i++)
        for_vectors(c, [&](long j, long n) {
          store(out + i * c + j, load(x + i * c + j, n) * factors[i / pixels], n);
        });
    });
  }
};

// Pointers and memory, handed out one after the other.
struct Tensors {
  float* const* next;

  float* take() { return *next++; }
  Affine layer() {
    float* weight = take();
    return {weight, take()};
  }
};

struct Memory {
  float* next;

  float* take(long floats) {
    float* result = next;
    next += up(floats, 16) + 16;  // whole registers are written
    return result;
  }
};

// The layers that both branches have around them.
struct Surroundings {
  long n, pixels, c, threads;
  float eps;
  const float *x, *factors;  // the latter of each image, or null
  Affine norm;
  float *normed, *statistics;

  Rows rows() const { return {n * pixels, threads}; }

  long room() const { return 2 * (rows().count * c + 32) + 2 * rows().count + 32; }

  void prepare(Memory& memory) {
    normed = memory.take(rows().count * c), statistics = memory.take(2 * rows().count);
    norm_rows<float>(x, norm.weight, norm.bias, normed, statistics, eps, rows().count, c, threads);
  }

  void finish(float* out, Affine last) const {
    residual<float>(out, x, last.bias, factors, rows().count, c, pixels, threads);
  }

  // The gradient by the branch, from that by its sum with the input.
  const float* scaled(const float* gradient, Memory& memory) const {
    if (!factors) return gradient;
    float* out = memory.take(rows().count * c);
    rows().scale(gradient, factors, pixels, out, c);
    return out;
  }

  void finish_backward(const float* grad_normed, const float* gradient, float* grad_x, Affine by) const {
    norm_backward<float>(grad_normed, x, norm.weight, statistics, gradient, grad_x, by.weight, by.bias,
                         rows().count, c, threads);
  }
};

struct ModulationBranch : Surroundings {
  long h, w, levels, sizes[LEVELS];
  bool keeps_modulator;
  float divisor;
  Affine f, h_layer, proj;
  float* kernels[LEVELS];
  // Kept; levels are those before their GELU.
  float *query, *context, *modulator, *before[LEVELS];
  // Not kept
  float *gates, *after[LEVELS], *mean, *shared, *aggregated, *gated;

  Map map() const { return {n, h, w, c}; }
  Affine gates_layer() const { return f.part(2 * c, c); }
  Affine context_layer() const { return f.part(c, c); }

  long size() const { return rows().count * c; }
  long room() const {
    return Surroundings::room() + (levels + 9) * (size() + 32) +
           2 * (rows().count * (levels + 1) + 32) + 6 * (n * c + 32);
  }

  void read(Tensors& tensors) {
    norm = tensors.layer(), f = tensors.layer(), h_layer = tensors.layer(), proj = tensors.layer();
    for (long level = 0; level < levels; level++) kernels[level] = tensors.take();
    query = tensors.take(), context = tensors.take();
    modulator = keeps_modulator ? tensors.take() : nullptr;
    for (long level = 0; level < levels; level++)
      before[level] = level || !keeps_modulator ? tensors.take() : nullptr;
  }

  void project(Memory& memory) {
    prepare(memory);
    gates = memory.take(rows().count * (levels + 1));
    rows().linear(normed, gates_layer(), gates, levels + 1, c);
    rows().add(gates, gates_layer().bias, levels + 1, 1 / divisor);
  }

  void contextualise(Memory& memory, bool kept) {
    const float* last = context;
    for (long level = 0; level < levels; level++) {
      after[level] = memory.take(size());
      if (kept && before[level]) {
        gelu_rows<float>(before[level], nullptr, nullptr, after[level], rows().count, c, threads);
      } else {
        if (kept) before[level] = memory.take(size());
        convolve<float>(last, kernels[level], nullptr, before[level], after[level], map(),
                        sizes[level], false, threads);
      }
      last = after[level];
    }
    mean = memory.take(n * c), shared = memory.take(n * c);
    for (long image = 0; image < n; image++)
      Rows{pixels, threads}.sum(last + image * pixels * c, mean + image * c, c);
    for (long i = 0; i < n * c; i++) mean[i] /= pixels;
    gelu_rows<float>(mean, nullptr, nullptr, shared, n, c, 1);
    aggregated = memory.take(size());
    sum_by_gates(gates, aggregated, false);
  }

  void sum_by_gates(float* gates, float* total, bool backward) const {
    const void* contexts[LEVELS];
    for (long level = 0; level < levels; level++) contexts[level] = after[level];
    const long numbers[] = {rows().count, c, levels, pixels, backward, threads};
    gated_sum<float>(contexts, shared, gates, total, numbers);
  }

  void multiply(Memory& memory) {
    gated = memory.take(size());
    gate<float>(query, f.bias, modulator, h_layer.bias, gated, rows().count, c, threads);
  }

  void forward(float* out, Memory memory) {
    project(memory);
    rows().linear(normed, f, query, c, c);
    rows().linear(normed, context_layer(), context, c, c);
    rows().add(context, context_layer().bias, c);
    contextualise(memory, false);
    if (!modulator) modulator = memory.take(size());
    rows().linear(aggregated, h_layer, modulator, c, c);
    multiply(memory);
    rows().linear(gated, proj, out, c, c);
    finish(out, proj);
  }

  void backward(const float* gradient, float* grad_x, Tensors by, Memory memory) {
    project(memory);
    contextualise(memory, true);
    if (!modulator)
      rows().linear(aggregated, h_layer, modulator = memory.take(size()), c, c);
    multiply(memory);

    Affine grad_norm = by.layer(), grad_f = by.layer(), grad_h = by.layer(), grad_proj = by.layer();
    const float* grad_out = scaled(gradient, memory);
    rows().weight_gradient(grad_out, gated, grad_proj, c, c);
    rows().bias_gradient(grad_out, grad_proj, c);
    float* grad_modulator = memory.take(size());
    rows().input_gradient(grad_out, proj, grad_modulator, c, c);

    float *grad_query = memory.take(size()), *sums = memory.take(2 * c);
    gate_backward<float>(grad_modulator, query, f.bias, modulator, h_layer.bias, grad_query, sums,
                         rows().count, c, threads);
    std::memcpy(grad_f.bias, sums, c * sizeof(float));
    std::memcpy(grad_h.bias, sums + c, c * sizeof(float));
    float *grad_normed = memory.take(size()), *grad_aggregated = memory.take(size());
    rows().weight_gradient(grad_query, normed, grad_f, c, c);
    rows().input_gradient(grad_query, f, grad_normed, c, c);
    rows().weight_gradient(grad_modulator, aggregated, grad_h, c, c);
    rows().input_gradient(grad_modulator, h_layer, grad_aggregated, c, c);

    float* grad_gates = memory.take(rows().count * (levels + 1));
    sum_by_gates(grad_gates, grad_aggregated, true);
    float* grad_kernels[LEVELS];
    for (long level = 0; level < levels; level++) grad_kernels[level] = by.take();
    float* grad_context = contexts_backward(grad_aggregated, grad_kernels, grad_query, memory);

    for (long i = 0; i < rows().count * (levels + 1); i++) grad_gates[i] /= divisor;
    Affine grad_context_layer = grad_f.part(c, c), grad_gates_layer = grad_f.part(2 * c, c);
    rows().weight_gradient(grad_context, normed, grad_context_layer, c, c);
    rows().bias_gradient(grad_context, grad_context_layer, c);
    rows().input_gradient(grad_context, context_layer(), grad_normed, c, c, true);
    rows().weight_gradient(grad_gates, normed, grad_gates_layer, levels + 1, c);
    rows().bias_gradient(grad_gates, grad_gates_layer, levels + 1);
    rows().input_gradient(grad_gates, gates_layer(), grad_normed, levels + 1, c, true);
    finish_backward(grad_normed, gradient, grad_x, grad_norm);
  }

  // The gradient by the projected context, which is written to `spare`.
  float* contexts_backward(const float* grad_aggregated, float* const* grad_kernels, float* spare,
                           Memory& memory) {
    float *grad_shared = memory.take(n * c), *grad_mean = memory.take(n * c);
    std::memset(grad_shared, 0, n * c * sizeof(float));
    for (long i = 0; i < rows().count; i++) {
      float *total = grad_shared + i / pixels * c, gate = gates[i * (levels + 1) + levels];
      for_vectors(c, [&](long j, long n) {
        store(total + j, load(total + j, n) + load(grad_aggregated + i * c + j, n) * gate, n);
      });
    }
    LevelBackward<float>{grad_shared, nullptr, nullptr, mean, nullptr, grad_mean, n, c, 0, 1}(0, n);
    for (long i = 0; i < n * c; i++) grad_mean[i] /= pixels;

    float *grad_next = grad_mean, *grad_level = memory.take(size());
    for (long level = levels - 1; level >= 0; level--) {
      LevelBackward<float> run{grad_aggregated, gates + level, grad_next, before[level], nullptr, grad_level,
                               rows().count, c, levels + 1, level == levels - 1 ? pixels : 1};
      for_rows(run.rows, c, threads, run);
      ::weight_gradient<float>(level ? after[level - 1] : context, grad_level, map(), sizes[level],
                               grad_kernels[level], threads);
      convolve<float>(grad_level, kernels[level], nullptr, spare, nullptr, map(), sizes[level], true,
                      threads);
      grad_next = spare;
    }
    return spare;
  }
};

struct MlpBranch : Surroundings {
  long width;  // of the hidden layer
  Affine fc1, fc2;
  float* hidden;  // kept, before its bias and GELU

  long room() const {
    return Surroundings::room() + rows().count * (2 * width + 2 * c) + 128;
  }

  void read(Tensors& tensors) {
    norm = tensors.layer(), fc1 = tensors.layer(), fc2 = tensors.layer(), hidden = tensors.take();
  }

  void forward(float* out, Memory memory) {
    prepare(memory);
    rows().linear(normed, fc1, hidden, width, c);
    float* after = memory.take(rows().count * width);
    gelu_rows<float>(hidden, fc1.bias, nullptr, after, rows().count, width, threads);
    rows().linear(after, fc2, out, c, width);
    finish(out, fc2);
  }

  void backward(const float* gradient, float* grad_x, Tensors by, Memory memory) {
    prepare(memory);
    Affine grad_norm = by.layer(), grad_fc1 = by.layer(), grad_fc2 = by.layer();
    const float* grad_out = scaled(gradient, memory);
    float *grad_hidden = memory.take(rows().count * width), *after = memory.take(rows().count * width);
    rows().input_gradient(grad_out, fc2, grad_hidden, c, width);
    gelu_pair<float>(hidden, fc1.bias, grad_hidden, after, grad_fc1.bias, rows().count, width, threads);
    rows().weight_gradient(grad_out, after, grad_fc2, c, width);
    rows().bias_gradient(grad_out, grad_fc2, c);
    rows().weight_gradient(grad_hidden, normed, grad_fc1, width, c);
    float* grad_normed = memory.take(rows().count * c);
    rows().input_gradient(grad_hidden, fc1, grad_normed, width, c);
    finish_backward(grad_normed, gradient, grad_x, grad_norm);
  }
};

thread_local Scratch branch_scratch;

// Tensors: x, factors or null, out, parameters, what is kept. Backward: x, factors, the gradient by
// x, parameters, what is kept, the gradient by the result, gradients by the parameters.
template <class Branch>
void run_branch(Branch& branch, float* const* tensors, bool backward) {
  Tensors rest{tensors};
  branch.x = rest.take(), branch.factors = rest.take();
  float* out = rest.take();
  branch.read(rest);
  Memory memory{branch_scratch.get(branch.room())};
  if (!backward) return branch.forward(out, memory);
  const float* gradient = rest.take();
  branch.backward(gradient, out, rest, memory);
}

}  // namespace
