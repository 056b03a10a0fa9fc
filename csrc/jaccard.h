// Sparse Jaccard distance of weighted sets: parameters of the stages and what each promises.
//
// Rows are in CSR form with columns ascending. A sum of minima goes over the shared columns in
// ascending order. That is the order in which a dense implementation meets them, and the columns
// that are not shared add zero there, so PyTorch reference, C++ and CUDA give the bits of a dense
// computation.
#pragma once
#include <cstdint>

#include "common/csr.h"

#ifdef __CUDACC__
#define DHCL_HOST_DEVICE __host__ __device__
#else
#define DHCL_HOST_DEVICE
#endif

namespace dhcl {

// A sum of weights in fixed point, so that it does not depend on the order: 2^40 is one.
constexpr double kFixedPoint = 1099511627776.0;
// What a pair that is no candidate holds instead of a sum. Weights vanish beside it in fp32, so it
// can be added to without asking.
constexpr float kAbsent = -1e30f;

// The weight two rows must share for J = 1 - t / (2 - t) <= eps, less what rounding can have cost.
// The sums of candidates, the weight that remains and the exact sums are each off by at most half
// an ulp per term. (A contracted multiply-add changes nothing here: the product is exact.)
DHCL_HOST_DEVICE inline double shared_weight_needed(float eps, int64_t longest_row) {
  const double theta = 2.0 * (1.0 - static_cast<double>(eps)) / (2.0 - static_cast<double>(eps));
  return theta - (1e-6 + static_cast<double>(longest_row) * 6.0 / 16777216.0);
}

struct IndexParams {
  int32_t* order;          // [nnz]
  int32_t* prefix;         // [N]
  int64_t* list_offsets;   // [N + 1]
  int64_t* list_split;     // [N]
  int32_t* list_rows;      // [nnz]
  float* list_values;      // [nnz]
  const int64_t* offsets;  // [N + 1]
  const int32_t* columns;  // [nnz]
  const float* values;     // [nnz]
  uint64_t* pool;          // [nnz] scratch
  int64_t* next;           // [N] scratch
  int64_t* tiles;          // [scan_tiles(N)] scratch
  int64_t* longest;        // [1] scratch
  int64_t num_rows;        // N
  int64_t nnz;
  float eps;
};

struct JoinParams {
  LinesParams lines;
  TableParams table;
  const int64_t* offsets;       // [N + 1]
  const int32_t* columns;       // [nnz]
  const float* values;          // [nnz]
  const int32_t* order;         // [nnz]
  const int32_t* prefix;        // [N]
  const int64_t* list_offsets;  // [N + 1]
  const int64_t* list_split;    // [N]
  const int32_t* list_rows;     // [nnz]
  const float* list_values;     // [nnz]
  int64_t* longest;             // [1] scratch
  int64_t num_rows;             // N
  int64_t mean_row;             // nnz / N + 1
  float eps;
};

// The full matrix from its upper triangle: count, scan full_offsets, fill, gather.
struct MirrorParams {
  int64_t* full_offsets;   // [N + 1]
  int64_t* next;           // [N] scratch
  uint64_t* pool;          // [full_offsets[N]] for the fill
  const int64_t* offsets;  // [N + 1]
  const int32_t* columns;  // [nnz]
  const float* values;     // [nnz]
  int64_t num_rows;        // N
};

struct JaccardRowsParams {
  float* distances;             // [rows, N]
  const int64_t* offsets;       // [N + 1]
  const int32_t* columns;       // [nnz]
  const float* values;          // [nnz]
  const int64_t* list_offsets;  // [N + 1]
  const int32_t* list_rows;     // [nnz]
  const float* list_values;     // [nnz]
  int64_t num_rows;             // N
  int64_t begin;
  int64_t rows;
};

// The stream is a cudaStream_t; no launcher synchronises with the host.
void launch_inverted_index(const IndexParams& p, void* stream);
void launch_jaccard_join(const JoinParams& p, void* stream);
void launch_mirror_count(const MirrorParams& p, void* stream);
void launch_mirror_fill(const MirrorParams& p, void* stream);
void launch_jaccard_rows(const JaccardRowsParams& p, void* stream);

}  // namespace dhcl
