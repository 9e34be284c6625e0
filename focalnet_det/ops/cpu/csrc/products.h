// Matrix products in float32 by register tiles: blocks of both factors are copied into the order in
// which a tile reads them, so that strides, odd sizes and transposition end there.
#pragma once

#include <type_traits>

#include "threads.h"

namespace {

// Sides of the block of a product that a task computes: copies of the factors stay in the second cache.
constexpr long BLOCK_COLUMNS = 12 * PANEL, DEPTH = 512, BLOCK_LEFT = 16 * ROWS * DEPTH;
constexpr long LEAST_ROWS = 8 * ROWS;  // of a block, for which copying the right factor pays
constexpr long MOST_ROWS = 64 * ROWS;
constexpr long RIGHT_CACHE = BLOCK_COLUMNS * DEPTH / 3;  // values of the right factor that stay near
constexpr long CROWDED = 512;          // rows a multiple apart share few lines of the first cache
constexpr long PART = 1024;            // least terms of a part of a long sum
constexpr long SHARES = 16;            // blocks and parts to cut a product into

// A row-major matrix, or its transpose; the width is that of the memory.
struct Matrix {
  const float* data;
  int64_t width;
  bool turned;
};

// ROWS x WIDE registers of sums over `depth` products. The left factor lies in rows of `pitch`, or,
// TURNED, in columns.
template <bool TURNED, int WIDE>
inline void tile_sums(const float* left, long pitch, const float* right, long depth, vec (*sums)[2]) {
  vec total[ROWS][WIDE] = {};
  for (long p = 0; p < depth; p++, right += PANEL) {
    vec columns[WIDE];
    UNROLL
    for (int j = 0; j < WIDE; j++) columns[j] = load(right + j * V);
    UNROLL
    for (int r = 0; r < ROWS; r++) {
      vec factor = splat(TURNED ? left[p * pitch + r] : left[r * pitch + p]);
      UNROLL
      for (int j = 0; j < WIDE; j++) total[r][j] += factor * columns[j];
    }
  }
  UNROLL
  for (int r = 0; r < ROWS; r++)
    UNROLL
    for (int j = 0; j < WIDE; j++) sums[r][j] = total[r][j];
}

// The left factor's block, with zeros up to a multiple of ROWS; returns its pitch.
inline long copy_left(const Matrix& a, long row, long rows, long term, long depth, float* out) {
  long padded = up(rows, ROWS);
  if (a.turned) {
    long pitch = up(padded, V) + V;
    for (long p = 0; p < depth; p++) {
      float* to = out + p * pitch;
      std::memcpy(to, a.data + (term + p) * a.width + row, rows * sizeof(float));
      for (long r = rows; r < padded; r++) to[r] = 0;
    }
    return pitch;
  }
  long pitch = DEPTH + 16;
  for (long r = 0; r < padded; r++) {
    float* to = out + r * pitch;
    if (r < rows)
      std::memcpy(to, a.data + (row + r) * a.width + term, depth * sizeof(float));
    else
      std::memset(to, 0, depth * sizeof(float));
  }
  return pitch;
}

// At most V x V values, whose rows lie `pitch` apart, turned; rows beyond the count are zero.
inline void turn(const float* from, long pitch, long rows, long columns, float* out) {
#if defined(__AVX512F__)
  __m512i r[16];
  UNROLL
  for (int i = 0; i < 16; i++) __builtin_prefetch(from + i * pitch + 2 * V);
  UNROLL
  for (int i = 0; i < 16; i++)
    r[i] = i < rows ? (__m512i)load(from + i * pitch, columns) : __m512i{};
  transpose(r);
  for (long p = 0; p < columns; p++) store(out + p * PANEL, (vec)r[p]);
#else
  for (long i = 0; i < V; i++)
    for (long p = 0; p < columns; p++) out[p * PANEL + i] = i < rows ? from[i * pitch + p] : 0;
#endif
}

// A panel of the right factor, [depth][PANEL], with zeros beyond its columns.
inline void copy_panel(const Matrix& b, long column, long count, long term, long depth, float* out) {
  if (b.turned) {
    for (long half = 0; half < PANEL; half += V)
      for (long p = 0; p < depth; p += V)
        turn(b.data + (column + half) * b.width + term + p, b.width, count - half, least(V, depth - p),
             out + p * PANEL + half);
    return;
  }
  const float* from = b.data + term * b.width + column;
  for (long p = 0; p < depth; p++, from += b.width) {
    float* to = out + p * PANEL;
    if (count >= PANEL)
      store(to, load(from)), store(to + V, load(from + V));
    else
      for (long i = 0; i < PANEL; i++) to[i] = i < count ? from[i] : 0;
  }
}

// One block of a product. `last(row, column, sums, count)` makes of finished sums what is stored;
// `row_sums`, of the left factor's rows, are added to where there are any.
template <class Last>
struct ProductBlock {
  Matrix a, b;
  float* out;
  long width;  // of `out`
  bool add;
  const Last& last;
  float* row_sums;
  const float* panels;  // of the whole right factor, if they are copied already
  long terms;           // of those

