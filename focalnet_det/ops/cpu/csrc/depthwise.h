// Depthwise convolution with what becomes of its results: GELU, mask, gated sum.
#pragma once

#include "gelu.h"
#include "maps.h"

namespace {

template <int COUNT>
inline void correlate(const float* patch, long pitch, const float* taps, long size, long begin,
                      long end, float* out) {
  vec sums[COUNT] = {};
  for (long i = begin; i < end; i++)
    for (long j = 0; j < size; j++) {
      vec tap = load(taps + (i * size + j) * V);
      const float* source = patch + i * pitch + j * V;
      UNROLL
      for (int p = 0; p < COUNT; p++) sums[p] += tap * load(source + p * V);
    }
  UNROLL
  for (int p = 0; p < COUNT; p++) store(out + p * V, sums[p]);
}

// What becomes of the sums of a level; null pointers are left out.
template <class T>
struct Level {
  T* before;           // GELU, (N, H, W, C)
  T* after;            // GELU
  T* total;            // (N, H, W, C) gated sum: written at the first level, then added to
  const float* gates;  // this level's, (N, H, W, pitch)
  long pitch;
  bool first;
  const float* valid;  // (N, H, W)
  float* sums;         // (tiles, C) over the pixels of a tile, after the GELU
};

template <class T>
vec finish(const float* sums, const Level<T>& level, long pixel, long c, long channel, long width) {
  long count = least(V, c - channel);
  vec total{};
  for (long j = 0; j < width; j++, pixel++) {
    vec x = load(sums + j * V);
    long place = pixel * c + channel;
    if (level.before) store(level.before + place, x, count);
    if (!level.after && !level.total) continue;
    x = Gelu<T>::value(x);
    if (level.valid) x *= level.valid[pixel];
    total += x;
    if (level.after) store(level.after + place, x, count);
    if (!level.total) continue;
    x *= level.gates[pixel * level.pitch];
    if (!level.first) x += load(level.total + place, count);
    store(level.total + place, x, count);
  }
  return total;
}

template <class T>
void depthwise(const T* data, const float* taps, const Map& map, long size, const Level<T>& level,
               long threads) {
  // Threads that write lines side by side take them from each other: they take different tiles, and
  // one takes neighbouring groups of a tile where there are enough tiles.
  long share = most(1, least(map.groups(), map.tiles() * map.groups() / PARTS));
  long shares = (map.groups() + share - 1) / share, radius = size / 2;
  for_each(map.tiles() * shares, threads, [&](long index) {
    long number = index % map.tiles(), group = index / map.tiles() * share;
    Tile tile(map, number);
    long pitch = (tile.width + 2 * radius) * V, height = tile.height + 2 * radius;
    float* patch = scratch.get(GROUPS * height * pitch + SIDE * V);
    float* sums = patch + GROUPS * height * pitch;
    for (long last = least(group + share, map.groups()); group < last; group++) {
      pack(data, map, tile, group * CHANNELS, radius, patch);
      for (long line = 0; line < GROUPS; line++) {
        long channel = group * CHANNELS + line * V;
        if (channel >= map.c) break;
        const float* weights = taps + channel * size * size;
        vec total{};
        for (long i = 0; i < tile.height; i++) {
          const float* row = patch + (line * height + i) * pitch;
          // Rows outside the map are zero.
          long begin = most(0, radius - tile.y - i);
          long end = least(size, map.h + radius - tile.y - i), j = 0;
          for (; j + 8 <= tile.width; j += 8)
            correlate<8>(row + j * V, pitch, weights, size, begin, end, sums + j * V);
          for (; j + 4 <= tile.width; j += 4)
            correlate<4>(row + j * V, pitch, weights, size, begin, end, sums + j * V);
          for (; j < tile.width; j++)
            correlate<1>(row + j * V, pitch, weights, size, begin, end, sums + j * V);
          long pixel = (tile.image * map.h + tile.y + i) * map.w + tile.x;
          total += finish(sums, level, pixel, map.c, channel, tile.width);
        }
        if (level.sums) store(level.sums + number * map.c + channel, total, map.c - channel);
      }
    }
  });
}

template <class T>
void convolve(const void* x, const void* kernel, const float* valid, void* before, void* after,
              const Map& map, long size, bool flip, long threads) {
  long padded = up(map.c, V);
  float* taps = allocate(padded * size * size);
  pack_taps(static_cast<const T*>(kernel), map.c, padded, size, flip, taps);
  Level<T> level{};
  level.before = static_cast<T*>(before), level.after = static_cast<T*>(after);
  level.valid = valid;
  depthwise(static_cast<const T*>(x), taps, map, size, level, threads);
  std::free(taps);
}

}  // namespace
