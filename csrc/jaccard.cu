// CUDA kernels of the sparse Jaccard distance. What the stages promise is in jaccard.h.
//
// Floats are added by one thread at a time, in the stated order, so the results have the same bits
// every time and those of the reference. The join is bound by reading lists (0.7 to 6.4 thousand
// entries of 4 or 8 bytes per row), the rest by reading rows of the CSR matrices.
#include "common/csr_device.h"
#include "jaccard.h"

namespace dhcl {
namespace {

constexpr int32_t kDropped = -2;
// Sums of candidates: the terms' truncation is within the margin of the needed weight (6 units of
// this size per term), and sums up to 256 fit.
constexpr double kCandidateScale = 16777216.0;

__device__ __forceinline__ float least(float a, float b) { return a < b ? a : b; }

__device__ __forceinline__ float jaccard(float t) {
  const float distance = add_rn(1.0f, -div_rn(t, add_rn(2.0f, -t)));
  return distance < 0.0f ? 0.0f : distance;
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

// The lists of columns of a row, in its order, as far as they are laid out at a time. What leads to
// a list, four loads that wait for each other, is then loaded once, by a thread for each column.
constexpr int kStaged = 128;
struct StagedLists {
  int64_t begin[kStaged];
  int32_t heads[kStaged];  // entries of rows that have the column in their head; they come first
  int32_t size[kStaged];
  float value[kStaged];  // of the row itself
};

// A block per row of the upper triangle, a warp per list or per pair.
template <Tier kTier>
struct JoinRow {
  const JoinParams& p;
  StagedLists& lists;  // in shared memory
  int64_t needed;
  int64_t i;
  int64_t begin = p.offsets[i];
  int64_t size = p.offsets[i + 1] - begin;
  int64_t head = p.prefix[i];
  int32_t self = static_cast<int32_t>(i);
  int64_t staged = -1;  // the column that lists begin with
  int64_t behind = 0;   // entries of the lists behind the head
  int64_t rest = 0;     // weight of the columns whose minima have not been added up
  Cells<kTier == kWide> cells{};

  // Lays out the lists from column k of the order on.
  __device__ __forceinline__ void stage(int64_t k) {
    if (k == staged) return;
    staged = k;
    __syncthreads();
    if (threadIdx.x < kStaged && k + threadIdx.x < size) {
      const int64_t e = begin + p.order[begin + k + threadIdx.x];
      const int64_t c = p.columns[e];
      const int64_t first = p.list_offsets[c];
      lists.begin[threadIdx.x] = first;
      lists.heads[threadIdx.x] = static_cast<int32_t>(p.list_split[c] - first);
      lists.size[threadIdx.x] = static_cast<int32_t>(p.list_offsets[c + 1] - first);
      lists.value[threadIdx.x] = p.values[e];
    }
    __syncthreads();
  }

  // Calls walk(place) for the staged columns [first, last) of the order, a warp for each.
  template <typename Walk>
  __device__ __forceinline__ void for_each_list(int64_t first, int64_t last, const Walk& walk) {
    for (int64_t base = first / kStaged * kStaged; base < last; base += kStaged) {
      stage(base);
      const int64_t stop = last - base < kStaged ? last - base : kStaged;
      int64_t place = first > base ? first - base : 0;
      for (place += warp_id(); place < stop; place += blockDim.x / kWarp)
        walk(static_cast<int>(place));
    }
  }

  // What is known of the lists before any is walked; returns the entries of those of the head, of
  // rows that have the column in theirs.
  __device__ __forceinline__ int64_t count() {
    int64_t own_bound = 0, own_behind = 0, own_rest = 0;
    for (int64_t base = 0; base < size; base += kStaged) {
      stage(base);
      if (threadIdx.x >= kStaged || base + threadIdx.x >= size) continue;
      if (base + threadIdx.x < head) {
        own_bound += lists.heads[threadIdx.x];
      } else {
        own_behind += lists.size[threadIdx.x];
        own_rest += candidate_weight(lists.value[threadIdx.x]);
      }
    }
    behind = block_sum(own_behind).total;
    rest = block_sum(own_rest).total;
    return block_sum(own_bound).total;
  }

  __device__ __forceinline__ void add_weight(int64_t cell, float v, int64_t l) {
    atomicAdd(cells.sums + cell, candidate_weight(least(v, p.list_values[l])));
  }

  // Rows after this one that have a column of its head in theirs, with the minima of these columns.
  // Rows ascend in both parts of a list, so each is walked backwards down to this row. False where
  // there is no room.
  __device__ __forceinline__ bool find_candidates(int64_t bound) {
    const int64_t n = p.num_rows;
    cells = make_cells<kTier>(p.table, n, bound + 1 < n - i ? bound + 1 : n - i);
    bool full = false;
    if (threadIdx.x == 0) full = cells.insert(self) < 0;
    for_each_list(0, head, [&](int place) {
      const int64_t first = lists.begin[place];
      const float v = lists.value[place];
      for (int64_t l = first + lists.heads[place] - 1 - lane_id();
           l >= first && p.list_rows[l] > self && !full; l -= kWarp) {
        const int64_t cell = cells.insert(p.list_rows[l]);
        full = cell < 0;
        if (!full) add_weight(cell, v, l);
      }
    });
    return __syncthreads_or(full) == 0;
  }

  // Adds up the minima of candidates over the entries [first, last) of the lists.
  __device__ __forceinline__ void add_part(int64_t first, int64_t last, float v) {
    for (int64_t l = last - 1 - lane_id(); l >= first && p.list_rows[l] > self; l -= kWarp) {
      const int64_t cell = cells.find(p.list_rows[l]);
      if (cell >= 0) add_weight(cell, v, l);
    }
  }

  __device__ __forceinline__ void add_tail(int place) {
    const int64_t first = lists.begin[place];
    add_part(first + lists.heads[place], first + lists.size[place], lists.value[place]);
  }

  __device__ __forceinline__ bool can_reach(int64_t cell) const {
    return cells.keys[cell] == self ||
           (cells.keys[cell] >= 0 && static_cast<int64_t>(cells.sums[cell]) + rest >= needed);
  }

  // The minima over the rest of the head's lists, and over the columns behind it unless the lists
  // there, the longest ones, cost more than looking at the candidates that can still reach the
  // needed weight: this is what a hub cannot hurt.
  __device__ __forceinline__ void weigh_candidates() {
    for_each_list(0, head, [&](int place) { add_tail(place); });
    __syncthreads();
    int64_t own = 0;
    for (int64_t c = threadIdx.x; c < cells.count; c += blockDim.x) own += can_reach(c);
    const int64_t alive = block_sum(own).total;
    // Of a list's rows about (n - i) / n come after row i.
    const double ahead = static_cast<double>(p.num_rows - i) * static_cast<double>(behind);
    if (ahead > static_cast<double>(p.num_rows) * static_cast<double>(alive * p.mean_row)) return;
    for_each_list(head, size, [&](int place) {
      const int64_t first = lists.begin[place];
      add_part(first, first + lists.heads[place], lists.value[place]);
      add_tail(place);
    });
    rest = 0;
    __syncthreads();
  }

  // What can reach the weight is summed exactly. From here on the number beside a key is its
  // distance.
  __device__ __forceinline__ void measure_survivors() {
    for (int64_t base = warp_id() * kWarp; base < cells.count; base += blockDim.x) {
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
  }
};

// A near table takes 32 KiB, of which six fit into a multiprocessor's shared memory. Lists are read
// with little to do between, so every such block has eight warps, which must find registers.
constexpr int kJoinThreads = 256;
constexpr int kJoinBlocks = 6;

// Finding and weighing candidates only saves work: the result is that of the exact sums.
template <Tier kTier>
__global__ void __launch_bounds__(kTier == kNear ? kJoinThreads : kManyThreads,
                                  kTier == kNear ? kJoinBlocks : 1)
    jaccard_join_kernel(const JoinParams p) {
  __shared__ StagedLists lists;
  const int64_t needed =
      static_cast<int64_t>(floor(shared_weight_needed(p.eps, *p.longest) * kCandidateScale));
  for_each_row<kTier>(p.lines, [&](int64_t r) {
    JoinRow<kTier> row{p, lists, needed, p.lines.begin + r};
    if (!row.find_candidates(row.count())) return false;
    row.weigh_candidates();
    row.measure_survivors();
    write_line(p.lines, r, row.cells,
               [&](int64_t c) { return __uint_as_float(row.cells.sums[c]); });
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

}  // namespace

void launch_inverted_index(const IndexParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t n = p.num_rows;
  cudaMemsetAsync(p.list_offsets, 0, (n + 1) * sizeof(int64_t), s);
  if (n == 0) return;
  if (p.nnz > 0)
    DHCL_LAUNCH(column_sizes_kernel, blocks_for(p.nnz, kThreads), dim3(kThreads), 0, s, p.columns,
                p.nnz, n, p.list_offsets + 1);
  launch_scan({p.list_offsets, p.tiles, n}, stream);
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
  launch_rows<kJoinThreads>(jaccard_join_kernel<kNear>, jaccard_join_kernel<kLarge>,
                            jaccard_join_kernel<kWide>, p, s);
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

}  // namespace dhcl
