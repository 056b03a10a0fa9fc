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
  int64_t* starts;   // [rows] where row r starts in the pool
  int64_t* left;     // [2, rows] scratch: the rows that did not fit into near and large tables
  uint64_t* pool;    // [capacity] column << 32 | bits of the value; what goes beyond is not written
  int64_t* state;    // [3] entries asked for; rows left by near tables, and by large ones
  int64_t capacity;
  int64_t begin;
  int64_t rows;
};

// A block builds its row in a table of columns. There are three kinds, and a row that one does not
// hold is left to the next:
//
// * near: a hash table in shared memory, small enough for several blocks on a multiprocessor;
// * large: one in as much shared memory as a block may ask for, without a word from the host;
// * wide: one cell per column in global memory, for each of `slices` blocks, which fits any row. It
//   is a launch of its own, once the host has seen that rows are left and found the memory.
//
// Cells are a power of two; an entry is a key and a number, 8 bytes.
constexpr int64_t kTableCells = 4096;
constexpr int64_t kLargeCells = 16384;
struct TableParams {
  int32_t* wide;   // [slices, 2, N] scratch, or null for the launch of near and large tables
  int64_t slices;  // blocks of the launch of wide tables
  int64_t cells;   // of a near table
  int64_t large_cells;
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
