// CUDA kernels of the sparse k-reciprocal Jaccard distance and of DBSCAN. What the stages promise
// is in jaccard.h.
//
// Sets of columns are built by one block per row in a hash table in shared memory; integer atomics
// fill it, in whatever order threads come. Floats are added by one thread at a time, in the stated
// order, so the results have the same bits every time and those of the reference. What has been
// collected out of order (entries of a row, rows of a list) is sorted by its unique key afterwards.
//
// The join is bound by reading lists (0.7 to 6.4 thousand entries of 4 or 8 bytes per row), the
// rest by reading neighbour lists and rows of the CSR matrices.
#include "common/device.h"
#include "jaccard.h"

namespace dhcl {
namespace {

constexpr int kThreads = 256;     // kernels over elements, or with a warp per row
constexpr int kRowThreads = 128;  // kernels with a block per row
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int64_t kDotColumns = 128;
constexpr int64_t kMaxGrid = 2147483647;
// Longer rows are sorted where they lie, in global memory.
constexpr int64_t kSharedSort = 1024;
constexpr int kProbes = 128;
constexpr int32_t kFree = -1;
constexpr int32_t kDropped = -2;
// Sums of candidates: the terms' truncation is within the margin of the needed weight (6 units of
// this size per term), and sums up to 256 fit.
constexpr double kCandidateScale = 16777216.0;

__host__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__host__ inline dim3 blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = ceil_div(items, per_block);
  return dim3(static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid));
}

__device__ __forceinline__ int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t item_step() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}
__device__ __forceinline__ int64_t first_warp() { return first_item() / kWarp; }
__device__ __forceinline__ int64_t warp_step() { return item_step() / kWarp; }
__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

__device__ __forceinline__ int64_t add_to(int64_t* address, int64_t value) {
  return static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(address),
                                        static_cast<unsigned long long>(value)));
}

__device__ __forceinline__ float least(float a, float b) { return a < b ? a : b; }

__device__ __forceinline__ uint64_t pack(int64_t high, float value) {
  return static_cast<uint64_t>(high) << 32 | __float_as_uint(value);
}
__device__ __forceinline__ float unpack_value(uint64_t entry) {
  return __uint_as_float(static_cast<unsigned>(entry));
}

__device__ __forceinline__ float jaccard(float t) {
  const float distance = add_rn(1.0f, -div_rn(t, add_rn(2.0f, -t)));
  return distance < 0.0f ? 0.0f : distance;
}

// ---- scan, sort, gather

// Inclusive scan over the block's kThreads values.
__device__ __forceinline__ int64_t block_scan(int64_t x) {
  __shared__ int64_t sums[kThreads];
  const int t = threadIdx.x;
  __syncthreads();
  sums[t] = x;
  __syncthreads();
  for (int offset = 1; offset < kThreads; offset *= 2) {
    const int64_t before = t >= offset ? sums[t - offset] : 0;
    __syncthreads();
    sums[t] += before;
    __syncthreads();
  }
  return sums[t];
}

// Scans each tile by itself and leaves its sum in tiles.
__global__ void __launch_bounds__(kThreads)
    scan_within_tiles_kernel(int64_t* values, int64_t* tiles, int64_t n) {
  constexpr int kPerThread = static_cast<int>(kScanTile) / kThreads;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kScanTile + threadIdx.x * kPerThread;
  int64_t own[kPerThread];
  int64_t sum = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    sum += base + k < n ? values[base + k] : 0;
    own[k] = sum;
  }
  const int64_t through = block_scan(sum);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k)
    if (base + k < n) values[base + k] = through - sum + own[k];
  if (threadIdx.x == kThreads - 1) tiles[blockIdx.x] = through;
}

// One block turns the sums of the tiles into what comes before each.
__global__ void __launch_bounds__(kThreads) scan_tiles_kernel(int64_t* tiles, int64_t count) {
  __shared__ int64_t chunk;
  int64_t done = 0;
  for (int64_t base = 0; base < count; base += kThreads) {
    const int64_t at = base + threadIdx.x;
    const int64_t own = at < count ? tiles[at] : 0;
    const int64_t through = block_scan(own);
    if (at < count) tiles[at] = done + through - own;
    if (threadIdx.x == kThreads - 1) chunk = through;
    __syncthreads();
    done += chunk;
  }
}

__global__ void __launch_bounds__(kThreads)
    scan_add_kernel(int64_t* values, const int64_t* __restrict__ tiles, int64_t n) {
  for (int64_t i = first_item(); i < n; i += item_step()) values[i] += tiles[i / kScanTile];
}

void scan(int64_t* values, int64_t* tiles, int64_t n, cudaStream_t stream) {
  cudaMemsetAsync(values, 0, sizeof(int64_t), stream);
  if (n == 0) return;
  const int64_t count = scan_tiles(n);
  DHCL_LAUNCH(scan_within_tiles_kernel, dim3(static_cast<unsigned>(count)), dim3(kThreads), 0,
              stream, values + 1, tiles, n);
  if (count == 1) return;
  DHCL_LAUNCH(scan_tiles_kernel, dim3(1), dim3(kThreads), 0, stream, tiles, count);
  DHCL_LAUNCH(scan_add_kernel, blocks_for(n, kThreads), dim3(kThreads), 0, stream, values + 1,
              tiles, n);
}

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

