// Focal modulation on CPUs: depthwise convolutions, norms and whole blocks, NHWC. Arithmetic is float32,
// but for products of bfloat16 in the tile registers of AMX.
//
// Built for the CPU it runs on, see native.py. `vec` is one register; every function is written once
// for all widths. Threads are those of the OpenMP library that PyTorch has loaded, whose entry points
// come from Python: linking another would start a second set of threads. Work is cut by shape alone
// and partial sums are added in order, so results do not depend on the number of threads.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR 16
#define ROWS 12  // rows of a tile of a matrix product: 2 x ROWS sums fit the registers
#elif defined(__AVX__)
#define VECTOR 8
#define ROWS 6
#else
#define VECTOR 4
#define ROWS 6
#endif

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

// Loops over registers are unrolled whole, or their arrays stay in memory.
#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr long V = VECTOR;
constexpr long PANEL = 2 * V;   // columns of a tile of a matrix product
constexpr long SIDE = 4 * V;    // columns of a tile of a map
constexpr long HEIGHT = 16;     // rows of a tile of a map
constexpr long CHANNELS = 32;   // channels of a tile of a map: two cache lines of float32
constexpr long GROUPS = CHANNELS / V;
constexpr long HIDDEN = 384;    // part of the hidden layer that is computed at once
constexpr long LEVELS = 8;      // at most
constexpr long PARTS = 32;      // of work: at most where rows are summed, at least in convolutions
constexpr long TILES = 64;      // that a block is cut into at least, of 4 x ROWS pixels at least
constexpr long LARGE_PAGE = 2 * 1024 * 1024;  // bytes
constexpr long CACHE = 256 * 1024;  // bytes of the left matrix of a product, for half of the cache
constexpr long KEPT = 64 * 1024 * 1024;  // bytes that a thread keeps for the maps of its next block
constexpr long TILE_CACHE = 512 * 1024;   // bytes of all rows, where there are tile registers
constexpr long MANY_ROWS = 128;  // for which reading the weights of a wide block pays

typedef float vec __attribute__((vector_size(4 * VECTOR)));
typedef float loose __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * VECTOR)));
typedef uint32_t uvec __attribute__((vector_size(4 * VECTOR)));
typedef uint16_t half __attribute__((vector_size(2 * VECTOR)));
typedef uint16_t loose_half __attribute__((vector_size(2 * VECTOR), aligned(2), may_alias));

inline vec splat(float x) { return x - vec{}; }  // unlike a sum, exact for -0
inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }

