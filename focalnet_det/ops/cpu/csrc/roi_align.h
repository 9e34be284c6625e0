// RoIAlign from the maps of a pyramid, float32, as in torchvision's ops/cpu/roi_align_kernel.cpp.
#pragma once

#include "maps.h"

namespace {

// A point of a line of pixels: its two neighbours and their weights. Outside the line, low is -1.
struct Point {
  long low, high;
  float first, second;
};

inline Point point(float x, long size) {
  if (!(x >= -1 && x <= size)) return {-1, -1, 0, 0};
  if (x < 0) x = 0;
  long low = static_cast<long>(x);
  if (low >= size - 1) return {size - 1, size - 1, 1, 0};
  float part = x - low;
  return {low, low + 1, 1 - part, part};
}

struct Pyramid {  // mirrored in structs.py
  float* maps[LEVELS];  // (N, heights, widths, c)
  float scales[LEVELS];
  long heights[LEVELS], widths[LEVELS];
  const float* boxes;   // (count, 5): image, x0, y0, x1, y1
  const long* levels;   // of the boxes
  float* out;           // (count, size, size, c)
  long count, c, size, ratio, aligned, threads;
};

// One box: the results of its bins, or from gradients by those the gradients by the map, which are
// added to it; channels from `first` to `end`.
template <bool BACKWARD>
void pool(const Pyramid& p, long index, long first, long end) {
  const float* box = p.boxes + 5 * index;
  long level = p.levels[index], h = p.heights[level], w = p.widths[level], c = p.c;
  float scale = p.scales[level], shift = p.aligned ? 0.5f : 0.0f, corner[2], bin[2];
  long grid[2], sizes[2] = {w, h};
  for (int axis = 0; axis < 2; axis++) {
    corner[axis] = box[1 + axis] * scale - shift;
    float side = box[3 + axis] * scale - shift - corner[axis];
    if (!p.aligned && side < 1) side = 1;
    bin[axis] = side / p.size;
    grid[axis] = p.ratio > 0 ? p.ratio : most(0, static_cast<long>(std::ceil(bin[axis])));
  }
  Point* points[2];
  points[0] = reinterpret_cast<Point*>(
      scratch.get((grid[0] + grid[1]) * p.size * sizeof(Point) / sizeof(float) + 1));
  points[1] = points[0] + grid[0] * p.size;
  for (int axis = 0; axis < 2; axis++)
    for (long i = 0; i < p.size; i++)
      for (long k = 0; k < grid[axis]; k++)
        points[axis][i * grid[axis] + k] =
            point(corner[axis] + i * bin[axis] + (k + 0.5f) * bin[axis] / grid[axis], sizes[axis]);
  float* map = p.maps[level] + static_cast<long>(box[0]) * h * w * c;
  float part = 1.0f / most(1, grid[0] * grid[1]);
  for (long cell = 0; cell < p.size * p.size; cell++) {
    const Point *rows = points[1] + cell / p.size * grid[1], *columns = points[0] + cell % p.size * grid[0];
    float* out = p.out + (index * p.size * p.size + cell) * c;
    for_vectors(end - first, [&](long j, long n) {
      j += first;
      vec total{}, by = BACKWARD ? load(out + j, n) * part : vec{};
      for (const Point* y = rows; y < rows + grid[1]; y++)
        for (const Point* x = columns; x < columns + grid[0]; x++) {
          if (y->low < 0 || x->low < 0) continue;
          float *above = map + y->low * w * c + j, *below = map + y->high * w * c + j;
          if constexpr (BACKWARD) {
            auto add = [&](float* to, float weight) { store(to, load(to, n) + by * weight, n); };
            add(above + x->low * c, y->first * x->first);
            add(above + x->high * c, y->first * x->second);
            add(below + x->low * c, y->second * x->first);
            add(below + x->high * c, y->second * x->second);
          } else {
            total += load(above + x->low * c, n) * (y->first * x->first);
            total += load(above + x->high * c, n) * (y->first * x->second);
            total += load(below + x->low * c, n) * (y->second * x->first);
            total += load(below + x->high * c, n) * (y->second * x->second);
          }
        }
      if (!BACKWARD) store(out + j, total * part, n);
    });
  }
}

}  // namespace