__global__ void __launch_bounds__(kRowThreads) gather_lines_kernel(const GatherParams p) {
  const int64_t r = blockIdx.x;
  const int64_t begin = p.offsets[r];
  sort_and_put(p.pool + p.starts[r], p.offsets[r + 1] - begin, [&](int64_t place, uint64_t key) {
    if (p.columns != nullptr) p.columns[begin + place] = static_cast<int32_t>(key >> 32);
    if (p.columns64 != nullptr) p.columns64[begin + place] = static_cast<int64_t>(key >> 32);
    if (p.values != nullptr) p.values[begin + place] = unpack_value(key);
  });
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
      keys[key] = key;
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

// An empty table for up to `bound` keys, as far as the cells reach.
template <bool kWide>
__device__ __forceinline__ Cells<kWide> make_cells(const TableParams& table, int64_t columns,
                                                   int64_t bound) {
  DHCL_DYNAMIC_SHARED(int32_t, shared);
  Cells<kWide> cells{};
  if (kWide) {
    cells.keys = table.wide + static_cast<int64_t>(blockIdx.x) * 2 * columns;
    cells.count = columns;
  } else {
    cells.keys = shared;
    cells.count = table.cells < 64 ? table.cells : 64;
    while (cells.count < 2 * bound && cells.count < table.cells) cells.count *= 2;
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

// row(r) makes a row and returns, in all threads alike, whether its table held it. The wide launch
// makes the rows that did not fit.
template <bool kWide, typename Row>
__device__ __forceinline__ void for_each_row(const LinesParams& lines, const Row& row) {
  if (kWide) {
    for (int64_t r = blockIdx.x; r < lines.rows; r += gridDim.x)
      if (lines.starts[r] < 0) row(r);
    return;
  }
  const int64_t r = blockIdx.x;
  if (row(r) || threadIdx.x != 0) return;
  lines.starts[r] = -1;
  lines.offsets[r + 1] = 0;
  add_to(lines.state + 1, 1);
}

// Writes the keys of a table to the pool as row r, with value(cell) beside each.
template <bool kWide, typename Value>
__device__ __forceinline__ void write_line(const LinesParams& lines, int64_t r,
                                           const Cells<kWide>& cells, const Value& value) {
  __shared__ int64_t start;
  __shared__ int size, next;
  __syncthreads();
  if (threadIdx.x == 0) size = next = 0;
  __syncthreads();
  int own = 0;
  for (int64_t c = threadIdx.x; c < cells.count; c += blockDim.x) own += cells.keys[c] >= 0;
  if (own > 0) atomicAdd(&size, own);
  __syncthreads();
  if (threadIdx.x == 0) {
    start = add_to(lines.state, size);
    lines.starts[r] = start;
    lines.offsets[r + 1] = size;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < cells.count; c += blockDim.x) {
    if (cells.keys[c] < 0) continue;
    const int64_t place = start + atomicAdd(&next, 1);
    if (place < lines.capacity) lines.pool[place] = pack(cells.keys[c], value(c));
  }
  __syncthreads();
}

template <typename Kernel, typename WideKernel, typename Params>
void launch_rows(Kernel* kernel, WideKernel* wide_kernel, const Params& p, cudaStream_t stream) {
  if (p.table.wide != nullptr) {
    DHCL_LAUNCH(wide_kernel, dim3(static_cast<unsigned>(p.table.slices)), dim3(kRowThreads), 0,
                stream, p);
  } else {
    cudaMemsetAsync(p.lines.state, 0, 2 * sizeof(int64_t), stream);
    const size_t bytes = p.table.cells * (sizeof(int32_t) + sizeof(unsigned));
    DHCL_LAUNCH(kernel, dim3(static_cast<unsigned>(p.lines.rows)), dim3(kRowThreads), bytes, stream,
                p);
  }
}

// ---- reciprocal neighbours

// The last place of an id in a list, -1 if it is not there; for the whole warp.
__device__ __forceinline__ int64_t place_in(const int32_t* list, int64_t width, int32_t id) {
  int64_t place = -1;
  for (int64_t base = 0; base < width; base += kWarp) {
    const int64_t q = base + lane_id();
    const unsigned found = __ballot_sync(kFullWarp, q < width && list[q] == id);
    if (found != 0) place = base + kWarp - 1 - __clz(static_cast<int>(found));
  }
  return place;
}

// A warp per row.
__global__ void __launch_bounds__(kThreads) reciprocal_positions_kernel(const ReciprocalParams p) {
  for (int64_t i = first_warp(); i < p.num_rows; i += warp_step()) {
    for (int64_t at = 0; at < p.width; ++at) {
      const int64_t j = p.ranks[i * p.width + at];
      DHCL_DEVICE_ASSERT(j >= 0 && j < p.num_rows,
                         "reciprocal_positions: ranks must be in [0, %lld) (got %lld in row "
                         "%lld)\n",
                         static_cast<long long>(p.num_rows), static_cast<long long>(j),
                         static_cast<long long>(i));
      const int64_t place = place_in(p.ranks + j * p.width, p.width, static_cast<int32_t>(i));
      if (lane_id() == 0) p.positions[i * p.width + at] = static_cast<int16_t>(place);
    }
  }
}

// A block per row, a warp per mutual neighbour. The number beside a key is 1 for the mutual
// neighbours themselves, 0 for what they bring.
template <bool kWide>
__global__ void __launch_bounds__(kRowThreads) k_reciprocal_kernel(const KReciprocalParams p) {
  for_each_row<kWide>(p.lines, [&](int64_t r) {
    const int64_t i = p.lines.begin + r;
    const int32_t* list = p.ranks + i * p.width;
    const int16_t* back = p.positions + i * p.width;
    int64_t members = 0;
    for (int64_t base = 0; base < p.k; base += kRowThreads) {
      const int64_t at = base + threadIdx.x;
      members += __syncthreads_count(at < p.k && back[at] >= 0 && back[at] < p.k);
    }
    const Cells<kWide> cells = make_cells<kWide>(p.table, p.num_rows, members * (p.half + 1));
    bool full = false;
    for (int64_t at = threadIdx.x; at < p.k; at += kRowThreads) {
      if (back[at] < 0 || back[at] >= p.k) continue;
      const int64_t cell = cells.insert(list[at]);
      if (cell >= 0)
        cells.sums[cell] = 1;
      else
        full = true;
    }
    if (__syncthreads_or(full)) return false;
    for (int64_t at = warp_id(); at < p.k; at += kRowWarps) {
      if (back[at] < 0 || back[at] >= p.k) continue;
      const int32_t* near = p.ranks + list[at] * p.width;
      const int16_t* near_back = p.positions + list[at] * p.width;
      const auto mutual = [&](int64_t q) {
        return q < p.half && near_back[q] >= 0 && near_back[q] < p.half;
      };
      int size = 0, shared = 0;
      for (int64_t base = 0; base < p.half; base += kWarp) {
        const int64_t q = base + lane_id();
        const bool exists = mutual(q);
        const int64_t cell = exists ? cells.find(near[q]) : -1;
        size += __popc(__ballot_sync(kFullWarp, exists));
        shared += __popc(__ballot_sync(kFullWarp, cell >= 0 && cells.sums[cell] == 1));
      }
      // More than two thirds, as an integer test: equal to the published one in doubles.
      if (3 * shared <= 2 * size) continue;
      for (int64_t q = lane_id(); q < p.half; q += kWarp)
        if (mutual(q) && cells.insert(near[q]) < 0) full = true;
    }
    if (__syncthreads_or(full)) return false;
    write_line(p.lines, r, cells, [](int64_t) { return 0.0f; });
    return true;
  });
}

// ---- weights

// A warp per entry; lane l holds columns 4l .. 4l+3 of the sum.
template <bool kAligned>
__device__ __forceinline__ float warp_dot(const float* a, const float* b, int64_t d) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 2
  for (int64_t col = 4 * lane_id(); col < d; col += kDotColumns) {
    float x[4], y[4];
    load4<kAligned>(a, col, d, x);
    load4<kAligned>(b, col, d, y);
#pragma unroll
    for (int c = 0; c < 4; ++c) part[c] = add_rn(part[c], mul_rn(x[c], y[c]));
  }
  return fold_columns(part);
}

template <bool kAligned>
__global__ void __launch_bounds__(kRowThreads) pair_dots_kernel(const PairDotsParams p) {
  const int64_t r = blockIdx.x;
  const int64_t i = p.begin + r;
  for (int64_t e = p.offsets[r] + warp_id(); e < p.offsets[r + 1]; e += kRowWarps) {
    const int64_t c = p.columns[e];
    const int64_t place =
        p.similarities == nullptr ? -1 : place_in(p.ranks + i * p.width, p.width, p.columns[e]);
    const float dot =
        place >= 0 ? p.similarities[i * p.width + place]
                   : warp_dot<kAligned>(p.features + i * p.dim, p.features + c * p.dim, p.dim);
    if (lane_id() == 0) p.dots[e] = dot;
  }
}

// A warp per row; the exponentials are computed twice rather than kept.
__global__ void __launch_bounds__(kThreads) softmax_rows_kernel(const SoftmaxParams p) {
  for (int64_t r = first_warp(); r < p.rows; r += warp_step()) {
    const int64_t begin = p.offsets[r], end = p.offsets[r + 1];
    if (begin == end) continue;
    float top = p.logits[begin];
    for (int64_t e = begin + lane_id(); e < end; e += kWarp) top = fmaxf(top, p.logits[e]);
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, offset));
    double sum = 0.0;
    for (int64_t e = begin + lane_id(); e < end; e += kWarp)
      sum += exp(static_cast<double>(p.logits[e]) - top);
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(kFullWarp, sum, offset);
    for (int64_t e = begin + lane_id(); e < end; e += kWarp)
      p.weights[e] = static_cast<float>(div_rn(exp(static_cast<double>(p.logits[e]) - top), sum));
  }
}

