// Sparse k-reciprocal Jaccard distance and DBSCAN: parameters of the stages and what each promises.
//
// A row travels from its list of neighbours to its line of the eps-graph through the stages below.
// Every stage keeps its rows in CSR form with columns ascending, and every sum of floats has one
// order, so that PyTorch reference, C++ and CUDA give the same bits for any number of threads:
//
// * A dot product is summed into 128 columns (element j goes to column j mod 128, in ascending j);
//   then the upper half of the columns is added to the lower half, 64, 32, ..., 1.
// * A softmax is computed in double and rounded once. Whatever the order of its sum, two results
//   can differ only where the rounding to float is undecided to 1e-15.
// * A query expansion adds in the order of the neighbour list, then divides (IEEE) by the count.
// * A sum of minima goes over the shared columns in ascending order. That is the order in which a
//   dense implementation meets them, and the columns that are not shared add zero there.
#pragma once
#include <cstdint>

namespace dhcl {

// A sum of weights in fixed point, so that it does not depend on the order: 2^40 is one.
constexpr double kFixedPoint = 1099511627776.0;
// What a pair that is no candidate holds instead of a sum. Weights vanish beside it in fp32, so it
// can be added to without asking.
constexpr float kAbsent = -1e30f;

// The weight two rows must share for J = 1 - t / (2 - t) <= eps, less what rounding can have cost.
// The sums of candidates, the weight that remains and the exact sums are each off by at most half
// an ulp per term.
inline double shared_weight_needed(float eps, int64_t longest_row) {
  const double theta = 2.0 * (1.0 - static_cast<double>(eps)) / (2.0 - static_cast<double>(eps));
  return theta - (1e-6 + static_cast<double>(longest_row) * 6.0 / 16777216.0);
}

}  // namespace dhcl
