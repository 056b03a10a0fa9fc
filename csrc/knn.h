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
  float* values;        // [R, capacity]
  int32_t* indices;     // [R, capacity]
  int32_t* counts;      // [R]
  float* thresholds;    // [R]
  const float* tile;    // [m, n] product of query row_start + r with feature col_start + c
  int64_t tile_stride;  // from one row of the tile to the next, in elements
  int64_t num_rows;     // R
  int64_t capacity;     // > keep
  int64_t tile_rows;    // m
  int64_t tile_cols;    // n
  int64_t row_start;
  int64_t col_start;
  int64_t keep;
  bool mirror;       // add entry (r, c) to row col_start + c as feature row_start + r instead
  bool self_search;  // the queries are the features: leave out a row's product with itself
};

// Of a self search's tile, the columns whose rows lie past those of the tile: only they take their
// entries from it too. An earlier column's row is, with this tile's rows, on the other side of the
// diagonal, and has these products from there.
inline int64_t first_mirrored_column(const KnnSelectParams& p) {
  const int64_t first = p.row_start + p.tile_rows - p.col_start;
  return first < 0 ? 0 : first < p.tile_cols ? first : p.tile_cols;
}

// The end of a search: scores the candidates of R rows and stores the best k, a row itself first
// in a self search. A product lies within bound[r] of its score once multiplied by unscale, so
// what is more than two bounds below the k-th largest product is not scored, nor what can't reach
// the row's floor. A place that nothing fills has similarity -inf and neighbour -1.
struct KnnRankParams {
  float* similarities;     // [R, k]
  int64_t* neighbours;     // [R, k]
  bool* certified;         // [R] whether no row that was dropped can be among the best
  const float* queries;    // [R, d]
  const float* features;   // [N, d]
  const float* values;     // [R, capacity], as KnnSelectParams has them
  const int32_t* indices;  // [R, capacity]
  const int32_t* counts;   // [R]
  const double* bound;     // [R]
  const float* floor;      // [R] scores below which neighbours are not needed, or null
  double unscale;
  int64_t num_rows;      // R
  int64_t num_features;  // N
  int64_t dim;           // d
  int64_t k;
  int64_t capacity;
  int64_t row_start;  // query r is feature row_start + r in a self search
  int64_t keep;       // as many of a row's largest candidates are looked at
  bool self_search;
  bool complete;  // nothing was dropped
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

// Rows times a power of two, rounded to fp16 for the product, with zeros behind them up to the
// sizes that its fast kernels ask for; squares[r] <- the squared norm of what rounding took from
// row r, summed as common/sums.h states.
struct KnnHalvesParams {
  void* halves;       // [height, width] fp16
  float* squares;     // [n]
  const float* rows;  // [n, d]
  float scale;
  int64_t num_rows;  // n
  int64_t dim;       // d
  int64_t height;    // >= n
  int64_t width;     // >= d, a multiple of 8
};

// The largest capacity of the CUDA kernels: a row's candidates are sorted in shared memory.
constexpr int64_t kMaxCapacity = 2048;

// The stream is a cudaStream_t; no launcher synchronises with the host. launch_knn_select_both adds
// a self search's tile to its rows and to the rows of its columns from first_mirrored_column on; it
// is fast where most entries are below the thresholds, and right everywhere.
void launch_knn_select(const KnnSelectParams& p, void* stream);
void launch_knn_select_both(const KnnSelectParams& p, void* stream);
void launch_knn_rank(const KnnRankParams& p, void* stream);
void launch_knn_scores(const KnnScoresParams& p, void* stream);
void launch_knn_halves(const KnnHalvesParams& p, void* stream);

}  // namespace dhcl