// ---- query expansion

// A block per row. The columns of one neighbour are distinct, so each sum has one writer until the
// barrier, and neighbours come in order.
template <bool kWide>
__global__ void __launch_bounds__(kRowThreads) query_expand_kernel(const QueryExpandParams p) {
  for_each_row<kWide>(p.lines, [&](int64_t r) {
    const int32_t* near = p.ranks + (p.lines.begin + r) * p.width;
    int64_t entries = 0;
    for (int64_t q = 0; q < p.k2; ++q) {
      entries += p.offsets[near[q] + 1] - p.offsets[near[q]];
    }
    const Cells<kWide> cells = make_cells<kWide>(p.table, p.num_rows, entries);
    for (int64_t q = 0; q < p.k2; ++q) {
      const int64_t end = p.offsets[near[q] + 1];
      bool full = false;
      for (int64_t e = p.offsets[near[q]] + threadIdx.x; e < end; e += kRowThreads) {
        const int64_t cell = cells.insert(p.columns[e]);
        if (cell < 0) {
          full = true;
          break;
        }
        cells.sums[cell] = __float_as_uint(add_rn(__uint_as_float(cells.sums[cell]), p.values[e]));
      }
      if (__syncthreads_or(full)) return false;
    }
    const float count = static_cast<float>(p.k2);
    write_line(p.lines, r, cells,
               [&](int64_t c) { return div_rn(__uint_as_float(cells.sums[c]), count); });
    return true;
  });
}