inline vec load(const uint16_t* p) {
  half bits = *reinterpret_cast<const loose_half*>(p);
#if defined(__AVX512F__)
  return (vec)((uvec)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#else
  return (vec)(__builtin_convertvector(bits, uvec) << 16);
#endif
}

inline void store(uint16_t* p, vec x) {  // to nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__)
  *reinterpret_cast<loose_half*>(p) = (half)_mm512_cvtneps_pbh((__m512)x);
#else
  uvec bits = (uvec)x;
  uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uvec nan = (uvec)(x != x);
  rounded = (rounded & ~nan) | (0x7fc0 & nan);
  *reinterpret_cast<loose_half*>(p) = __builtin_convertvector(rounded, half);
#endif
}

template <class T>
inline vec load(const T* p, long count) {
  if (count >= V) return load(p);
  T part[V] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

template <class T>
inline void store(T* p, vec x, long count) {
  if (count >= V) return store(p, x);
  T part[V];
  store(part, x);
  std::memcpy(p, part, count * sizeof(T));
}

// Calls `body(i, n)` for parts of n <= V of `count` values. Whole registers have their own copy of
// the loop: there n is a constant, and loads and stores test nothing.
template <class Body>
inline void for_vectors(long count, const Body& body) {
  long i = 0;
  for (; i + V <= count; i += V) body(i, V);
  if (i < count) body(i, count - i);
}

inline float sum(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0;
  for (long i = 0; i < V; i++) total += x[i];
  return total;
#endif
}

// erf(x / sqrt 2) as a quotient of polynomials in x^2, fitted on |x| < 5.6; error 4.5e-7.
inline vec error_function(vec x) {
  vec bound = splat(5.6f);
  vec z = x > bound ? bound : x < -bound ? -bound : x;
  vec t = z * z;
  vec p = t * 4.4291002865293194e-08f + 1.271301880478859e-05f;
  p = p * t + 0.000347695779055357f;
  p = p * t + 0.009414482861757278f;
  p = p * t + 0.06875166296958923f;
  p = p * t + 0.797884464263916f;
  vec q = t * 1.1802159178841976e-06f + 7.510100840590894e-05f;
  q = q * t + 0.0019129618303850293f;
  q = q * t + 0.028939926996827126f;
  q = q * t + 0.25283312797546387f;
  q = q * t + 1.0f;
  return z * p / q;
}


// exp(x) for x <= 0: 2^n times a polynomial on half a binary digit.
inline vec exponential(vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  vec shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  ivec n = (ivec)shifted - 0x4b400000;
  vec r = x - (shifted - 12582912.0f) * 0.693359375f;
  r = r + (shifted - 12582912.0f) * 2.12194440e-4f;
  vec y = r * (1.0f / 720) + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return y * (vec)((n + 127) << 23);
}

// GELU, its derivative, or both, of values that lie in memory as T.
template <class T>
struct Gelu {
  static vec value(vec x) {
    vec half_x = x * 0.5f;
    return half_x * error_function(x) + half_x;
  }
  static void pair(vec x, vec& value, vec& slope) {
    vec probability = error_function(x) * 0.5f + 0.5f;
    value = x * probability;
    slope = probability + x * exponential(x * x * -0.5f) * 0.398942280401432678f;
  }
  static vec slope(vec x) {
    vec unused, result;
    pair(x, unused, result);
    return result;
  }
};

#if defined(__AVX512F__)
// A function as cubic polynomials, each on a quarter from -4 to 3.5; 0 before, a line beyond.
struct Table {
  static constexpr float LEAST = -4.25f, GREATEST = 3.5f;
  alignas(64) float powers[4][32] = {};

  template <class Function>
  Table(const Function& function, float constant, float slope) {
    // Each goes through four values, those at both ends among them.
    constexpr double POINTS[] = {-1, -0.4472135954999579, 0.4472135954999579, 1};
    powers[0][31] = constant, powers[1][31] = slope;
    for (int i = 1; i < 31; i++) {
      double x[4], d[4];
      for (int k = 0; k < 4; k++) x[k] = LEAST + i * 0.25 + 0.125 * (1 + POINTS[k]);
      for (int k = 0; k < 4; k++) d[k] = function(x[k]);
      for (int step = 1; step < 4; step++)  // Newton's divided differences
        for (int k = 3; k >= step; k--) d[k] = (d[k] - d[k - 1]) / (x[k] - x[k - step]);
      double c[4] = {d[3]};
      for (int k = 2; k >= 0; k--) {
        for (int power = 3; power > 0; power--) c[power] = c[power - 1] - x[k] * c[power];
        c[0] = d[k] - x[k] * c[0];
      }
      for (int power = 0; power < 4; power++) powers[power][i] = c[power];
    }
  }

  // The number of an interval, in the lowest bits.
  static __m512i find(vec x) {
    constexpr float INTEGERS = 12582912.0f;  // where floats are: 1.5 * 2^23
    __m512 clamped = _mm512_min_ps(_mm512_max_ps((__m512)x, _mm512_set1_ps(LEAST)),
                                   _mm512_set1_ps(GREATEST));
    return _mm512_castps_si512(_mm512_fmadd_round_ps(
        clamped, _mm512_set1_ps(4), _mm512_set1_ps(INTEGERS - 4 * LEAST),
        _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  }

  vec operator()(vec x, __m512i interval) const {
    vec y{};
    UNROLL
    for (int i = 3; i >= 0; i--)
      y = y * x + (vec)_mm512_permutex2var_ps(_mm512_load_ps(powers[i]), interval,
                                              _mm512_load_ps(powers[i] + 16));
    return y;
  }
};

inline double normal(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752); }
const Table VALUES([](double x) { return x * normal(x); }, 0, 1);
const Table SLOPES(
    [](double x) { return normal(x) + x * std::exp(-x * x / 2) * 0.39894228040143268; }, 1, 0);

// A tenth of what rounding to bfloat16 adds, in half the operations. Of infinity: NaN.
template <>
struct Gelu<uint16_t> {
  static vec value(vec x) { return VALUES(x, Table::find(x)); }
  static vec slope(vec x) { return SLOPES(x, Table::find(x)); }
  static void pair(vec x, vec& value, vec& slope) {
    __m512i interval = Table::find(x);
    value = VALUES(x, interval), slope = SLOPES(x, interval);
  }
};
#endif

// Threads

typedef void (*parallel_type)(void (*)(void*), void*, unsigned, unsigned);
parallel_type openmp_parallel = nullptr;

// Calls `task(i)` for all i < count; which thread takes which is open.
template <class Task>
void for_each(long count, long threads, const Task& task) {
  struct Work {
    std::atomic<long> next;
    long count;
    const Task& task;
  } work{{0}, count, task};
  auto run = [](void* pointer) {
    Work& shared = *static_cast<Work*>(pointer);
    for (long i; (i = shared.next.fetch_add(1)) < shared.count;) shared.task(i);
  };
  if (threads > count) threads = count;
  if (threads > 1 && openmp_parallel)
    openmp_parallel(run, &work, threads, 0);
  else
    run(&work);
}

// Memory

inline long up(long x, long step) { return (x + step - 1) / step * step; }
inline long least(long a, long b) { return a < b ? a : b; }
inline long most(long a, long b) { return a > b ? a : b; }

// Fresh memory costs a page fault for each 4 KiB, see docs/performance.md: ask for pages of 2 MiB
// where there are such.
void use_large_pages(void* memory, long bytes) {
#ifdef MADV_HUGEPAGE
  uintptr_t begin = up(reinterpret_cast<uintptr_t>(memory), LARGE_PAGE);
  uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / LARGE_PAGE * LARGE_PAGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Threads cannot hand an error to Python: say what would have been said there.
[[noreturn]] void end_without_memory(long bytes) {
  std::fprintf(stderr,
               "focalnet_det: there is no memory for %ld bytes in the native kernels. Take smaller "
               "images or batches; FOCALNET_DET_OPS=torch makes this an error in Python.\n",
               bytes);
  std::abort();
}

float* allocate(long floats) {
  long bytes = floats * sizeof(float), alignment = bytes < LARGE_PAGE ? 64 : LARGE_PAGE;
  void* memory = std::aligned_alloc(alignment, up(bytes, alignment));
  if (!memory) end_without_memory(bytes);
  use_large_pages(memory, bytes);
  return static_cast<float*>(memory);
}

// Memory of a thread, kept from call to call.
struct Scratch {
  float* data = nullptr;
  long size = 0;
  ~Scratch() { std::free(data); }
  float* get(long floats) {
    if (floats > size) {
      std::free(data);
      data = allocate(size = floats);
    }
    return data;
  }
};
thread_local Scratch scratch, map_scratch;

// Depthwise convolution: a tile of a map and its surroundings are copied to float32, one group of V
// channels after the other, with zeros outside the map. Borders, odd channel counts and 16-bit
// storage end there.

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

// Matrix products: a of `rows` rows, whose memory reaches to the next multiple of ROWS, times
// weights (n, k) that lie as panels[n / PANEL][k][PANEL]. `done(row, column, sums)` takes the
// results, V columns at a time.
template <class Done>
inline void multiply(const float* a, long pitch, long rows, const float* panels, long panel, long k,
                     long n, const Done& done) {
  for (long j = 0; j < n; j += PANEL, panels += panel)
    for (long i = 0; i < rows; i += ROWS) {
      vec sums[ROWS][2] = {};
      const float* left = a + i * pitch;
      for (long p = 0; p < k; p++) {
        vec first = load(panels + p * PANEL), second = load(panels + p * PANEL + V);
        UNROLL
        for (int r = 0; r < ROWS; r++) {
          vec factor = splat(left[r * pitch + p]);
          sums[r][0] += factor * first;
          sums[r][1] += factor * second;
        }
      }
      UNROLL
      for (int r = 0; r < ROWS; r++) {
        if (i + r >= rows) break;
        done(i + r, j, sums[r][0]);
        done(i + r, j + V, sums[r][1]);
      }
    }
}

#if HAS_TILES
// The same in bfloat16, by the tile registers of AMX: 16 rows of 64 bytes. A left operand is 16 rows of
// 32 values of k; a right one is 16 pairs of values of k, each of 16 columns; sums are 16 x 16 float32.
constexpr long OPERAND = 16 * 32;  // values of one

// Rows reach to the next multiple of 32, k is one, panels are [k / 32][2][OPERAND]. Needs TileRegisters.
template <class Done>
inline void multiply(const uint16_t* a, long pitch, long rows, const uint16_t* panels, long panel,
                     long k, long n, const Done& done) {
  alignas(64) float sums[32 * PANEL];
  long bytes = pitch * sizeof(uint16_t);
  for (long j = 0; j < n; j += PANEL, panels += panel)
    for (long i = 0; i < rows; i += 32) {
      const uint16_t *left = a + i * pitch, *below = left + 16 * pitch, *right = panels;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (long p = 0; p < k; p += 32, right += 2 * OPERAND) {
        _tile_loadd(4, left + p, bytes);
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + OPERAND, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below + p, bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, PANEL * 4);
      _tile_stored(1, sums + 16, PANEL * 4);
      _tile_stored(2, sums + 16 * PANEL, PANEL * 4);
      _tile_stored(3, sums + 16 * PANEL + 16, PANEL * 4);
      for (long r = 0; r < least(32, rows - i); r++) {
        done(i + r, j, load(sums + r * PANEL));
        done(i + r, j + V, load(sums + r * PANEL + V));
      }
    }
}

// 16 x 16 words of 32 bits.
inline void transpose(__m512i* r) {
  __m512i t[16];
  UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLL
  for (int i = 0; i < 16; i += 4)
    UNROLL
    for (int j = 0; j < 2; j++) {  // columns 2 j and 2 j + 1 of each quarter, of four rows
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  UNROLL
  for (int j = 0; j < 4; j++) {
    __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    __m512i odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    __m512i even_below = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    __m512i odd_below = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even, even_below, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
  }
  UNROLL
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

// A right operand: 16 columns of the product are rows of a weight (n, k) from there on. Values beyond
// it are zero.
inline void pack_operand(const uint16_t* weight, long n, long k, long row, long column,
                         uint16_t* out) {
  __m512i r[16];
  long count = k - column;
  __mmask32 inside = count >= 32 ? ~0u : (1u << count) - 1;
  UNROLL
  for (int i = 0; i < 16; i++)
    r[i] = row + i < n ? _mm512_maskz_loadu_epi16(inside, weight + (row + i) * k + column)
                       : _mm512_setzero_si512();
  transpose(r);
  UNROLL
  for (int i = 0; i < 16; i++) _mm512_store_si512(out + 32 * i, r[i]);
}

// All eight as 16 rows of 64 bytes, while this lives.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }
  ~TileRegisters() { _tile_release(); }
};

// Linux hands the registers out to processes that ask.
bool may_use_tiles() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  static const bool granted = !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
  return granted;
}
#endif

// Of the operands of matrix products: rows that their memory is a multiple of, and what k is.
template <class T>
constexpr long GRAIN = sizeof(T) == sizeof(float) ? ROWS : 32;
template <class T>
constexpr long STEP = sizeof(T) == sizeof(float) ? 1 : 32;

template <class T>
struct Linear {  // weight (n, k), bias (n), packed
  const T* weight;
  const float* bias;
  long n, k;
  T* panels = nullptr;
  float* biases = nullptr;
  long depth() const { return up(k, STEP<T>); }
  long floats() const { return up(n, PANEL) * (depth() * sizeof(T) / sizeof(float) + 1); }
  float* place(float* memory) {
    biases = memory, panels = reinterpret_cast<T*>(memory + up(n, PANEL));
    return memory + floats();
  }
  void pack(long panel) const {
    T* out = panels + panel * depth() * PANEL;
    long first = panel * PANEL, count = least(PANEL, n - first);
#if HAS_TILES
    if constexpr (sizeof(T) == 2)
      for (long p = 0; p < depth(); p += 32, out += 2 * OPERAND) {
        pack_operand(weight, n, k, first, p, out);
        pack_operand(weight, n, k, first + 16, p, out + OPERAND);
      }
    else
#endif
      for (long begin = 0; begin < k; begin += 16)
        for (long column = 0; column < PANEL; column++) {
          const T* source = weight + (first + column) * k;
          for (long p = begin; p < least(begin + 16, k); p++)
            out[p * PANEL + column] = column < count ? source[p] : 0;
        }
    for (long column = 0; column < PANEL; column++)
      biases[first + column] = column < count ? bias[first + column] : 0.0f;
  }
};

struct Norm {  // null pointers: none
  const float *weight, *bias;
  float eps;
  // Rows of c values, `pitch` apart and zero from c to there; `out` may be `x`.
  template <class From, class To>
  void operator()(const From* x, long rows, long c, long pitch, To* out) const {
    for (long i = 0; i < rows; i++, x += pitch, out += pitch) {
      vec total{}, squares{};
      for (long j = 0; j < pitch; j += V) total += load(x + j);
      vec mean = splat(sum(total) / c);
      for (long j = 0; j < c; j += V) {
        vec d = load(x + j) - mean;
        if (j + V > c)
          for (long lane = c - j; lane < V; lane++) d[lane] = 0;
        squares += d * d;
      }
      vec scale = splat(1 / std::sqrt(sum(squares) / c + eps));
      for (long j = 0; j < c; j += V) {
        vec y = (load(x + j) - mean) * scale * load(weight + j, c - j) + load(bias + j, c - j);
        store(out + j, y);
      }
    }
  }
};

}  // namespace

extern "C" {

struct Block {  // mirrored in native.py
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

namespace {

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

// Calls `task(first, count)` for parts of `rows` rows of c values.
template <class Task>
void for_rows(long rows, long c, long threads, const Task& task) {
  long part = most(1, 8192 / c);
  for_each((rows + part - 1) / part, threads,
           [&](long i) { task(i * part, least(part, rows - i * part)); });
}

// out = gelu(x + bias) * valid; null pointers count as 0 and 1.
template <class T>
void gelu_rows(const void* x, const void* bias, const float* valid, void* out, long rows, long c,
               long threads) {
  for_rows(rows, c, threads, [&](long first, long count) {
    const T *from = static_cast<const T*>(x) + first * c, *shift = static_cast<const T*>(bias);
    T* to = static_cast<T*>(out) + first * c;
    long width = valid || bias ? c : count * c;  // else all rows are one
    for (long i = 0; i < count * c; i += width)
      for_vectors(width, [&](long j, long n) {
        vec y = load(from + i + j, n);
        y = Gelu<T>::value(bias ? y + load(shift + j, n) : y);
        store(to + i + j, valid ? y * valid[first + i / c] : y, n);
      });
  });
}

// out = slope(before) * valid * (gates * grad_sum + grad_after); null pointers count as 1 and 0.
template <class T>
struct LevelBackward {
  const T *grad_sum, *gates, *grad_after, *before;
  const float* valid;
  T* out;
  // Rows from one value of the gates to the next, and rows that one of `grad_after` stands for.
  long rows, c, pitch, repeat;

  void operator()(long first, long count) const {
    for (long i = first; i < first + count; i++) {
      vec gate = gates ? splat(load(gates + i * pitch, 1)[0]) : splat(1);
      vec inside = valid ? splat(valid[i]) : splat(1);
      const T* after = grad_after ? grad_after + i / repeat * c : nullptr;
      for_vectors(c, [&](long j, long n) {
        vec y = load(grad_sum + i * c + j, n) * gate;
        if (after) y += load(after + j, n);
        vec slope = Gelu<T>::slope(load(before + i * c + j, n));
        store(out + i * c + j, y * inside * slope, n);
      });
    }
  }
};

template <class T>
void level_backward(const void* const* arrays, const float* valid, const long* numbers) {
  LevelBackward<T> run{static_cast<const T*>(arrays[0]), static_cast<const T*>(arrays[1]),
                       static_cast<const T*>(arrays[2]), static_cast<const T*>(arrays[3]), valid,
                       static_cast<T*>(const_cast<void*>(arrays[4])), numbers[0], numbers[1],
                       numbers[2], numbers[3]};
  for_rows(run.rows, run.c, numbers[4], run);
}

// Calls `task(first, count, sums)` for parts of the rows, each with sums of its own that start at
// zero, `width` of them, and adds those in order.
template <class Task>
void column_sums(long rows, long width, float* out, long threads, const Task& task) {
  long parts = most(1, least(PARTS, rows / V)), pitch = up(width, 16);
  float* sums = allocate(parts * pitch);
  for_each(parts, threads, [&](long part) {
    long first = rows * part / parts, end = rows * (part + 1) / parts;
    std::memset(sums + part * pitch, 0, pitch * sizeof(float));
    task(first, end - first, sums + part * pitch);
  });
  for_vectors(width, [&](long j, long n) {
    vec total{};
    for (long part = 0; part < parts; part++) total += load(sums + part * pitch + j);
    store(out + j, total, n);
  });
  std::free(sums);
}

// after = gelu(before + bias), gradient *= slope there; grad_bias: sums of the latter over the rows
template <class T>
void gelu_pair(const void* before, const void* bias, void* gradient, void* after, float* grad_bias,
               long rows, long c, long threads) {
  const T* shift = static_cast<const T*>(bias);
  column_sums(rows, c, grad_bias, threads, [&](long first, long count, float* sums) {
    for (long i = first; i < first + count; i++) {
      const T* from = static_cast<const T*>(before) + i * c;
      T *slope = static_cast<T*>(gradient) + i * c, *to = static_cast<T*>(after) + i * c;
      for_vectors(c, [&](long j, long n) {
        vec value, derivative;
        Gelu<T>::pair(load(from + j, n) + load(shift + j, n), value, derivative);
        vec y = load(slope + j, n) * derivative;
        store(to + j, value, n);
        store(slope + j, y, n);
        store(sums + j, load(sums + j) + y);
      });
    }
  });
}

// branch = x + (branch + bias) * factor of each `repeat` rows; a null pointer counts as 1
template <class T>
void residual(void* branch, const void* x, const void* bias, const float* factors, long rows, long c,
              long repeat, long threads) {
  const T* shift = static_cast<const T*>(bias);
  for_rows(rows, c, threads, [&](long first, long count) {
    for (long i = first; i < first + count; i++) {
      vec factor = splat(factors ? factors[i / repeat] : 1);
      const T* from = static_cast<const T*>(x) + i * c;
      T* to = static_cast<T*>(branch) + i * c;
      for_vectors(c, [&](long j, long n) {
        vec y = load(to + j, n) + load(shift + j, n);
        store(to + j, load(from + j, n) + y * factor, n);
      });
    }
  });
}

// out = (query + query_bias) * (modulator + h_bias)
template <class T>
void gate(const void* query, const void* query_bias, const void* modulator, const void* h_bias,
          void* out, long rows, long c, long threads) {
  const T *q_shift = static_cast<const T*>(query_bias), *h_shift = static_cast<const T*>(h_bias);
  for_rows(rows, c, threads, [&](long first, long count) {
    for (long i = first; i < first + count; i++) {
      const T* q = static_cast<const T*>(query) + i * c;
      const T* m = static_cast<const T*>(modulator) + i * c;
      for_vectors(c, [&](long j, long n) {
        vec y = (load(q + j, n) + load(q_shift + j, n)) * (load(m + j, n) + load(h_shift + j, n));
        store(static_cast<T*>(out) + i * c + j, y, n);
      });
    }
  });
}

// From the gradient by that: those by query and modulator, the latter in its place, and their sums
// over the rows, one after the other.
template <class T>
void gate_backward(void* gradient, const void* query, const void* query_bias, const void* modulator,
                   const void* h_bias, void* grad_query, float* sums, long rows, long c,
                   long threads) {
  const T *q_shift = static_cast<const T*>(query_bias), *h_shift = static_cast<const T*>(h_bias);
  long pitch = up(c, 16);  // whole registers are added
  float* both = allocate(2 * pitch);
  column_sums(rows, 2 * pitch, both, threads, [&](long first, long count, float* sums) {
    for (long i = first; i < first + count; i++) {
      const T* q = static_cast<const T*>(query) + i * c;
      const T* m = static_cast<const T*>(modulator) + i * c;
      T *by = static_cast<T*>(gradient) + i * c, *to = static_cast<T*>(grad_query) + i * c;
      for_vectors(c, [&](long j, long n) {
        vec g = load(by + j, n);
        vec grad_q = g * (load(m + j, n) + load(h_shift + j, n));
        vec grad_m = g * (load(q + j, n) + load(q_shift + j, n));
        store(to + j, grad_q, n);
        store(by + j, grad_m, n);
        store(sums + j, load(sums + j) + grad_q);
        store(sums + pitch + j, load(sums + pitch + j) + grad_m);
      });
    }
  });
  std::memcpy(sums, both, c * sizeof(float));
  std::memcpy(sums + c, both + pitch, c * sizeof(float));
  std::free(both);
}

// Only the first `count` values of a register.
inline vec first_lanes(vec x, long count) {
  ivec lane;
  for (int i = 0; i < V; i++) lane[i] = i;
  return count >= V ? x : lane < static_cast<int32_t>(count) ? x : vec{};
}

// Layer norm of rows of c values. Statistics of a row: mean and inverse deviation.
template <class T>
void norm_rows(const void* x, const void* weight, const void* bias, void* out, float* statistics,
               float eps, long rows, long c, long threads) {
  const T *scale = static_cast<const T*>(weight), *shift = static_cast<const T*>(bias);
  for_rows(rows, c, threads, [&](long first, long count) {
    for (long i = first; i < first + count; i++) {
      const T* from = static_cast<const T*>(x) + i * c;
      T* to = static_cast<T*>(out) + i * c;
      vec total{}, squares{};
      for_vectors(c, [&](long j, long n) { total += load(from + j, n); });
      vec mean = splat(sum(total) / c);
      for_vectors(c, [&](long j, long n) {
        vec d = first_lanes(load(from + j, n) - mean, n);
        squares += d * d;
      });
      vec inverse = splat(1 / std::sqrt(sum(squares) / c + eps));
      for_vectors(c, [&](long j, long n) {
        vec y = (load(from + j, n) - mean) * inverse;
        store(to + j, y * load(scale + j, n) + load(shift + j, n), n);
      });
      statistics[2 * i] = mean[0], statistics[2 * i + 1] = inverse[0];
    }
  });
}

// Gradients of that by x, to which `residual` is added if there is one, and, summed over the rows, by
// weight and bias.
template <class T>
void norm_backward(const void* gradient, const void* x, const void* weight, const float* statistics,
                   const void* residual, void* grad_x, float* grad_weight, float* grad_bias, long rows, long c, long threads) {
  const T* scale = static_cast<const T*>(weight);
  long pitch = up(c, 16);  // whole registers are added
  float* both = allocate(2 * pitch);
  column_sums(rows, 2 * pitch, both, threads, [&](long first, long count, float* sums) {
    for (long i = first; i < first + count; i++) {
      const T* from = static_cast<const T*>(x) + i * c;
      const T* by = static_cast<const T*>(gradient) + i * c;
      const T* more = residual ? static_cast<const T*>(residual) + i * c : nullptr;
      T* to = static_cast<T*>(grad_x) + i * c;
      vec mean = splat(statistics[2 * i]), inverse = splat(statistics[2 * i + 1]);
      vec total{}, product{};
      for_vectors(c, [&](long j, long n) {
        vec y = (load(from + j, n) - mean) * inverse, g = load(by + j, n);
        store(sums + j, load(sums + j) + g * y);
        store(sums + pitch + j, load(sums + pitch + j) + g);
        g *= load(scale + j, n);
        total += g, product += g * y;
      });
      vec shift = splat(sum(total) / c), slope = splat(sum(product) / c);
      for_vectors(c, [&](long j, long n) {
        vec y = (load(from + j, n) - mean) * inverse;
        vec g = load(by + j, n) * load(scale + j, n);
        vec result = (g - shift - y * slope) * inverse;
        store(to + j, more ? result + load(more + j, n) : result, n);
      });
    }
  });
  std::memcpy(grad_weight, both, c * sizeof(float));
  std::memcpy(grad_bias, both + pitch, c * sizeof(float));
  std::free(both);
}

// The gated sum: rows of `levels` contexts and of one shared by `repeat` rows, by their gates.
template <class T>
struct GatedSum {
  const void* const* contexts;
  const T* shared;
  T *gates, *total;
  long c, levels, repeat;

  const T* context(long level, long row) const {
    return level == levels ? shared + row / repeat * c
                           : static_cast<const T*>(contexts[level]) + row * c;
  }

  void sum_rows(long first, long count) const {
    for (long i = first; i < first + count; i++) {
      const T* from[LEVELS + 1];
      vec gate[LEVELS + 1];
      for (long level = 0; level <= levels; level++) {
        from[level] = context(level, i);
        gate[level] = splat(load(gates + i * (levels + 1) + level, 1)[0]);
      }
      for_vectors(c, [&](long j, long n) {
        vec y = load(from[0] + j, n) * gate[0];
        for (long level = 1; level <= levels; level++) y += load(from[level] + j, n) * gate[level];
        store(total + i * c + j, y, n);
      });
    }
  }

  // Gradients by the gates, from that by `total`.
  void gate_rows(long first, long count) const {
    for (long i = first; i < first + count; i++)
      for (long level = 0; level <= levels; level++) {
        vec y{};
        const T *from = context(level, i), *by = total + i * c;
        for_vectors(c, [&](long j, long n) { y += load(from + j, n) * load(by + j, n); });
        store(gates + i * (levels + 1) + level, splat(sum(y)), 1);
      }
  }
};

template <class T>
void gated_sum(const void* const* contexts, const void* shared, void* gates, void* total,
               const long* numbers) {
  long rows = numbers[0], c = numbers[1];
  GatedSum<T> run{contexts, static_cast<const T*>(shared), static_cast<T*>(gates),
                  static_cast<T*>(total), c, numbers[2], numbers[3]};
  bool backward = numbers[4];
  for_rows(rows, c, numbers[5], [&](long first, long count) {
    backward ? run.gate_rows(first, count) : run.sum_rows(first, count);
  });
}

// RoIAlign from the maps of a pyramid, float32, as in torchvision's ops/cpu/roi_align_kernel.cpp.

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

struct Pyramid {  // mirrored in native.py
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

template <class T>
void run_block(const Block& block) {
  BlockRun<T> run(block);
  run.project();
  run.contextualise();
  run.modulate();
}

}  // namespace

#include "native_branches.h"

extern "C" {

void focalnet_set_threads(void* parallel) {
  openmp_parallel = reinterpret_cast<parallel_type>(parallel);
}

void focalnet_set_gemm(void* sgemm) { gemm = reinterpret_cast<gemm_type>(sgemm); }

// `sixteen`: all arrays but `valid` are bfloat16, else float32. Null pointers: left out.

void focalnet_depthwise(const void* x, const void* kernel, const float* valid, void* before,
                        void* after, long n, long h, long w, long c, long size, long flip,
                        long sixteen, long threads) {
  auto run = sixteen ? convolve<uint16_t> : convolve<float>;
  run(x, kernel, valid, before, after, {n, h, w, c}, size, flip, threads);
}

void focalnet_gelu(const void* x, const void* bias, const float* valid, void* out, long rows, long c,
                   long sixteen, long threads) {
  (sixteen ? gelu_rows<uint16_t> : gelu_rows<float>)(x, bias, valid, out, rows, c, threads);
}

void focalnet_level_backward(const void* grad_sum, const void* gates, const void* grad_after,
                             const void* before, const float* valid, void* out, long rows, long c,
                             long pitch, long repeat, long sixteen, long threads) {
  const void* arrays[] = {grad_sum, gates, grad_after, before, out};
  const long numbers[] = {rows, c, pitch, repeat, threads};
  (sixteen ? level_backward<uint16_t> : level_backward<float>)(arrays, valid, numbers);
}

void focalnet_gelu_pair(const void* before, const void* bias, void* gradient, void* after,
                        float* grad_bias, long rows, long c, long sixteen, long threads) {
  auto run = sixteen ? gelu_pair<uint16_t> : gelu_pair<float>;
  run(before, bias, gradient, after, grad_bias, rows, c, threads);
}

void focalnet_residual(void* branch, const void* x, const void* bias, const float* factors, long rows,
                       long c, long repeat, long sixteen, long threads) {
  (sixteen ? residual<uint16_t> : residual<float>)(branch, x, bias, factors, rows, c, repeat,
                                                   threads);
}

void focalnet_gate(const void* query, const void* query_bias, const void* modulator,
                   const void* h_bias, void* out, long rows, long c, long sixteen, long threads) {
  (sixteen ? gate<uint16_t> : gate<float>)(query, query_bias, modulator, h_bias, out, rows, c,
                                           threads);
}

void focalnet_gate_backward(void* gradient, const void* query, const void* query_bias,
                            const void* modulator, const void* h_bias, void* grad_query, float* sums,
                            long rows, long c, long sixteen, long threads) {
  auto run = sixteen ? gate_backward<uint16_t> : gate_backward<float>;
  run(gradient, query, query_bias, modulator, h_bias, grad_query, sums, rows, c, threads);
}

void focalnet_norm(const void* x, const void* weight, const void* bias, void* out, float* statistics,
                   const float* eps, long rows, long c, long sixteen, long threads) {
  (sixteen ? norm_rows<uint16_t> : norm_rows<float>)(x, weight, bias, out, statistics, *eps, rows, c,
                                                     threads);
}

void focalnet_norm_backward(const void* gradient, const void* x, const void* weight,
                            const float* statistics, const void* residual, void* grad_x,
                            float* grad_weight, float* grad_bias, long rows, long c, long sixteen,
                            long threads) {
  auto run = sixteen ? norm_backward<uint16_t> : norm_backward<float>;
  run(gradient, x, weight, statistics, residual, grad_x, grad_weight, grad_bias, rows, c, threads);
}

// `backward`: `gates` are written, from the gradient `total`; else the other way around.
void focalnet_gated_sum(const void* const* contexts, const void* shared, void* gates, void* total,
                        long rows, long c, long levels, long repeat, long backward, long sixteen,
                        long threads) {
  const long numbers[] = {rows, c, levels, repeat, backward, threads};
  (sixteen ? gated_sum<uint16_t> : gated_sum<float>)(contexts, shared, gates, total, numbers);
}

void focalnet_depthwise_weight(const void* x, const void* gradient, void* out, long n, long h,
                               long w, long c, long size, long sixteen, long threads) {
  Map map{n, h, w, c};
  if (sixteen)
    weight_gradient(static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(gradient), map,
                    size, static_cast<uint16_t*>(out), threads);
  else
    weight_gradient(static_cast<const float*>(x), static_cast<const float*>(gradient), map, size,
                    static_cast<float*>(out), threads);
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
  return 0;
#endif
}

// Whole branches in training, see native_branches.h. Numbers: n, h, w, c, threads, and those that the
// branch adds.

void focalnet_modulation(float* const* tensors, const long* numbers, const float* reals,
                         long backward) {
  ModulationBranch branch{};
  branch.n = numbers[0], branch.h = numbers[1], branch.w = numbers[2], branch.c = numbers[3];
  branch.pixels = branch.h * branch.w, branch.threads = numbers[4];
  branch.keeps_modulator = numbers[5], branch.levels = numbers[6];
  for (long level = 0; level < branch.levels; level++) branch.sizes[level] = numbers[7 + level];
  branch.eps = reals[0], branch.divisor = reals[1];
  run_branch(branch, tensors, backward);
}

void focalnet_mlp(float* const* tensors, const long* numbers, const float* reals, long backward) {
  MlpBranch branch{};
  branch.n = numbers[0], branch.pixels = numbers[1] * numbers[2], branch.c = numbers[3];
  branch.threads = numbers[4], branch.width = numbers[5], branch.eps = reals[0];
  run_branch(branch, tensors, backward);
}

void focalnet_block(const Block* block) {
#if HAS_TILES
  if (block->sixteen_products) return run_block<uint16_t>(*block);
#endif
  run_block<float>(*block);
}
}
