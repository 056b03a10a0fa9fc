// Nearest neighbours by inner product: parameters and launchers of the kernels.
//
// The similarity of two rows has one definition, so that the PyTorch reference, the C++ code and
// the CUDA kernels give the same bits for any number of threads and any block size:
//
// * Each product x[j] * y[j] is rounded to fp32, and they are summed as common/sums.h states.
//
// A matrix product gives this number up to a known bound only. It is used to find candidates: the
// `keep` largest products of a row are kept, re-scored in the order above, and the row is certified
// if its k-th score exceeds the smallest product kept by more than the bound.
#pragma once
#include <cstdint>

namespace dhcl {

// Adds the entries of a tile of products to the candidates of its rows. Row r of the state holds
// counts[r] <= capacity candidates in front, -inf and -1 behind them; among them are the `keep`
// largest entries seen so far, and all that was dropped is <= thresholds[r] (-inf: nothing was).
struct KnnSelectParams {
  float* values;      // [R, capacity]
  int32_t* indices;   // [R, capacity]
  int32_t* counts;    // [R]
  float* thresholds;  // [R]
  const float* tile;  // [m, n] product of query row_start + r with feature col_start + c
  int64_t num_rows;   // R
  int64_t capacity;   // > keep
  int64_t tile_rows;  // m
  int64_t tile_cols;  // n
  int64_t row_start;
  int64_t col_start;
  int64_t keep;
  bool mirror;       // add entry (r, c) to row col_start + c as feature row_start + r instead
  bool self_search;  // the queries are the features: leave out a row's product with itself
};

// scores[r, c] <- similarity of query r and feature candidates[r, c], -inf where that is -1.
struct KnnScoresParams {
  float* scores;              // [R, C]
  const float* queries;       // [R, d]
  const float* features;      // [N, d]
  const int64_t* candidates;  // [R, C]
  int64_t num_rows;           // R
  int64_t num_candidates;     // C
  int64_t num_features;       // N
  int64_t dim;                // d
};

// The largest capacity launch_knn_select takes: a row's candidates are sorted in shared memory.
constexpr int64_t kMaxCapacity = 2048;

// The stream is a cudaStream_t; no launcher synchronises with the host. launch_knn_select takes no
// mirrored tile: transpose it first.
void launch_knn_select(const KnnSelectParams& p, void* stream);
void launch_knn_scores(const KnnScoresParams& p, void* stream);

}  // namespace dhcl