// ---- inverted index

__global__ void __launch_bounds__(kThreads)
    longest_row_kernel(const int64_t* __restrict__ offsets, int64_t rows, int64_t* longest) {
  int most = 0;
  for (int64_t i = first_item(); i < rows; i += item_step()) {
    const int size = static_cast<int>(offsets[i + 1] - offsets[i]);
    most = size > most ? size : most;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(kFullWarp, most, offset);
    most = other > most ? other : most;
  }
  if (lane_id() == 0)
    atomicMax(reinterpret_cast<unsigned long long*>(longest),
              static_cast<unsigned long long>(most));
}

void longest_row(const int64_t* offsets, int64_t rows, int64_t* longest, cudaStream_t stream) {
  cudaMemsetAsync(longest, 0, sizeof(int64_t), stream);
  DHCL_LAUNCH(longest_row_kernel, blocks_for(rows, kThreads), dim3(kThreads), 0, stream, offsets,
              rows, longest);
}

__global__ void __launch_bounds__(kThreads)
    column_sizes_kernel(const int32_t* __restrict__ columns, int64_t nnz, int64_t num_rows,
                        int64_t* sizes) {
  for (int64_t e = first_item(); e < nnz; e += item_step()) {
    const int64_t c = columns[e];
    DHCL_DEVICE_ASSERT(c >= 0 && c < num_rows,
                       "inverted_index: columns must be in [0, %lld) (got %lld)\n",
                       static_cast<long long>(num_rows), static_cast<long long>(c));
    add_to(sizes + c, 1);
  }
}

// A block per row. An entry finds its place in the order, and the weight of all before it, by
// comparing itself with every entry of the row; the weights are integers, so their order is free.
__global__ void __launch_bounds__(kRowThreads) index_order_kernel(const IndexParams p) {
  __shared__ int64_t tile_frequency[kRowThreads];
  __shared__ int64_t tile_weight[kRowThreads];
  __shared__ int head;
  const int64_t i = blockIdx.x;
  const int64_t begin = p.offsets[i], size = p.offsets[i + 1] - begin;
  const int64_t needed =
      static_cast<int64_t>(shared_weight_needed(p.eps, *p.longest) * kFixedPoint);
  const auto frequency = [&](int64_t e) {
    const int64_t c = p.columns[begin + e];
    return p.list_offsets[c + 1] - p.list_offsets[c];
  };
  const auto weight = [&](int64_t e) {
    return static_cast<int64_t>(static_cast<double>(p.values[begin + e]) * kFixedPoint);
  };
  if (threadIdx.x == 0) head = 0;
  for (int64_t base = 0; base < size; base += kRowThreads) {
    const int64_t e = base + threadIdx.x;
    const int64_t own = e < size ? frequency(e) : 0;
    int64_t place = 0, before = 0, total = 0;
    for (int64_t tile = 0; tile < size; tile += kRowThreads) {
      __syncthreads();
      if (tile + threadIdx.x < size) {
        tile_frequency[threadIdx.x] = frequency(tile + threadIdx.x);
        tile_weight[threadIdx.x] = weight(tile + threadIdx.x);
      }
      __syncthreads();
      const int64_t stop = size - tile < kRowThreads ? size - tile : kRowThreads;
      for (int64_t t = 0; t < stop; ++t) {
        const bool earlier = tile_frequency[t] < own || (tile_frequency[t] == own && tile + t < e);
        place += earlier;
        before += earlier ? tile_weight[t] : 0;
        total += tile_weight[t];
      }
    }
    if (e >= size) continue;
    const bool in_head = total - before >= needed;
    const int64_t c = p.columns[begin + e];
    p.order[begin + place] = static_cast<int32_t>(e);
    if (in_head) {
      atomicAdd(&head, 1);
      add_to(p.list_split + c, 1);
    }
    const int64_t key = (in_head ? int64_t{0} : int64_t{1} << 31) | i;
    p.pool[p.list_offsets[c] + add_to(p.next + c, 1)] = pack(key, p.values[begin + e]);
  }
  __syncthreads();
  if (threadIdx.x == 0) p.prefix[i] = head;
}

