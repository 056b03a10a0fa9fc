// k-reciprocal encoding: parameters of the stages from neighbour lists to weighted sets.
//
// A row travels from its list of neighbours to its weighted set through the stages below. Every
// stage keeps its rows in CSR form with columns ascending, and every sum of floats has one order,
// so that PyTorch reference, C++ and CUDA give the same bits for any number of threads:
//
// * A dot product is summed as common/sums.h states.
// * A softmax is computed in double and rounded once. Whatever the order of its sum, two results
//   can differ only where the rounding to float is undecided to 1e-15.
// * A query expansion adds in the order of the neighbour list, then divides (IEEE) by the count.
#pragma once
#include <cstdint>

#include "common/csr.h"

namespace dhcl {

// Sets of neighbours are small, and a table smaller than kTableCells lets more blocks run beside
// each other.
constexpr int64_t kSetCells = 2048;

// positions[i, p]: where row i stands in the list of ranks[i, p]; -1 if nowhere.
struct ReciprocalParams {
  int16_t* positions;    // [N, width]
  const int32_t* ranks;  // [N, width]
  int64_t num_rows;      // N
  int64_t width;
};

struct KReciprocalParams {
  LinesParams lines;
  TableParams table;
  const int32_t* ranks;      // [N, width]
  const int16_t* positions;  // [N, width]
  int64_t num_rows;          // N
  int64_t width;
  int64_t k;
  int64_t half;
};

struct PairDotsParams {
  float* dots;                // [nnz]
  const float* features;      // [N, d]
  const int32_t* ranks;       // [N, width]
  const float* similarities;  // [N, width] or null
  const int64_t* offsets;     // [rows + 1]
  const int32_t* columns;     // [nnz]
  int64_t num_rows;           // N
  int64_t dim;                // d
  int64_t width;
  int64_t begin;
  int64_t rows;
};

struct SoftmaxParams {
  float* weights;          // [nnz]
  const float* logits;     // [nnz]
  const int64_t* offsets;  // [rows + 1]
  int64_t rows;
};

struct QueryExpandParams {
  LinesParams lines;
  TableParams table;
  const int32_t* ranks;    // [N, width]
  const int64_t* offsets;  // [N + 1]
  const int32_t* columns;  // [nnz]
  const float* values;     // [nnz]
  int64_t num_rows;        // N
  int64_t width;
  int64_t k2;
};

// The stream is a cudaStream_t; no launcher synchronises with the host.
void launch_reciprocal_positions(const ReciprocalParams& p, void* stream);
void launch_k_reciprocal(const KReciprocalParams& p, void* stream);
void launch_pair_dots(const PairDotsParams& p, void* stream);
void launch_softmax_rows(const SoftmaxParams& p, void* stream);
void launch_query_expand(const QueryExpandParams& p, void* stream);

}  // namespace dhcl
