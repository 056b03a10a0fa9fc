// Rows of lists in CSR form: what their kernels take. csr_glue.h has the checks and the CPU code,
// csr_device.h the device code that makes rows, csr.cu the kernels declared here.
//
// On CUDA the length of a row is known only once the row is made. So a stage writes the entries of
// its rows to a pool, in whatever order the blocks come, and counts them; a scan turns the counts
// into offsets, and launch_gather_lines brings the rows to their places and sorts them.
#pragma once
#include <cstdint>

namespace dhcl {

constexpr int64_t kScanTile = 2048;
inline int64_t scan_tiles(int64_t n) { return (n + kScanTile - 1) / kScanTile; }

// values[0] <- 0, values[i] <- values[1] + .. + values[i].
struct ScanParams {
  int64_t* values;  // [n + 1]
  int64_t* tiles;   // [scan_tiles(n)] scratch
  int64_t n;
};

// Rows [begin, begin + rows) of a CSR matrix in the making. The CPU code reads the range only.
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

// The stream is a cudaStream_t; no launcher synchronises with the host.
void launch_scan(const ScanParams& p, void* stream);
void launch_gather_lines(const GatherParams& p, void* stream);

}  // namespace dhcl
