// The order in which the elements of a row are summed: stated here, and written once for the CPU
// (below) and once for CUDA (device.h).
//
// Each term is rounded and added to one of 128 columns, which start at zero (element j goes to
// column j mod 128, in ascending j); then the upper half of the columns is added to the lower half,
// 64, 32, ..., 1. Nothing is fused. The order suits a vector unit and a warp alike, so the PyTorch
// reference, the C++ code and the CUDA kernels give the same bits, for any number of threads and
// any vector width.
#pragma once
#include <cstdint>

namespace dhcl {

constexpr int64_t kSumColumns = 128;

#ifndef __CUDACC__
// The inner product of two rows. Inlined into DHCL_CLONES functions, of which each has a version
// for its instruction set.
template <typename A>
__attribute__((always_inline)) inline A sum_of_products(const A* x, const A* y, int64_t d) {
  alignas(64) A columns[kSumColumns] = {};
  const int64_t whole = d / kSumColumns * kSumColumns;
  for (int64_t j = 0; j < whole; j += kSumColumns)
    for (int64_t c = 0; c < kSumColumns; ++c) columns[c] += x[j + c] * y[j + c];
  for (int64_t c = 0; c < d - whole; ++c) columns[c] += x[whole + c] * y[whole + c];
  for (int64_t half = kSumColumns / 2; half > 0; half /= 2)
    for (int64_t c = 0; c < half; ++c) columns[c] += columns[c + half];
  return columns[0];
}
#endif

}  // namespace dhcl
