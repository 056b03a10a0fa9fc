// Device code that makes rows of lists: tables of columns, the pool they are written to, sorting.
// csr.h says how a row travels.
//
// Sets of columns are built by one block per row in a hash table in shared memory; integer atomics
// fill it, in whatever order threads come. What has been collected out of order is sorted by its
// unique key afterwards.
#pragma once
#include "csr.h"
#include "device.h"

namespace dhcl {

constexpr int kThreads = 256;     // kernels over elements, or with a warp per row
constexpr int kRowThreads = 128;  // kernels with a block per row
// Kernels with a block per row whose table is large or wide: few blocks, so many threads in each.
constexpr int kManyThreads = 512;
constexpr int kManyWarps = kManyThreads / kWarp;
constexpr int64_t kLargeBlocks = 264;  // two for each multiprocessor of the largest GPUs
// Longer rows are sorted where they lie, in global memory.
constexpr int64_t kSharedSort = 1024;
constexpr int kProbes = 128;
constexpr int32_t kFree = -1;

__device__ __forceinline__ uint64_t pack(int64_t high, float value) {
  return static_cast<uint64_t>(high) << 32 | __float_as_uint(value);
}
__device__ __forceinline__ float unpack_value(uint64_t entry) {
  return __uint_as_float(static_cast<unsigned>(entry));
}

// ---- sort

__device__ __forceinline__ void order_pair(uint64_t* keys, int64_t low, int64_t high, int64_t n) {
  if (high >= n) return;
  const uint64_t a = keys[low], b = keys[high];
  if (a > b) {
    keys[low] = b;
    keys[high] = a;
  }
}

// Bitonic sort by the whole block, for any n: every exchange brings the smaller key to the lower
// place, so what would lie beyond n never moves and need not be there.
__device__ __forceinline__ void block_sort(uint64_t* keys, int64_t n) {
  __syncthreads();
  int levels = 0;
  while ((int64_t{1} << levels) < n) ++levels;
  const int64_t pairs = (int64_t{1} << levels) / 2;
  for (int level = 1; level <= levels; ++level) {
    const int64_t half = int64_t{1} << (level - 1);
    for (int64_t t = threadIdx.x; t < pairs; t += blockDim.x) {
      const int64_t start = t >> (level - 1) << level, place = t & (half - 1);
      order_pair(keys, start + place, start + 2 * half - 1 - place, n);
    }
    __syncthreads();
    for (int shift = level - 2; shift >= 0; --shift) {
      const int64_t step = int64_t{1} << shift;
      for (int64_t t = threadIdx.x; t < pairs; t += blockDim.x) {
        const int64_t low = (t >> shift << (shift + 1)) + (t & (step - 1));
        order_pair(keys, low, low + step, n);
      }
      __syncthreads();
    }
  }
}

// Sorts n keys, in shared memory where they fit, and hands each to put(place, key).
template <typename Put>
__device__ __forceinline__ void sort_and_put(uint64_t* keys, int64_t n, const Put& put) {
  __shared__ uint64_t near[kSharedSort];
  uint64_t* sorted = keys;
  if (n <= kSharedSort) {
    for (int64_t t = threadIdx.x; t < n; t += blockDim.x) near[t] = keys[t];
    sorted = near;
  }
  block_sort(sorted, n);
  for (int64_t t = threadIdx.x; t < n; t += blockDim.x) put(t, sorted[t]);
}

// ---- sums over a block

// Adds a number per thread: what the threads before this one have, and all of them. Shuffles, since
// 64-bit atomics on shared memory are loops.
struct BlockSum {
  int64_t before;
  int64_t total;
};
__device__ __forceinline__ BlockSum block_sum(int64_t own) {
  __shared__ int64_t sums[kManyWarps];
  long long through = own;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const long long lower = __shfl_up_sync(kFullWarp, through, offset);
    if (lane_id() >= offset) through += lower;
  }
  if (lane_id() == kWarp - 1) sums[warp_id()] = through;
  __syncthreads();
  BlockSum result{through - own, 0};
  for (int w = 0; w * kWarp < static_cast<int>(blockDim.x); ++w) {
    if (w < warp_id()) result.before += sums[w];
    result.total += sums[w];
  }
  __syncthreads();
  return result;
}

// ---- tables of columns

// Keys with a number each. A wide table has a cell for every column and needs no probing.
template <bool kWide>
struct Cells {
  int32_t* keys;
  unsigned* sums;
  int64_t count;

  __device__ __forceinline__ int64_t home(int32_t key) const {
    return static_cast<int64_t>(static_cast<unsigned>(key) * 2654435769u >> 7) & (count - 1);
  }
  __device__ __forceinline__ int probes() const {
    return count < kProbes ? static_cast<int>(count) : kProbes;
  }
  // Read past the compiler: another thread may be filling the cell.
  __device__ __forceinline__ int32_t key_at(int64_t cell) const {
    return *static_cast<volatile const int32_t*>(keys + cell);
  }

  // The cell of a key, taken if need be; -1 where there is no room.
  __device__ __forceinline__ int64_t insert(int32_t key) const {
    if (kWide) {
      // Several threads may bring one key, while others look for it.
      *static_cast<volatile int32_t*>(keys + key) = key;
      return key;
    }
    int64_t cell = home(key);
    for (int probe = 0; probe < probes(); ++probe) {
      int32_t found = key_at(cell);
      if (found == kFree) found = atomicCAS(keys + cell, kFree, key);
      if (found == kFree || found == key) return cell;
      cell = (cell + 1) & (count - 1);
    }
    return -1;
  }