// A block per column: its rows with the column in their head, then the rest, both ascending.
__global__ void __launch_bounds__(kRowThreads) index_lists_kernel(const IndexParams p) {
  const int64_t c = blockIdx.x;
  const int64_t begin = p.list_offsets[c];
  sort_and_put(p.pool + begin, p.list_offsets[c + 1] - begin, [&](int64_t place, uint64_t key) {
    p.list_rows[begin + place] = static_cast<int32_t>(key >> 32 & 0x7fffffffu);
    p.list_values[begin + place] = unpack_value(key);
  });
}

// ---- join

// The exact weight that row j shares with own row i: columns ascending, one addition after another.
// Every lane gets it. Columns that are not shared would add zero.
__device__ __forceinline__ float shared_weight(const JoinParams& p, int64_t i, int64_t j) {
  const int64_t own_begin = p.offsets[i], own_end = p.offsets[i + 1];
  const int64_t end = p.offsets[j + 1];
  float t = 0.0f;
  for (int64_t base = p.offsets[j]; base < end; base += kWarp) {
    const int64_t e = base + lane_id();
    float least_weight = 0.0f;
    bool common = false;
    if (e < end) {
      const int32_t c = p.columns[e];
      int64_t low = own_begin, high = own_end;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (p.columns[middle] < c)
          low = middle + 1;
        else
          high = middle;
      }
      common = low < own_end && p.columns[low] == c;
      if (common) least_weight = least(p.values[low], p.values[e]);
    }
    unsigned found = __ballot_sync(kFullWarp, common);
    while (found != 0) {
      t = add_rn(t, __shfl_sync(kFullWarp, least_weight, __ffs(static_cast<int>(found)) - 1));
      found &= found - 1;
    }
  }
  return t;
}

__device__ __forceinline__ unsigned candidate_weight(float w) {
  return static_cast<unsigned>(static_cast<double>(w) * kCandidateScale);
}

