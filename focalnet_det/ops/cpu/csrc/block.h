// A whole block in inference, in one call.
#pragma once

#include <type_traits>

#include "block_call.h"
#include "depthwise.h"
#include "layers.h"

namespace {

constexpr long HIDDEN = 384;    // part of the hidden layer that is computed at once
constexpr long TILES = 64;      // that a block is cut into at least, of 4 x ROWS pixels at least
constexpr long CACHE = 256 * 1024;  // bytes of the left matrix of a product, for half of the cache
constexpr long KEPT = 64 * 1024 * 1024;  // bytes that a thread keeps for the maps of its next block
constexpr long TILE_CACHE = 512 * 1024;   // bytes of all rows, where there are tile registers
constexpr long MANY_ROWS = 128;  // for which reading the weights of a wide block pays

// T: of the operands of matrix products and of the maps in between.
template <class T>
struct BlockRun {
  const Block& b;
  Map map;             // of the padded channels
  long pixels, pitch;  // pitch: channels padded to whole panels
  bool kept;
  long gate_pitch, tile, width;  // width: hidden columns that are computed at once
  Linear<T> query, context, gates, h, proj, fc1, fc2;
  Norm norm1, ln, norm2;
  float *memory, *maps, *taps, *gamma1, *gamma2, *shared, *partial, *gate;
  T *level[2], *total;

  explicit BlockRun(const Block& block) : b(block) {
    long c = b.c;
    pixels = b.n * b.h * b.w, pitch = up(c, PANEL), gate_pitch = b.levels + 1;
    map = {b.n, b.h, b.w, pitch};
    width = least(HIDDEN, up(b.hidden, PANEL));
    tile = tile_rows();
    const T* f = static_cast<const T*>(b.f_weight);
    query = {f, b.f_bias, c, c};
    context = {f + c * c, b.f_bias + c, c, c};
    gates = {f + 2 * c * c, b.f_bias + 2 * c, gate_pitch, c};
    h = {static_cast<const T*>(b.h_weight), b.h_bias, c, c};
    proj = {static_cast<const T*>(b.proj_weight), b.proj_bias, c, c};
    fc1 = {static_cast<const T*>(b.fc1_weight), b.fc1_bias, b.hidden, c};
    fc2 = {static_cast<const T*>(b.fc2_weight), b.fc2_bias, c, b.hidden};
    norm1 = {b.norm1_weight, b.norm1_bias, b.norm1_eps};
    ln = {b.ln_weight, b.ln_bias, b.ln_eps};
    norm2 = {b.norm2_weight, b.norm2_bias, b.norm2_eps};
    pack_weights();
    long map_floats = pixels * pitch * sizeof(T) / sizeof(float);
    long floats = 3 * map_floats + pixels * gate_pitch;
    kept = floats * static_cast<long>(sizeof(float)) <= KEPT;
    maps = kept ? map_scratch.get(floats) : allocate(floats);
    level[0] = reinterpret_cast<T*>(maps);
    level[1] = reinterpret_cast<T*>(maps + map_floats);
    total = reinterpret_cast<T*>(maps + 2 * map_floats);
    gate = maps + 3 * map_floats;
  }

  ~BlockRun() {
    std::free(memory);
    if (!kept) std::free(maps);
  }

  // As many as the cache holds, but enough tiles for all threads to end together.
  long tile_rows() const {
    if (sizeof(T) == sizeof(float)) {
      long rows = least(CACHE / 4 / most(pitch, width), pixels / TILES);
      return most(rows / ROWS, 4) * ROWS;
    }
    // Products in tile registers take as long as reading the weights of a wide block.
    long cached = most(TILE_CACHE / (8 * pitch + 2 * width), MANY_ROWS);
    long shared = most(pixels / (TILES / 4), least(pixels / 2, MANY_ROWS));
    return up(most(least(cached, shared), 1), GRAIN<T>);
  }

