// Threads are those of the OpenMP library that PyTorch has loaded, whose entry point comes from Python:
// linking another would start a second set of threads. Work is cut by shape alone and partial sums are
// added in order, so results do not depend on the number of threads.
#pragma once

#include <atomic>

#include "memory.h"
#include "vectors.h"

namespace {

constexpr long PARTS = 32;  // of work: at most where rows are summed, at least in convolutions

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

// Calls `task(first, count)` for parts of `rows` rows of c values.
template <class Task>
void for_rows(long rows, long c, long threads, const Task& task) {
  long part = most(1, 8192 / c);
  for_each((rows + part - 1) / part, threads,
           [&](long i) { task(i * part, least(part, rows - i * part)); });
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

}  // namespace
