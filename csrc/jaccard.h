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

// ---- CUDA
//
// The length of a row is known only once the row is made. So a stage writes the entries of its rows
// to a pool, in whatever order the blocks come, and counts them; a scan turns the counts into
// offsets, and launch_gather_lines brings the rows to their places and sorts them.

constexpr int64_t kScanTile = 2048;
inline int64_t scan_tiles(int64_t n) { return (n + kScanTile - 1) / kScanTile; }

// values[0] <- 0, values[i] <- values[1] + .. + values[i].
struct ScanParams {
  int64_t* values;  // [n + 1]
  int64_t* tiles;   // [scan_tiles(n)] scratch
  int64_t n;
};

// Rows [begin, begin + rows) of a CSR matrix in the making.
struct LinesParams {
  int64_t* offsets;  // [rows + 1] the length of row r goes to r + 1
  int64_t* starts;   // [rows] where row r starts in the pool; -1 if it needs a wide table
  uint64_t* pool;    // [capacity] column << 32 | bits of the value; what goes beyond is not written
  int64_t* state;    // [2] entries asked for; rows that need a wide table
  int64_t capacity;
  int64_t begin;
  int64_t rows;
};

// The hash table of a block lies in shared memory and has at most `cells` cells, a power of two
// (kTableCells fit). A row that does not fit is left to a second launch, with a wide table in
// global memory for each of `slices` blocks: one cell per column, which fits any row.
constexpr int64_t kTableCells = 4096;
// Sets of neighbours are small, and a smaller table lets more blocks run beside each other.
constexpr int64_t kSetCells = 2048;
struct TableParams {
  int32_t* wide;   // [slices, 2, N] scratch, or null for the first launch
  int64_t slices;  // blocks of the second launch
  int64_t cells;
};

struct GatherParams {
  const int64_t* offsets;  // [rows + 1] after the scan
  const int64_t* starts;   // [rows]
  uint64_t* pool;          // sorted in place
  int32_t* columns;        // [nnz], or null where columns64 is given
  int64_t* columns64;      // [nnz] or null
  float* values;           // [nnz] or null
  int64_t rows;
};

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

struct DbscanParams {
  int64_t* labels;         // [N]
  int64_t* parent;         // [N] scratch: a row of the same cluster, -1 for rows that are not core
  int64_t* number;         // [N + 1] scratch: clusters before a row
  int64_t* tiles;          // [scan_tiles(N)] scratch
  const int64_t* offsets;  // [N + 1]
  const int64_t* columns;  // [nnz]
  const float* values;     // [nnz]
  int64_t num_rows;        // N
  int64_t min_samples;
  float eps;
};

// The stream is a cudaStream_t; no launcher synchronises with the host.
void launch_scan(const ScanParams& p, void* stream);
void launch_gather_lines(const GatherParams& p, void* stream);
void launch_reciprocal_positions(const ReciprocalParams& p, void* stream);
void launch_k_reciprocal(const KReciprocalParams& p, void* stream);
void launch_pair_dots(const PairDotsParams& p, void* stream);
void launch_softmax_rows(const SoftmaxParams& p, void* stream);
void launch_query_expand(const QueryExpandParams& p, void* stream);
void launch_inverted_index(const IndexParams& p, void* stream);
void launch_jaccard_join(const JoinParams& p, void* stream);
void launch_mirror_count(const MirrorParams& p, void* stream);
void launch_mirror_fill(const MirrorParams& p, void* stream);
void launch_jaccard_rows(const JaccardRowsParams& p, void* stream);
void launch_dbscan(const DbscanParams& p, void* stream);

}  // namespace dhcl