  void pack_weights() {
    Linear<T>* linears[] = {&query, &context, &gates, &h, &proj, &fc1, &fc2};
    long floats = (2 + b.n + map.tiles()) * pitch, largest = 1, panels[8] = {};
    for (Linear<T>* linear : linears) floats += linear->floats();
    for (long i = 0; i < b.levels; i++) largest = most(largest, b.sizes[i] * b.sizes[i]);
    memory = allocate(floats + largest * pitch);
    float* next = memory;
    for (int i = 0; i < 7; i++) {
      next = linears[i]->place(next);
      panels[i + 1] = panels[i] + up(linears[i]->n, PANEL) / PANEL;
    }
    for_each(panels[7], b.threads, [&](long index) {
      int i = 0;
      while (index >= panels[i + 1]) i++;
      linears[i]->pack(index - panels[i]);
    });
    gamma1 = next, gamma2 = gamma1 + pitch, shared = gamma2 + pitch;
    partial = shared + b.n * pitch, taps = partial + map.tiles() * pitch;
    for (long j = 0; j < pitch; j++) {
      gamma1[j] = j >= b.c ? 0 : b.gamma1 ? b.gamma1[j] : 1;
      gamma2[j] = j >= b.c ? 0 : b.gamma2 ? b.gamma2[j] : 1;
    }
  }

  // Of a thread: rows of the input, the sum of a branch, and operands of matrix products.
  struct Rows {
    long first, count;
    float *x, *branch;
    T *a, *product, *hidden;
  };

  template <class Task>
  void for_tiles(const Task& task) {
    for_each((pixels + tile - 1) / tile, b.threads, [&](long index) {
#if HAS_TILES
      std::conditional_t<sizeof(T) == 2, TileRegisters, int> registers{};
      (void)registers;
#endif
      Rows rows;
      rows.first = index * tile, rows.count = least(tile, pixels - rows.first);
      rows.x = scratch.get(tile * (4 * pitch + width));
      rows.branch = rows.x + tile * pitch;
      rows.a = reinterpret_cast<T*>(rows.branch + tile * pitch);
      rows.product = rows.a + tile * pitch, rows.hidden = rows.product + tile * pitch;
      for (long i = 0; i < rows.count; i++) {
        long from = (rows.first + i) * b.c;
        float* to = rows.x + i * pitch;
        if (b.sixteen_maps)
          for_vectors(b.c, [&](long j, long n) {
            store(to + j, load(static_cast<const uint16_t*>(b.x) + from + j, n));
          });
        else
          std::memcpy(to, static_cast<const float*>(b.x) + from, b.c * sizeof(float));
        for (long j = b.c; j < pitch; j++) to[j] = 0;
      }
      task(rows);
    });
  }

  void write(const Rows& rows) {
    for (long i = 0; i < rows.count; i++) {
      long to = (rows.first + i) * b.c;
      const float* from = rows.x + i * pitch;
      if (b.sixteen_maps)
        for_vectors(b.c, [&](long j, long n) {
          store(static_cast<uint16_t*>(b.out) + to + j, load(from + j), n);
        });
      else
        std::memcpy(static_cast<float*>(b.out) + to, from, b.c * sizeof(float));
    }
  }

  template <class Done>
  void apply(const Linear<T>& linear, const T* a, long rows, const Done& done) {
    multiply(a, pitch, rows, linear.panels, linear.depth() * PANEL, linear.depth(), linear.n,
             [&](long i, long j, vec x) { done(i, j, x + load(linear.biases + j)); });
  }

  // The input of a branch as an operand, with the norm before it if there is one.
  const T* operand(const Norm& norm, const Rows& rows) {
    if (!b.post_norm) {
      norm(rows.x, rows.count, b.c, pitch, pad(rows.a, rows.count));
      return rows.a;
    }
    if constexpr (std::is_same_v<T, float>) return rows.x;
    for (long j = 0; j < rows.count * pitch; j += V) store(rows.a + j, load(rows.x + j));
    return rows.a;
  }

  // Contexts of level 0 and gates.
  void project() {
    for_tiles([&](const Rows& rows) {
      const T* a = operand(norm1, rows);
      long first = rows.first;
      apply(context, a, rows.count, [&](long i, long j, vec y) {
        if (b.valid) y *= b.valid[first + i];
        store(level[0] + (first + i) * pitch + j, y);
      });
      apply(gates, a, rows.count, [&](long i, long j, vec y) {
        long count = gate_pitch - j;
        if (count > 0) store(gate + (first + i) * gate_pitch + j, y / b.divisor, count);
      });
    });
  }

  // Columns beyond C are zero wherever a norm or a product reads them.
  T* pad(T* x, long rows) {
    for (long i = 0; i < rows; i++)
      for (long j = b.c; j < pitch; j++) x[i * pitch + j] = 0;
    return x;
  }

