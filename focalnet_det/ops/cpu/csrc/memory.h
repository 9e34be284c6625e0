// Memory: large pages, and what a thread keeps from call to call.
#pragma once

#include <cstdio>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vectors.h"

namespace {

constexpr long LARGE_PAGE = 2 * 1024 * 1024;  // bytes

// Fresh memory costs a page fault for each 4 KiB, see docs/benchmarks/design-notes.md: ask for pages of 2 MiB
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
thread_local Scratch scratch, map_scratch, product_scratch, panel_scratch, part_scratch;

}  // namespace