// A block per row of the upper triangle, a warp per list or per pair.
//  1. Rows after this one that have a column of its head in theirs become candidates.
//  2. The minima over the columns of the head are added up for candidates.
//  3. So are those behind the head, unless the lists there, the longest ones, cost more than
//  looking
//     at the candidates that can still reach the needed weight: this is what a hub cannot hurt.
//  4. What can reach it is summed exactly.
// Steps 2 and 3 only save work; the result is that of step 4.
template <bool kWide>
__global__ void __launch_bounds__(kRowThreads) jaccard_join_kernel(const JoinParams p) {
  __shared__ int64_t bound, behind, rest_weight;
  __shared__ int alive;
  const int64_t n = p.num_rows;
  const int64_t needed =
      static_cast<int64_t>(floor(shared_weight_needed(p.eps, *p.longest) * kCandidateScale));
  for_each_row<kWide>(p.lines, [&](int64_t r) {
    const int64_t i = p.lines.begin + r;
    const int32_t self = static_cast<int32_t>(i);
    const int64_t begin = p.offsets[i], size = p.offsets[i + 1] - begin, head = p.prefix[i];
    const auto entry = [&](int64_t k) { return begin + p.order[begin + k]; };
    __syncthreads();
    if (threadIdx.x == 0) {
      bound = behind = rest_weight = 0;
      alive = 0;
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; k < size; k += kRowThreads) {
      const int64_t c = p.columns[entry(k)];
      if (k < head) {
        add_to(&bound, p.list_split[c] - p.list_offsets[c]);
      } else {
        add_to(&behind, p.list_offsets[c + 1] - p.list_offsets[c]);
        add_to(&rest_weight, candidate_weight(p.values[entry(k)]));
      }
    }
    __syncthreads();
    const int64_t most = bound + 1 < n - i ? bound + 1 : n - i;
    const Cells<kWide> cells = make_cells<kWide>(p.table, n, most);

    bool full = false;
    if (threadIdx.x == 0) full = cells.insert(self) < 0;
    for (int64_t k = warp_id(); k < head; k += kRowWarps) {
      const int64_t c = p.columns[entry(k)];
      for (int64_t l = p.list_split[c] - 1 - lane_id();
           l >= p.list_offsets[c] && p.list_rows[l] > self && !full; l -= kWarp)
        full = cells.insert(p.list_rows[l]) < 0;
    }
    if (__syncthreads_or(full)) return false;

    // Rows ascend in both parts of a list, so each is walked backwards down to this row.
    const auto add_part = [&](int64_t first, int64_t last, float v) {
      for (int64_t l = last - 1 - lane_id(); l >= first && p.list_rows[l] > self; l -= kWarp) {
        const int64_t cell = cells.find(p.list_rows[l]);
        if (cell >= 0) atomicAdd(cells.sums + cell, candidate_weight(least(v, p.list_values[l])));
      }
    };
    const auto add_columns = [&](int64_t first, int64_t last) {
      for (int64_t k = first + warp_id(); k < last; k += kRowWarps) {
        const int64_t e = entry(k), c = p.columns[e];
        add_part(p.list_offsets[c], p.list_split[c], p.values[e]);
        add_part(p.list_split[c], p.list_offsets[c + 1], p.values[e]);
      }
      __syncthreads();
    };
    add_columns(0, head);
    int64_t rest = rest_weight;
    const auto can_reach = [&](int64_t cell) {
      return cells.keys[cell] == self ||
             (cells.keys[cell] >= 0 && static_cast<int64_t>(cells.sums[cell]) + rest >= needed);
    };
    int own = 0;
    for (int64_t c = threadIdx.x; c < cells.count; c += kRowThreads) own += can_reach(c);
    if (own > 0) atomicAdd(&alive, own);
    __syncthreads();
    // Of a list's rows about (n - i) / n come after row i.
    const double ahead = static_cast<double>(n - i) * static_cast<double>(behind);
    if (ahead <= static_cast<double>(n) * static_cast<double>(alive * p.mean_row)) {
      add_columns(head, size);
      rest = 0;
    }

    // From here on the number beside a key is its distance.
    for (int64_t base = warp_id() * kWarp; base < cells.count; base += kRowThreads) {
      const int64_t cell = base + lane_id();
      const bool survives = cell < cells.count && can_reach(cell);
      if (cell < cells.count && cells.keys[cell] >= 0 && !survives) cells.keys[cell] = kDropped;
      const int32_t key = survives ? cells.keys[cell] : 0;
      unsigned survivors = __ballot_sync(kFullWarp, survives);
      while (survivors != 0) {
        const int lane = __ffs(static_cast<int>(survivors)) - 1;
        survivors &= survivors - 1;
        const int32_t j = __shfl_sync(kFullWarp, key, lane);
        const float distance = jaccard(shared_weight(p, i, j));
        if (lane != lane_id()) continue;
        if (distance <= p.eps)
          cells.sums[cell] = __float_as_uint(distance);
        else
          cells.keys[cell] = kDropped;
      }
    }
    write_line(p.lines, r, cells, [&](int64_t c) { return __uint_as_float(cells.sums[c]); });
    return true;
  });
}

// ---- symmetric and dense matrices

__global__ void __launch_bounds__(kThreads) mirror_count_kernel(const MirrorParams p) {
  for (int64_t i = first_warp(); i < p.num_rows; i += warp_step()) {
    const int64_t begin = p.offsets[i], end = p.offsets[i + 1];
    if (lane_id() == 0) add_to(p.full_offsets + i + 1, end - begin);
    for (int64_t e = begin + lane_id(); e < end; e += kWarp) {
      const int64_t j = p.columns[e];
      DHCL_DEVICE_ASSERT(j >= i && j < p.num_rows,
                         "mirror_csr: columns must be in [row, %lld) (got %lld in row %lld)\n",
                         static_cast<long long>(p.num_rows), static_cast<long long>(j),
                         static_cast<long long>(i));
      if (j != i) add_to(p.full_offsets + j + 1, 1);
    }
  }
}

__global__ void __launch_bounds__(kThreads) mirror_fill_kernel(const MirrorParams p) {
  for (int64_t i = first_warp(); i < p.num_rows; i += warp_step()) {
    for (int64_t e = p.offsets[i] + lane_id(); e < p.offsets[i + 1]; e += kWarp) {
      const int64_t j = p.columns[e];
      p.pool[p.full_offsets[i] + add_to(p.next + i, 1)] = pack(j, p.values[e]);
      if (j != i) p.pool[p.full_offsets[j] + add_to(p.next + j, 1)] = pack(i, p.values[e]);
    }
  }
}

// A block per row. The rows of one list are distinct, and lists come in order of their columns.
__global__ void __launch_bounds__(kThreads) jaccard_rows_kernel(const JaccardRowsParams p) {
  const int64_t r = blockIdx.x;
  float* sums = p.distances + r * p.num_rows;
  for (int64_t j = threadIdx.x; j < p.num_rows; j += kThreads) sums[j] = 0.0f;
  __syncthreads();
  for (int64_t e = p.offsets[p.begin + r]; e < p.offsets[p.begin + r + 1]; ++e) {
    const int64_t c = p.columns[e];
    const float v = p.values[e];
    for (int64_t l = p.list_offsets[c] + threadIdx.x; l < p.list_offsets[c + 1]; l += kThreads) {
      float* sum = sums + p.list_rows[l];
      *sum = add_rn(*sum, least(v, p.list_values[l]));
    }
    __syncthreads();
  }
  for (int64_t j = threadIdx.x; j < p.num_rows; j += kThreads) sums[j] = jaccard(sums[j]);
}