  void contextualise() {
    for (long i = 0; i < b.levels; i++) {
      bool last = i + 1 == b.levels;
      pack_taps(b.kernels[i], b.c, pitch, b.sizes[i], false, taps);
      Level<T> to{nullptr,    last ? nullptr : level[(i + 1) % 2], total, gate + i, gate_pitch,
                  i == 0,     b.valid,                             last ? partial : nullptr};
      depthwise(level[i % 2], taps, map, b.sizes[i], to, b.threads);
    }
    long tiles = map.tiles() / b.n;
    for (long image = 0; image < b.n; image++) {
      double area = b.h * b.w;
      if (b.valid) {
        area = 0;
        for (long i = 0; i < b.h * b.w; i++) area += b.valid[image * b.h * b.w + i];
      }
      for (long j = 0; j < pitch; j += V) {
        vec sums{};
        for (long t = image * tiles; t < (image + 1) * tiles; t++) sums += load(partial + t * pitch + j);
        store(shared + image * pitch + j, Gelu<float>::value(sums / static_cast<float>(area)));
      }
    }
  }

  // The rest, pixel by pixel.
  void modulate() {
    for_tiles([&](const Rows& rows) {
      auto [first, count, x, branch, a, product, hidden] = rows;
      pad(product, count);
      apply(query, operand(norm1, rows), count,
            [&](long i, long j, vec y) { store(product + i * pitch + j, y); });
      for (long i = 0; i < count; i++) {
        long pixel = first + i;
        const float* global = shared + pixel / (b.h * b.w) * pitch;
        float weight = gate[pixel * gate_pitch + b.levels];
        for (long j = 0; j < pitch; j += V)
          store(a + i * pitch + j, load(total + pixel * pitch + j) + load(global + j) * weight);
      }
      apply(h, a, count, [&](long i, long j, vec y) {
        T* to = product + i * pitch + j;
        store(to, load(to) * y);
      });
      if (ln.weight) ln(product, count, b.c, pitch, product);
      if (b.post_norm) {
        apply(proj, product, count, [&](long i, long j, vec y) { store(branch + i * pitch + j, y); });
        norm1(branch, count, b.c, pitch, branch);
        add(x, branch, gamma1, count);
      } else {
        apply(proj, product, count, [&](long i, long j, vec y) {
          float* to = x + i * pitch + j;
          store(to, load(to) + y * load(gamma1 + j));
        });
      }
      const T* input = operand(norm2, rows);
      if (b.post_norm) {
        std::memset(branch, 0, count * pitch * sizeof(float));
        mlp(input, hidden, count, [&](long i, long j, vec y) {
          float* to = branch + i * pitch + j;
          store(to, load(to) + y);
        });
        norm2(branch, count, b.c, pitch, branch);
        add(x, branch, gamma2, count);
      } else {
        mlp(input, hidden, count, [&](long i, long j, vec y) {
          float* to = x + i * pitch + j;
          store(to, load(to) + y * load(gamma2 + j));
        });
      }
      write(rows);
    });
  }

  void add(float* x, const float* branch, const float* gamma, long rows) {
    for (long i = 0; i < rows; i++)
      for (long j = 0; j < pitch; j += V) {
        float* to = x + i * pitch + j;
        store(to, load(to) + load(branch + i * pitch + j) * load(gamma + j));
      }
  }

  template <class Done>
  void mlp(const T* a, T* hidden, long rows, const Done& done) {
    for (long begin = 0; begin < b.hidden; begin += HIDDEN) {
      long count = least(HIDDEN, b.hidden - begin), padded = up(count, PANEL);
      multiply(a, pitch, rows, fc1.panels + begin * fc1.depth(), fc1.depth() * PANEL, fc1.depth(),
               count, [&](long i, long j, vec y) {
                 store(hidden + i * padded + j, Gelu<T>::value(y + load(fc1.biases + begin + j)));
               });
      multiply(hidden, padded, rows, fc2.panels + begin * PANEL, fc2.depth() * PANEL,
               up(count, STEP<T>), b.c, [&](long i, long j, vec y) {
                 done(i, j, begin ? y : y + load(fc2.biases + j));
               });
    }
  }
};

template <class T>
void run_block(const Block& block) {
  BlockRun<T> run(block);
  run.project();
  run.contextualise();
  run.modulate();
}

}  // namespace
