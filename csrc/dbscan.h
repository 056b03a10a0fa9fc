// DBSCAN over a sparse graph: parameters of its kernels.
//
// Clusters are numbered by their smallest core row, and a border row goes to the lowest of the
// clusters it touches: what scikit-learn's depth-first search over ascending rows comes to. No
// float is summed, so the labels are the same for any number of threads.
#pragma once
#include <cstdint>

namespace dhcl {

struct DbscanParams {
  int64_t* labels;         // [N]
  int64_t* parent;         // [N] scratch: a row of the same cluster, -1 for rows that are not core
  int64_t* number;         // [N + 1] scratch: clusters before a row
  int64_t* tiles;          // [scan_tiles(N)] scratch, see common/csr.h
  const int64_t* offsets;  // [N + 1]
  const int64_t* columns;  // [nnz]
  const float* values;     // [nnz]
  int64_t num_rows;        // N
  int64_t min_samples;
  float eps;
};

// The stream is a cudaStream_t; the launcher does not synchronise with the host.
void launch_dbscan(const DbscanParams& p, void* stream);

}  // namespace dhcl