// ---- DBSCAN

// A core row starts as its own parent; -1 for the others.
__global__ void __launch_bounds__(kThreads) dbscan_core_kernel(const DbscanParams p) {
  for (int64_t i = first_warp(); i < p.num_rows; i += warp_step()) {
    const int64_t begin = p.offsets[i], end = p.offsets[i + 1];
    int64_t degree = 0;
    for (int64_t base = begin; base < end; base += kWarp) {
      const int64_t e = base + lane_id();
      DHCL_DEVICE_ASSERT(e >= end || (p.columns[e] >= 0 && p.columns[e] < p.num_rows),
                         "dbscan: columns must be in [0, %lld) (got %lld in row %lld)\n",
                         static_cast<long long>(p.num_rows), static_cast<long long>(p.columns[e]),
                         static_cast<long long>(i));
      degree += __popc(__ballot_sync(kFullWarp, e < end && p.values[e] <= p.eps));
    }
    if (lane_id() == 0) p.parent[i] = degree >= p.min_samples ? i : -1;
  }
}

__device__ __forceinline__ int64_t read(const int64_t* address) {
  return *static_cast<volatile const int64_t*>(address);
}

// The root as far as this thread can see, halving the path. What it writes is an ancestor, smaller
// than the row, whatever other threads have done to the path meanwhile.
__device__ __forceinline__ int64_t find_root(int64_t* parent, int64_t i) {
  int64_t above = read(parent + i);
  while (above != i) {
    const int64_t next = read(parent + above);
    if (next == above) return above;
    *static_cast<volatile int64_t*>(parent + i) = next;
    i = next;
    above = read(parent + i);
  }
  return i;
}

// The larger root goes under the smaller; if it is no root any more, go on from where it went.
__device__ __forceinline__ void unite(int64_t* parent, int64_t a, int64_t b) {
  a = find_root(parent, a);
  b = find_root(parent, b);
  while (a != b) {
    const int64_t high = a > b ? a : b, low = a > b ? b : a;
    const int64_t found = static_cast<int64_t>(
        atomicCAS(reinterpret_cast<unsigned long long*>(parent + high),
                  static_cast<unsigned long long>(high), static_cast<unsigned long long>(low)));
    if (found == high) return;
    a = find_root(parent, found);
    b = find_root(parent, low);
  }
}

__global__ void __launch_bounds__(kThreads) dbscan_unite_kernel(const DbscanParams p) {
  for (int64_t i = first_warp(); i < p.num_rows; i += warp_step()) {
    if (read(p.parent + i) < 0) continue;
    for (int64_t e = p.offsets[i] + lane_id(); e < p.offsets[i + 1]; e += kWarp) {
      const int64_t j = p.columns[e];
      if (j < i && p.values[e] <= p.eps && read(p.parent + j) >= 0) unite(p.parent, i, j);
    }
  }
}

__global__ void __launch_bounds__(kThreads) dbscan_roots_kernel(const DbscanParams p) {
  for (int64_t i = first_item(); i < p.num_rows; i += item_step()) {
    int64_t root = read(p.parent + i);
    p.number[i + 1] = root == i;
    if (root < 0) continue;
    while (read(p.parent + root) != root) root = read(p.parent + root);
    p.parent[i] = root;
  }
}

// Clusters are numbered by their roots; a border row takes the lowest number it touches.
__global__ void __launch_bounds__(kThreads) dbscan_labels_kernel(const DbscanParams p) {
  for (int64_t i = first_warp(); i < p.num_rows; i += warp_step()) {
    const int64_t root = p.parent[i];
    int64_t label = root >= 0 ? p.number[root] : -1;
    if (root < 0) {
      constexpr int64_t kNone = INT64_MAX;
      int64_t lowest = kNone;
      for (int64_t e = p.offsets[i] + lane_id(); e < p.offsets[i + 1]; e += kWarp) {
        const int64_t other = p.parent[p.columns[e]];
        if (other < 0 || !(p.values[e] <= p.eps)) continue;
        lowest = p.number[other] < lowest ? p.number[other] : lowest;
      }
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const long long other = __shfl_xor_sync(kFullWarp, static_cast<long long>(lowest), offset);
        lowest = other < lowest ? other : lowest;
      }
      label = lowest == kNone ? -1 : lowest;
    }
    if (lane_id() == 0) p.labels[i] = label;
  }
}

}  // namespace

void launch_scan(const ScanParams& p, void* stream) {
  scan(p.values, p.tiles, p.n, static_cast<cudaStream_t>(stream));
}

void launch_gather_lines(const GatherParams& p, void* stream) {
  if (p.rows == 0) return;
  DHCL_LAUNCH(gather_lines_kernel, dim3(static_cast<unsigned>(p.rows)), dim3(kRowThreads), 0,
              static_cast<cudaStream_t>(stream), p);
}