  // Sums over `depth` terms from `term` on.
  void run(long row, long rows, long column, long columns, long term, long depth) const {
    long room = up(rows, ROWS) * (DEPTH + 16) + 3 * V * DEPTH;
    float* left = product_scratch.get(room + up(columns, PANEL) * DEPTH);
    float* right = left + room;
    // Whole tiles of rows are read where they lie.
    bool direct = !a.turned && a.width % CROWDED;
    long whole = direct ? rows / ROWS * ROWS : 0;
    for (long p = 0; p < depth; p += DEPTH) {
      long count = least(DEPTH, depth - p);
      long pitch = copy_left(a, row + whole, rows - whole, term + p, count, left);
      for (long j = 0; !panels && j < columns; j += PANEL)
        copy_panel(b, column + j, columns - j, term + p, count, right + j * count);
      if (row_sums && !column) sum_rows(left, pitch, row, rows, count);
      bool before = add || p, end = p + DEPTH >= depth;
      auto tile = [&](long i, long j) {
        vec sums[ROWS][2];
        const float* panel = panels ? panels + (column + j) * terms + p * PANEL : right + j * count;
        bool in_place = i < whole, wide = columns - j > V;
        const float* from = a.turned ? left + i : in_place ? a.data + (row + i) * a.width + term + p
                                                          : left + (i - whole) * pitch;
        if (a.turned)
          (wide ? tile_sums<true, 2> : tile_sums<true, 1>)(from, pitch, panel, count, sums);
        else
          (wide ? tile_sums<false, 2> : tile_sums<false, 1>)(from, in_place ? a.width : pitch, panel,
                                                             count, sums);
        for (long half = 0; half < (wide ? 2 : 1); half++) {
          long some = columns - j - half * V, to = column + j + half * V;
          // Whole registers have their own copy: there loads and stores test nothing.
          if (some >= V)
            write(sums, half, row + i, least(ROWS, rows - i), to, V, before, end);
          else
            write(sums, half, row + i, least(ROWS, rows - i), to, some, before, end);
        }
      };
      // Few terms: results are the traffic, written row by row. Many: the factors are.
      if (columns * count <= RIGHT_CACHE)
        for (long i = 0; i < rows; i += ROWS)
          for (long j = 0; j < columns; j += PANEL) tile(i, j);
      else
        for (long j = 0; j < columns; j += PANEL)
          for (long i = 0; i < rows; i += ROWS) tile(i, j);
    }
  }

  inline __attribute__((always_inline)) void write(const vec (*sums)[2], long half, long row, long rows,
                                                   long column, long count, bool before, bool end) const {
    float* to = out + row * width + column;
    for (long r = 0; r < rows; r++, to += width) {
      vec x = sums[r][half];
      if (before) x += load(to, count);
      if (end) x = last(row + r, column, x, count);
      store(to, x, count);
    }
  }

  void sum_rows(const float* left, long pitch, long row, long rows, long depth) const {
    if (!a.turned) return;
    for_vectors(rows, [&](long r, long n) {
      vec total = load(row_sums + row + r, n);
      for (long p = 0; p < depth; p++) total += load(left + p * pitch + r);
      store(row_sums + row + r, total, n);
    });
  }
};

struct AsIs {
  vec operator()(long, long, vec x, long) const { return x; }
};

// How a product is cut: sums by its shape alone; blocks, which change no result, by the threads too.
struct Cut {
  long rows, columns, down, across, parts;

