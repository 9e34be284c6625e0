// Tiles of a map: a tile and its surroundings are copied to float32, one group of V channels after the
// other, with zeros outside the map. Borders, odd channel counts and 16-bit storage end there.
#pragma once

#include "memory.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr long SIDE = 4 * V;    // columns of a tile of a map
constexpr long HEIGHT = 16;     // rows of a tile of a map
constexpr long CHANNELS = 32;   // channels of a tile of a map: two cache lines of float32
constexpr long GROUPS = CHANNELS / V;

struct Map {
  long n, h, w, c;
  long rows() const { return (h + HEIGHT - 1) / HEIGHT; }
  long columns() const { return (w + SIDE - 1) / SIDE; }
  long groups() const { return (c + CHANNELS - 1) / CHANNELS; }
  long tiles() const { return n * rows() * columns(); }
};

struct Tile {
  long image, y, x, height, width;
  Tile(const Map& map, long index) {
    x = index % map.columns() * SIDE;
    index /= map.columns();
    y = index % map.rows() * HEIGHT;
    image = index / map.rows();
    height = least(HEIGHT, map.h - y);
    width = least(SIDE, map.w - x);
  }
};

// out[group][row][column][V]; rows and columns start `radius` before the tile.
template <class T>
void pack(const T* data, const Map& map, const Tile& tile, long first, long radius, float* out) {
  long height = tile.height + 2 * radius, width = tile.width + 2 * radius;
  for (long group = 0; group < GROUPS; group++) {
    long channel = first + group * V, count = map.c - channel;
    if (count <= 0) return;
    for (long i = 0; i < height; i++) {
      float* row = out + (group * height + i) * width * V;
      long y = tile.y + i - radius, left = tile.x - radius;
      long begin = 0, end = 0;
      if (y >= 0 && y < map.h) begin = most(0, -left), end = least(width, map.w - left);
      for (long j = 0; j < begin; j++) store(row + j * V, vec{});
      const T* source = data + ((tile.image * map.h + y) * map.w + left) * map.c + channel;
      if (count >= V)
        for (long j = begin; j < end; j++) store(row + j * V, load(source + j * map.c));
      else
        for (long j = begin; j < end; j++) store(row + j * V, load(source + j * map.c, count));
      for (long j = most(begin, end); j < width; j++) store(row + j * V, vec{});
    }
  }
}

// taps[group of V channels][k * k][V], with zeros in the channels from c to `padded`.
template <class T>
void pack_taps(const T* kernel, long c, long padded, long size, bool flip, float* out) {
  long taps = size * size;
  for (long channel = 0; channel < padded; channel++)
    for (long tap = 0; tap < taps; tap++) {
      vec value{};
      long source = flip ? taps - 1 - tap : tap;
      if (channel < c) value = load(kernel + channel * taps + source, 1);
      out[(channel / V * taps + tap) * V + channel % V] = value[0];
    }
}

}  // namespace