void launch_reciprocal_positions(const ReciprocalParams& p, void* stream) {
  if (p.num_rows == 0 || p.width == 0) return;
  DHCL_LAUNCH(reciprocal_positions_kernel, blocks_for(p.num_rows, kThreads / kWarp), dim3(kThreads),
              0, static_cast<cudaStream_t>(stream), p);
}

void launch_k_reciprocal(const KReciprocalParams& p, void* stream) {
  if (p.lines.rows == 0) return;
  launch_rows(k_reciprocal_kernel<false>, k_reciprocal_kernel<true>, p,
              static_cast<cudaStream_t>(stream));
}

void launch_pair_dots(const PairDotsParams& p, void* stream) {
  if (p.rows == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(p.rows));
  if (p.dim % 4 == 0 && reinterpret_cast<uintptr_t>(p.features) % (4 * sizeof(float)) == 0)
    DHCL_LAUNCH(pair_dots_kernel<true>, grid, dim3(kRowThreads), 0, s, p);
  else
    DHCL_LAUNCH(pair_dots_kernel<false>, grid, dim3(kRowThreads), 0, s, p);
}

void launch_softmax_rows(const SoftmaxParams& p, void* stream) {
  if (p.rows == 0) return;
  DHCL_LAUNCH(softmax_rows_kernel, blocks_for(p.rows, kThreads / kWarp), dim3(kThreads), 0,
              static_cast<cudaStream_t>(stream), p);
}

void launch_query_expand(const QueryExpandParams& p, void* stream) {
  if (p.lines.rows == 0) return;
  launch_rows(query_expand_kernel<false>, query_expand_kernel<true>, p,
              static_cast<cudaStream_t>(stream));
}

void launch_inverted_index(const IndexParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t n = p.num_rows;
  cudaMemsetAsync(p.list_offsets, 0, (n + 1) * sizeof(int64_t), s);
  if (n == 0) return;
  if (p.nnz > 0)
    DHCL_LAUNCH(column_sizes_kernel, blocks_for(p.nnz, kThreads), dim3(kThreads), 0, s, p.columns,
                p.nnz, n, p.list_offsets + 1);
  scan(p.list_offsets, p.tiles, n, s);
  longest_row(p.offsets, n, p.longest, s);
  cudaMemcpyAsync(p.list_split, p.list_offsets, n * sizeof(int64_t), cudaMemcpyDeviceToDevice, s);
  cudaMemsetAsync(p.next, 0, n * sizeof(int64_t), s);
  const dim3 grid(static_cast<unsigned>(n));
  DHCL_LAUNCH(index_order_kernel, grid, dim3(kRowThreads), 0, s, p);
  DHCL_LAUNCH(index_lists_kernel, grid, dim3(kRowThreads), 0, s, p);
}

void launch_jaccard_join(const JoinParams& p, void* stream) {
  if (p.lines.rows == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.table.wide == nullptr) longest_row(p.offsets, p.num_rows, p.longest, s);
  launch_rows(jaccard_join_kernel<false>, jaccard_join_kernel<true>, p, s);
}

void launch_mirror_count(const MirrorParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  cudaMemsetAsync(p.full_offsets, 0, (p.num_rows + 1) * sizeof(int64_t), s);
  if (p.num_rows == 0) return;
  DHCL_LAUNCH(mirror_count_kernel, blocks_for(p.num_rows, kThreads / kWarp), dim3(kThreads), 0, s,
              p);
}

void launch_mirror_fill(const MirrorParams& p, void* stream) {
  if (p.num_rows == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  cudaMemsetAsync(p.next, 0, p.num_rows * sizeof(int64_t), s);
  DHCL_LAUNCH(mirror_fill_kernel, blocks_for(p.num_rows, kThreads / kWarp), dim3(kThreads), 0, s,
              p);
}

void launch_jaccard_rows(const JaccardRowsParams& p, void* stream) {
  if (p.rows == 0 || p.num_rows == 0) return;
  DHCL_LAUNCH(jaccard_rows_kernel, dim3(static_cast<unsigned>(p.rows)), dim3(kThreads), 0,
              static_cast<cudaStream_t>(stream), p);
}

void launch_dbscan(const DbscanParams& p, void* stream) {
  if (p.num_rows == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 warps = blocks_for(p.num_rows, kThreads / kWarp);
  const dim3 threads = blocks_for(p.num_rows, kThreads);
  DHCL_LAUNCH(dbscan_core_kernel, warps, dim3(kThreads), 0, s, p);
  DHCL_LAUNCH(dbscan_unite_kernel, warps, dim3(kThreads), 0, s, p);
  DHCL_LAUNCH(dbscan_roots_kernel, threads, dim3(kThreads), 0, s, p);
  scan(p.number, p.tiles, p.num_rows, s);
  DHCL_LAUNCH(dbscan_labels_kernel, warps, dim3(kThreads), 0, s, p);
}

}  // namespace dhcl
