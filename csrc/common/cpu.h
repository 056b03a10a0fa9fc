// Building blocks of the CPU code: multiversioned row loops, dynamic scheduling.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

#include "sums.h"
#include "torch_glue.h"

// A build on the user's own machine has its full instruction set (-march=native, DHCL_NATIVE). What
// a wheel carries must run anywhere, so its hot loops exist in several versions and the loader
// picks. All are built with -ffp-contract=off: the versions differ in speed, never in bits.
#if !defined(DHCL_NATIVE) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DHCL_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define DHCL_CLONES
#endif

namespace dhcl {

// Elements of work below which waking another thread costs more than it saves. Tests of threads
// lower it.
#ifndef DHCL_PARALLEL_ELEMENTS
#define DHCL_PARALLEL_ELEMENTS (1 << 18)
#endif
constexpr int64_t kParallelElements = DHCL_PARALLEL_ELEMENTS;

// Runs body(task) for every task in [0, tasks) on torch's threads; a thread that is done takes the
// next block of tasks, so that tasks of uneven size keep all threads busy. elements is the whole
// work, in elements touched: too little of it stays on this thread. The first exception is thrown
// again here, since none may cross torch's C interface.
template <typename Body>
void parallel_tasks(int64_t tasks, int64_t block, int64_t elements, const Body& body) {
  if (tasks <= 0) return;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&](int64_t, int64_t) {
    try {
      for (int64_t begin; (begin = next.fetch_add(block)) < tasks;)
        for (int64_t task = begin; task < std::min(begin + block, tasks); ++task) body(task);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
      next = tasks;
    }
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (threads <= 1 || tasks <= block || elements < kParallelElements) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
  if (error) std::rethrow_exception(error);
}

// Rows go to threads in tasks of this many.
constexpr int64_t kRowsPerTask = 64;
inline int64_t tasks_for(int64_t rows) { return (rows + kRowsPerTask - 1) / kRowsPerTask; }

// Runs body(row) for every row in [0, rows), as parallel_tasks does for tasks of rows.
template <typename Body>
void parallel_rows(int64_t rows, int64_t block, int64_t elements, const Body& body) {
  parallel_tasks(tasks_for(rows), block, elements, [&](int64_t task) {
    const int64_t stop = std::min((task + 1) * kRowsPerTask, rows);
    for (int64_t row = task * kRowsPerTask; row < stop; ++row) body(row);
  });
}

}  // namespace dhcl
