// The gradient of a depthwise convolution by its kernel.
#pragma once

#include "maps.h"

namespace {

// Adds to sums[row of the kernel][column][V] the products of one row of the map.
template <int COLUMNS, int LINES>
inline void products(const float* patch, long pitch, const float* gradient, long width, float* sums) {
  vec total[LINES][COLUMNS];
  UNROLL
  for (int i = 0; i < LINES; i++)
    UNROLL
    for (int j = 0; j < COLUMNS; j++) total[i][j] = load(sums + (i * COLUMNS + j) * V);
  for (long p = 0; p < width; p++) {
    vec factor = load(gradient + p * V);
    UNROLL
    for (int i = 0; i < LINES; i++)
      UNROLL
      for (int j = 0; j < COLUMNS; j++)
        total[i][j] += factor * load(patch + i * pitch + (p + j) * V);
  }
  UNROLL
  for (int i = 0; i < LINES; i++)
    UNROLL
    for (int j = 0; j < COLUMNS; j++) store(sums + (i * COLUMNS + j) * V, total[i][j]);
}

template <int COLUMNS, int LINES>
void tile_products(const float* patch, const float* gradient, const Tile& tile, const Map& map,
                   float* sums) {
  long radius = COLUMNS / 2, pitch = (tile.width + 2 * radius) * V;
  for (long y = 0; y < tile.height; y++)
    for (long i = 0; i < COLUMNS; i += LINES) {
      long source = tile.y + y + i - radius;
      if (source + LINES <= 0 || source >= map.h) continue;  // zeros
      products<COLUMNS, LINES>(patch + (y + i) * pitch, pitch, gradient + y * tile.width * V,
                               tile.width, sums + i * COLUMNS * V);
    }
}

typedef void (*products_type)(const float*, const float*, const Tile&, const Map&, float*);

constexpr products_type PRODUCTS[] = {
    tile_products<1, 1>,  tile_products<3, 3>,  tile_products<5, 1>,  tile_products<7, 1>,
    tile_products<9, 1>,  tile_products<11, 1>, tile_products<13, 1>, tile_products<15, 1>,
};

template <class T>
void weight_gradient(const T* data, const T* gradient, const Map& map, long size, T* out,
                     long threads) {
  long taps = size * size, radius = size / 2, groups = map.groups();
  long parts = least(map.tiles(), 16), block = GROUPS * taps * V;
  float* sums = static_cast<float*>(std::calloc(parts * groups * block, sizeof(float)));
  if (!sums) end_without_memory(parts * groups * block * sizeof(float));
  for_each(parts * groups, threads, [&](long index) {
    long part = index / groups, first = index % groups * CHANNELS;
    for (long t = map.tiles() * part / parts; t < map.tiles() * (part + 1) / parts; t++) {
      Tile tile(map, t);
      long area = (tile.height + 2 * radius) * (tile.width + 2 * radius) * V;
      long inner = tile.height * tile.width * V;
      float* patch = scratch.get(GROUPS * (area + inner));
      float* grad_out = patch + GROUPS * area;
      pack(data, map, tile, first, radius, patch);
      pack(gradient, map, tile, first, 0, grad_out);
      for (long group = 0; group < GROUPS && first + group * V < map.c; group++)
        PRODUCTS[radius](patch + group * area, grad_out + group * inner, tile, map,
                         sums + index * block + group * taps * V);
    }
  });
  for (long channel = 0; channel < map.c; channel++)
    for (long tap = 0; tap < taps; tap++) {
      long group = channel / CHANNELS, line = channel % CHANNELS / V;
      float total = 0;
      for (long part = 0; part < parts; part++)
        total += sums[(part * groups + group) * block + (line * taps + tap) * V + channel % V];
      store(out + channel * taps + tap, splat(total), 1);
    }
  std::free(sums);
}

}  // namespace