  // The cell of a key, -1 if it has none.
  __device__ __forceinline__ int64_t find(int32_t key) const {
    if (kWide) return key_at(key) == key ? key : -1;
    int64_t cell = home(key);
    for (int probe = 0; probe < probes(); ++probe) {
      const int32_t found = key_at(cell);
      if (found == key) return cell;
      if (found == kFree) return -1;
      cell = (cell + 1) & (count - 1);
    }
    return -1;
  }
};

enum Tier { kNear, kLarge, kWide };

// An empty table for up to `bound` keys, as far as the cells reach.
template <Tier kTier>
__device__ __forceinline__ Cells<kTier == kWide> make_cells(const TableParams& table,
                                                            int64_t columns, int64_t bound) {
  DHCL_DYNAMIC_SHARED(int32_t, shared);
  Cells<kTier == kWide> cells{};
  if constexpr (kTier == kWide) {
    cells.keys = table.wide + static_cast<int64_t>(blockIdx.x) * 2 * columns;
    cells.count = columns;
  } else {
    const int64_t most = kTier == kNear ? table.cells : table.large_cells;
    cells.keys = shared;
    cells.count = most < 64 ? most : 64;
    while (cells.count < 2 * bound && cells.count < most) cells.count *= 2;
  }
  cells.sums = reinterpret_cast<unsigned*>(cells.keys + cells.count);
  __syncthreads();
  for (int64_t c = threadIdx.x; c < cells.count; c += blockDim.x) {
    cells.keys[c] = kFree;
    cells.sums[c] = 0;
  }
  __syncthreads();
  return cells;
}

// Leaves a row to the tables after this kind.
template <Tier kTier>
__device__ __forceinline__ void leave_row(const LinesParams& lines, int64_t r) {
  if (threadIdx.x != 0) return;
  lines.offsets[r + 1] = 0;
  lines.left[kTier * lines.rows + add_to(lines.state + 1 + kTier, 1)] = r;
}

// row(r) makes a row and returns, in all threads alike, whether its table held it.
template <Tier kTier, typename Row>
__device__ __forceinline__ void for_each_row(const LinesParams& lines, const Row& row) {
  if constexpr (kTier == kNear) {
    if (!row(blockIdx.x)) leave_row<kTier>(lines, blockIdx.x);
  } else {
    const int64_t* left = lines.left + (kTier - 1) * lines.rows;
    for (int64_t m = blockIdx.x; m < lines.state[kTier]; m += gridDim.x)
      if (!row(left[m]) && kTier == kLarge) leave_row<kLarge>(lines, left[m]);
  }
}

// Writes the keys of a table to the pool as row r, with value(cell) beside each. Since the last
// barrier a thread may have changed the cells that are its own here.
template <bool kWide, typename Value>
__device__ __forceinline__ void write_line(const LinesParams& lines, int64_t r,
                                           const Cells<kWide>& cells, const Value& value) {
  __shared__ int64_t start;
  int own = 0;
  for (int64_t c = threadIdx.x; c < cells.count; c += blockDim.x) own += cells.keys[c] >= 0;
  const BlockSum entries = block_sum(own);
  if (threadIdx.x == 0) {
    start = add_to(lines.state, entries.total);
    lines.starts[r] = start;
    lines.offsets[r + 1] = entries.total;
  }
  __syncthreads();
  int64_t place = start + entries.before;
  for (int64_t c = threadIdx.x; c < cells.count; c += blockDim.x) {
    if (cells.keys[c] < 0) continue;
    if (place < lines.capacity) lines.pool[place] = pack(cells.keys[c], value(c));
    ++place;
  }
}

constexpr int64_t kCellBytes = sizeof(int32_t) + sizeof(unsigned);

// The launch of near tables and, for what they leave, of large ones; or that of wide ones.
template <int kNearThreads, typename Near, typename Large, typename Wide, typename Params>
void launch_rows(Near* near, Large* large, Wide* wide, Params p, cudaStream_t stream) {
  if (p.table.wide != nullptr) {
    DHCL_LAUNCH(wide, dim3(static_cast<unsigned>(p.table.slices)), dim3(kManyThreads), 0, stream,
                p);
    return;
  }
  cudaMemsetAsync(p.lines.state, 0, 3 * sizeof(int64_t), stream);
  DHCL_LAUNCH(near, dim3(static_cast<unsigned>(p.lines.rows)), dim3(kNearThreads),
              p.table.cells * kCellBytes, stream, p);
  // More shared memory than 48 KiB has to be asked for, and not every GPU has so much.
  while (p.table.large_cells > kTableCells &&
         cudaFuncSetAttribute(large, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(p.table.large_cells * kCellBytes)) != cudaSuccess) {
    cudaGetLastError();
    p.table.large_cells /= 2;
  }
  const int64_t blocks = p.lines.rows < kLargeBlocks ? p.lines.rows : kLargeBlocks;
  DHCL_LAUNCH(large, dim3(static_cast<unsigned>(blocks)), dim3(kManyThreads),
              p.table.large_cells * kCellBytes, stream, p);
}

}  // namespace dhcl