  Cut(long m, long n, long k, long threads) {
    long block = least(BLOCK_LEFT / least(k, DEPTH) / ROWS * ROWS, MOST_ROWS);
    across = (n + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS, down = (m + block - 1) / block;
    parts = most(1, least(k / PART, SHARES / (across * down)));
    if (across * down * parts < 4 * threads) {
      long wanted = (4 * threads + across * parts - 1) / (across * parts);
      down = most(down, least((m + LEAST_ROWS - 1) / LEAST_ROWS, wanted));
    }
    rows = up((m + down - 1) / down, ROWS), columns = up((n + across - 1) / across, PANEL);
    down = (m + rows - 1) / rows, across = (n + columns - 1) / columns;
  }
};

// out (m, n) = a b, sums over k, or with `add` that more. `row_sums`, (m,): of a, which is turned.
template <class Last = AsIs>
void tile_product(const Matrix& a, const Matrix& b, float* out, long m, long n, long k, bool add,
                  long threads, const Last& last = Last{}, float* row_sums = nullptr) {
  Cut cut(m, n, k, threads);
  long size = m * n + (row_sums ? up(m, V) : 0);
  float* sums = cut.parts > 1 ? part_scratch.get((cut.parts - 1) * size) : nullptr;
  if (row_sums) {
    std::memset(row_sums, 0, m * sizeof(float));
    for (long part = 1; part < cut.parts; part++)
      std::memset(sums + part * size - up(m, V), 0, m * sizeof(float));
  }
  // Blocks below each other share the panels of the right factor.
  float* panels = cut.parts == 1 && cut.down > 2 ? panel_scratch.get(up(n, PANEL) * k) : nullptr;
  if (panels)
    for_each(up(n, PANEL) / PANEL, threads, [&](long index) {
      long j = index * PANEL;
      copy_panel(b, j, n - j, 0, k, panels + j * k);
    });
  AsIs as_is;
  for_each(cut.down * cut.across * cut.parts, threads, [&](long index) {
    long part = index / (cut.down * cut.across), first = k * part / cut.parts;
    long i = index / cut.across % cut.down * cut.rows, j = index % cut.across * cut.columns;
    long height = least(cut.rows, m - i), breadth = least(cut.columns, n - j);
    long depth = k * (part + 1) / cut.parts - first;
    if (cut.parts == 1) {
      ProductBlock<Last>{a, b, out, n, add, last, row_sums, panels, k}.run(i, height, j, breadth, 0, k);
      return;
    }
    float* to = part ? sums + (part - 1) * size : out;
    float* totals = !row_sums ? nullptr : part ? to + m * n : row_sums;
    ProductBlock<AsIs> block{a, b, to, n, add && !part, as_is, totals, nullptr, 0};
    block.run(i, height, j, breadth, first, depth);
  });
  if (cut.parts == 1) return;
  for (long part = 1; row_sums && part < cut.parts; part++)
    for (long i = 0; i < m; i++) row_sums[i] += sums[part * size - up(m, V) + i];
  for_rows(m, n, threads, [&](long first, long count) {
    for (long i = first; i < first + count; i++)
      for_vectors(n, [&](long j, long some) {
        vec x = load(out + i * n + j, some);
        for (long part = 1; part < cut.parts; part++)
          x += load(sums + (part - 1) * size + i * n + j, some);
        store(out + i * n + j, last(i, j, x, some), some);
      });
  });
}

// Fortran's sgemm of the library that PyTorch brings: column-major, all arguments by address. Sides are
// read from the lower half of 64 bits where its integers have 32. Null where it hides it.
typedef void (*gemm_type)(const char* turn_a, const char* turn_b, const int64_t* m,
                          const int64_t* n, const int64_t* k, const float* alpha, const float* a,
                          const int64_t* a_width, const float* b, const int64_t* b_width,
                          const float* beta, float* c, const int64_t* c_width);
gemm_type gemm = nullptr;

// Which of the two computes a product, as products.py has measured.
enum Engine : long { TILED = 0, LIBRARY = 1 };

template <class Last = AsIs>
void product(long engine, const Matrix& a, const Matrix& b, float* out, int64_t m, int64_t n, int64_t k,
             bool add, long threads, const Last& last = Last{}, float* row_sums = nullptr) {
  if (engine != LIBRARY || !gemm)
    return tile_product(a, b, out, m, n, k, add, threads, last, row_sums);
  float one = 1, before = add;
  // Read as column-major, all three are transposed.
  gemm(b.turned ? "T" : "N", a.turned ? "T" : "N", &n, &m, &k, &one, b.data, &b.width, a.data,
       &a.width, &before, out, &n);
  if (row_sums)
    column_sums(k, m, row_sums, threads, [&](long first, long some, float* sums) {
      for (const float* row = a.data + first * a.width; some--; row += a.width)
        for_vectors(m, [&](long j, long c) { store(sums + j, load(sums + j) + load(row + j, c)); });
    });
  if (std::is_same<Last, AsIs>::value) return;
  for_rows(m, n, threads, [&](long first, long count) {
    for (long i = first; i < first + count; i++)
      for_vectors(n, [&](long j, long some) {
        float* to = out + i * n + j;
        store(to, last(i, j, load(to, some), some), some);
      });
  });
}

}  // namespace
