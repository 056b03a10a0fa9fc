// CUDA kernels of the nearest-neighbour search.
//
// The products come from a library's GEMM. What is left of a tile is to read it once, 4 bytes per
// product, and to gather 4 d bytes per candidate for the scores, which L2 serves in part.
//
// A self search takes each tile for its rows and for its columns. knn_filter_kernel reads it: what
// exceeds the threshold of its row or column, which does not move meanwhile, is appended to that
// row's candidates in whatever order the atomics give. knn_settle_kernel then looks at each row
// touched. Where candidates have become many it keeps the largest and raises the threshold. Where
// more came than there is room for, some are lost, so the row's part of the tile is read again, now
// with a threshold that rises as it goes; that can't overflow. Which way a row takes depends on how
// many entries pass, and what it keeps on their values and indices, so the sets are the same in
// every run. Only their order is not, and what reads them sorts by a key in which no two are equal.
#include "common/device.h"
#include "knn.h"
#include "knn_lists.h"

namespace dhcl {
namespace {

constexpr int kLoads = 4;  // steps read at a time, so that several loads are in flight
constexpr int kWarpsPerBlock = 8;
constexpr int kPatchRows = 32;  // rows that a warp of the filter takes: one bit of a word each
constexpr int kRankThreads = 128;
constexpr int64_t kSharedBytes = 48 << 10;  // what a block may use without asking

// ---- lists and the state ------------------------------------------------------------------------

// Takes candidates of a row from the state, less those of an index in [from, to).
__device__ void load_list(WarpList& list, const KnnSelectParams& p, int64_t row, int stored,
                          int64_t from, int64_t to) {
  for (int base = 0; base < stored; base += kWarp) {
    const int i = base + lane_id();
    const bool exists = i < stored;
    const float value = exists ? p.values[row * p.capacity + i] : 0.0f;
    const int index = exists ? p.indices[row * p.capacity + i] : 0;
    list.push(exists && !(index >= from && index < to), value, index);
  }
}

// Keeps the largest, and writes them over the `stored` entries that the state holds.
__device__ void store_list(WarpList& list, const KnnSelectParams& p, int64_t row, int stored) {
  list.cut();
  const int end = stored > list.count ? stored : list.count;
  for (int i = lane_id(); i < end; i += kWarp) {
    const bool exists = i < list.count;
    p.values[row * p.capacity + i] = exists ? value_of(list.keys[i]) : minus_infinity();
    p.indices[row * p.capacity + i] = exists ? index_of(list.keys[i]) : -1;
  }
  if (lane_id() == 0) {
    p.counts[row] = list.count;
    p.thresholds[row] = list.threshold;
  }
}

// ---- a tile -------------------------------------------------------------------------------------

// Columns col .. col+3 of a row of a tile; what lies past the end reads as -inf, above no
// threshold.
template <bool kAligned>
__device__ __forceinline__ void load_products(const float* row, int64_t col, int64_t cols,
                                              float (&out)[kLane4]) {
  if (kAligned && col + kLane4 <= cols) {
    const Quad<float> quad = *reinterpret_cast<const Quad<float>*>(row + col);
#pragma unroll
    for (int c = 0; c < kLane4; ++c) out[c] = quad.x[c];
    return;
  }
#pragma unroll
  for (int c = 0; c < kLane4; ++c) out[c] = col + c < cols ? row[col + c] : minus_infinity();
}

// Which entry of a row or column of a tile is in a lane's place c of a step.
template <bool kAlongRow>
__device__ __forceinline__ int64_t entry_of(int64_t step, int c) {
  return kAlongRow ? step + kLane4 * lane_id() + c : step + c * kWarp + lane_id();
}

// Adds the entries of a row (x[0], x[1], ...) or of a column (x[0], x[stride], ...) of a tile,
// which are features first, first + 1, ...; without that of index `own`.
template <bool kAlongRow, bool kAligned>
__device__ void add_entries(WarpList& list, const float* x, int64_t length, int64_t stride,
                            int64_t first, int64_t own) {
  for (int64_t base = 0; base < length; base += kLoads * kStep) {
    float v[kLoads][kLane4];
#pragma unroll
    for (int s = 0; s < kLoads; ++s) {
      if (kAlongRow) {
        load_products<kAligned>(x, entry_of<true>(base + s * kStep, 0), length, v[s]);
      } else {
#pragma unroll
        for (int c = 0; c < kLane4; ++c) {
          const int64_t i = entry_of<false>(base + s * kStep, c);
          v[s][c] = i < length ? x[i * stride] : minus_infinity();
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kLoads; ++s) {
      const float largest = fmaxf(fmaxf(v[s][0], v[s][1]), fmaxf(v[s][2], v[s][3]));
      if (!__any_sync(kFullWarp, largest > list.threshold)) continue;
      list.make_room();
#pragma unroll
      for (int c = 0; c < kLane4; ++c) {
        const int64_t index = first + entry_of<kAlongRow>(base + s * kStep, c);
        list.push(v[s][c] > list.threshold && index != own, v[s][c], static_cast<int>(index));
      }
    }
  }
}

// What a settling launch does: p's tile, how many candidates the lists in shared memory hold, above
// how many a row is cut, and whether its rows and columns are read though nothing has overflowed.
struct Settling {
  KnnSelectParams p;
  int room;
  int limit;
  int64_t rows;          // of the tile, 0: none
  int64_t first_column;  // of those that take entries
  bool read_rows;
  bool read_columns;
};

// One warp per row of the tile and per column; neighbouring warps read neighbouring columns, so
// that a sector read for one serves eight.
template <bool kAligned>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, 3) knn_settle_kernel(Settling s) {
  DHCL_DYNAMIC_SHARED(unsigned long long, storage);
  const KnnSelectParams& p = s.p;
  // All that a list must have room for: what the state holds, and a step beyond what is kept.
  DHCL_DEVICE_ASSERT(p.capacity <= s.room && p.keep + kStep <= s.room,
                     "knn_select_: room for %d candidates is too little\n", s.room);
  const int64_t task = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp_id();
  const int64_t column = task - s.rows + s.first_column;
  if (column >= p.tile_cols) return;
  const bool is_row = task < s.rows;
  const int64_t row = is_row ? p.row_start + task : p.col_start + column;
  const int count = p.counts[row];
  const bool overflown = count > p.capacity;
  const bool read = overflown || (is_row ? s.read_rows : s.read_columns);
  if (!read && count <= s.limit) return;

  const int stored = overflown ? static_cast<int>(p.capacity) : count;
  const int64_t own = p.self_search ? row : -1;
  // The features of the tile's other side; of them the state holds what came before an overflow.
  const int64_t from = is_row ? p.col_start : p.row_start;
  const int64_t to = overflown ? from + (is_row ? p.tile_cols : p.tile_rows) : from;
  WarpList list{storage + static_cast<int64_t>(warp_id()) * s.room, 0, static_cast<int>(p.keep),
                s.room, p.thresholds[row]};
  load_list(list, p, row, stored, from, to);
  if (read && is_row)
    add_entries<true, kAligned>(list, p.tile + task * p.tile_stride, p.tile_cols, 1, from, own);
  else if (read)
    add_entries<false, false>(list, p.tile + column, p.tile_rows, p.tile_stride, from, own);
  store_list(list, p, row, stored);
}

// Appends the entries of a patch to the candidates of their columns: bit r of hits[c] is row r in
// the lane's column c. One atomic per column that has any.
__device__ void append_to_columns(const KnnSelectParams& p, const unsigned (&hits)[kLane4],
                                  const float* patch, int64_t first_row, int64_t first_column) {
  int places[kLane4];
#pragma unroll
  for (int c = 0; c < kLane4; ++c)
    places[c] = hits[c] ? atomicAdd(p.counts + first_column + c, __popc(hits[c])) : 0;
#pragma unroll
  for (int c = 0; c < kLane4; ++c) {
    const int64_t list = (first_column + c) * p.capacity;
    for (unsigned left = hits[c]; left && places[c] < p.capacity; left &= left - 1) {
      const int r = __ffs(static_cast<int>(left)) - 1;
      p.values[list + places[c]] = patch[r * p.tile_stride + c];
      p.indices[list + places[c]++] = static_cast<int32_t>(first_row + r);
    }
  }
}

// The same for the rows. Lane r counts what row r has in the whole warp and makes room for it.
__device__ void append_to_rows(const KnnSelectParams& p, const unsigned (&hits)[kLane4],
                               const float* patch, int64_t first_row, int64_t first_column) {
  const unsigned rows = __reduce_or_sync(kFullWarp, hits[0] | hits[1] | hits[2] | hits[3]);
  const unsigned before = (1u << lane_id()) - 1;
  int total = 0;
  for (unsigned left = rows; left; left &= left - 1) {
    const int r = __ffs(static_cast<int>(left)) - 1;
    int found = 0;
#pragma unroll
    for (int c = 0; c < kLane4; ++c) found += __popc(__ballot_sync(kFullWarp, hits[c] >> r & 1));
    if (lane_id() == r) total = found;
  }
  const int start = total ? atomicAdd(p.counts + first_row + lane_id(), total) : 0;
  for (unsigned left = rows; left; left &= left - 1) {
    const int r = __ffs(static_cast<int>(left)) - 1;
    const int64_t list = (first_row + r) * p.capacity;
    int place = __shfl_sync(kFullWarp, start, r);
#pragma unroll
    for (int c = 0; c < kLane4; ++c) {
      const unsigned ballot = __ballot_sync(kFullWarp, hits[c] >> r & 1);
      const int mine = place + __popc(ballot & before);
      if (hits[c] >> r & 1 && mine < p.capacity) {
        p.values[list + mine] = patch[r * p.tile_stride + c];
        p.indices[list + mine] = static_cast<int32_t>(first_column + c);
      }
      place += __popc(ballot);
    }
  }
}

// One warp per patch of 32 rows and 128 columns. Nearly always nothing passes, and then a product
// costs two comparisons. `with_rows`: whether entries go to the rows too, or only to the columns.
template <bool kAligned>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    knn_filter_kernel(KnnSelectParams p, int64_t first_column, int64_t blocks_across,
                      bool with_rows) {
  const int64_t left = (blockIdx.x % blocks_across * kWarpsPerBlock + warp_id()) * kStep;
  const int64_t top = blockIdx.x / blocks_across * kPatchRows;
  if (left >= p.tile_cols || (!with_rows && left + kStep <= first_column)) return;
  const int64_t col = left + kLane4 * lane_id();
  const int rows =
      static_cast<int>(p.tile_rows - top < kPatchRows ? p.tile_rows - top : kPatchRows);
  const int64_t first_row = p.row_start + top;
  float column_threshold[kLane4];
#pragma unroll
  for (int c = 0; c < kLane4; ++c) {
    const bool takes = col + c >= first_column && col + c < p.tile_cols;
    column_threshold[c] = takes ? p.thresholds[p.col_start + col + c] : infinity();
  }
  const float row_threshold =
      with_rows && lane_id() < rows ? p.thresholds[first_row + lane_id()] : infinity();

  const float* x = p.tile + top * p.tile_stride;
  unsigned row_hits[kLane4] = {0, 0, 0, 0}, column_hits[kLane4] = {0, 0, 0, 0};
  constexpr int kRows = 2 * kLoads;  // at a time, for as many loads in flight
  for (int base = 0; base < rows; base += kRows) {
    float v[kRows][kLane4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t cols = base + i < rows ? p.tile_cols : 0;
      load_products<kAligned>(x + (base + i) * p.tile_stride, col, cols, v[i]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float threshold = __shfl_sync(kFullWarp, row_threshold, base + i);
      const unsigned bit = 1u << (base + i);
#pragma unroll
      for (int c = 0; c < kLane4; ++c) {
        if (v[i][c] > threshold) row_hits[c] |= bit;
        if (v[i][c] > column_threshold[c]) column_hits[c] |= bit;
      }
    }
  }
  const int64_t own = p.col_start + col - first_row;  // the row of the patch that column 0 is
#pragma unroll
  for (int c = 0; c < kLane4; ++c)
    if (p.self_search && own + c >= 0 && own + c < kPatchRows) {
      row_hits[c] &= ~(1u << (own + c));
      column_hits[c] &= ~(1u << (own + c));
    }
  append_to_columns(p, column_hits, x + col, first_row, p.col_start + col);
  append_to_rows(p, row_hits, x + col, first_row, p.col_start + col);
}

// ---- scores -------------------------------------------------------------------------------------

// One block per row: its candidates are sorted by their products, those that can be among the best
// scored by one warp each, and sorted by their scores.
template <bool kAligned>
__global__ void __launch_bounds__(kRankThreads, 8) knn_rank_kernel(KnnRankParams p) {
  DHCL_DYNAMIC_SHARED(unsigned long long, keys);
  const int64_t row = blockIdx.x;
  const int count = p.counts[row];
  const int others = static_cast<int>(p.k) - p.self_search;
  DHCL_DEVICE_ASSERT(count >= others && count <= p.capacity,
                     "knn_rank_: a row needs %d to %lld candidates (got %d)\n", others,
                     static_cast<long long>(p.capacity), count);
  for (int i = threadIdx.x; i < count; i += kRankThreads)
    keys[i] = sort_key(p.values[row * p.capacity + i], p.indices[row * p.capacity + i]);
  sort_keys<BlockThreads<kRankThreads>>(keys, count);

  const int kept = count < p.keep ? count : static_cast<int>(p.keep);
  const double bound = p.bound[row];
  const double lowest = mul_rn(static_cast<double>(value_of(keys[kept - 1])), p.unscale);
  const double floor = p.floor == nullptr ? minus_infinity() : p.floor[row];
  const double reach =
      fmax(add_rn(mul_rn(static_cast<double>(value_of(keys[others - 1])), p.unscale),
                  mul_rn(-2.0, bound)),
           add_rn(floor, -bound));
  __syncthreads();  // all have read these before a score takes their place
  const float* query = p.queries + row * p.dim;
  for (int i = warp_id(); i < kept + p.self_search; i += kRankThreads / kWarp) {
    const bool own = i == kept;
    const unsigned long long key = own ? 0 : keys[i];
    __syncwarp();
    const bool within = own || mul_rn(static_cast<double>(value_of(key)), p.unscale) >= reach;
    const int64_t index = index_of(key);
    const float* other = own ? query : p.features + index * p.dim;
    const float score = within ? warp_dot<kAligned, 4>(query, other, p.dim) : 0.0f;
    if (lane_id() != 0) continue;
    if (own) {
      p.similarities[row * p.k] = score;
      p.neighbours[row * p.k] = p.row_start + row;
    } else {
      keys[i] = within ? sort_key(score, static_cast<int>(index)) : sort_key(minus_infinity(), -1);
    }
  }
  sort_keys<BlockThreads<kRankThreads>>(keys, kept);

  const int64_t first = row * p.k + p.self_search;
  for (int i = threadIdx.x; i < others; i += kRankThreads) {
    p.similarities[first + i] = value_of(keys[i]);
    p.neighbours[first + i] = index_of(keys[i]);
  }
  if (threadIdx.x == 0)
    p.certified[row] = p.complete || fmax(static_cast<double>(value_of(keys[others - 1])), floor) >
                                         add_rn(lowest, bound);
}

// One warp per candidate.
template <bool kAligned>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    knn_scores_kernel(float* scores, const float* __restrict__ queries,
                      const float* __restrict__ features, const int64_t* __restrict__ candidates,
                      int64_t pairs, int64_t num_candidates, int64_t num_features, int64_t d) {
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (pair >= pairs) return;
  const int lane = threadIdx.x;
  const int64_t candidate = candidates[pair];
  DHCL_DEVICE_ASSERT(candidate >= -1 && candidate < num_features,
                     "knn_scores: candidates must be in [-1, %lld) (got %lld)\n",
                     static_cast<long long>(num_features), static_cast<long long>(candidate));
  if (candidate < 0) {
    if (lane == 0) scores[pair] = minus_infinity();
    return;
  }
  const float* x = queries + pair / num_candidates * d;
  const float* y = features + candidate * d;
  const float score = warp_dot<kAligned, 4>(x, y, d);
  if (lane == 0) scores[pair] = score;
}

// One warp per row of the operand; those past the rows are zeros.
template <bool kAligned>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) knn_halves_kernel(KnnHalvesParams p) {
  const int64_t row = first_warp();
  if (row >= p.height) return;
  const float* x = p.rows + row * p.dim;
  __half* half = static_cast<__half*>(p.halves) + row * p.width;
  const int64_t dim = row < p.num_rows ? p.dim : 0;
  float part[kLane4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int64_t col = kLane4 * lane_id(); col < p.width; col += kSumColumns) {
    float a[kLane4];
    __half rounded[kLane4];
    load4<kAligned>(x, col, dim, a);
#pragma unroll
    for (int c = 0; c < kLane4; ++c) {
      const float scaled = mul_rn(a[c], p.scale);
      rounded[c] = __float2half_rn(scaled);
      const float error = add_rn(scaled, -__half2float(rounded[c]));
      part[c] = add_rn(part[c], mul_rn(error, error));
    }
    store4<true>(half, col, p.width, rounded);
  }
  const float squares = fold_columns(part);
  if (lane_id() == 0 && row < p.num_rows) p.squares[row] = squares;
}

// ---- launches -----------------------------------------------------------------------------------

bool aligned16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// A power of two, as the sort pads to one.
int64_t room_for(int64_t candidates) {
  int64_t room = 2;
  while (room < candidates) room *= 2;
  return room;
}

bool aligned_tile(const KnnSelectParams& p) {
  return p.tile_stride % kLane4 == 0 && aligned16(p.tile);
}

// Appends what exceeds the thresholds of those sides that are not read in settling.
void filter(const Settling& s, void* stream) {
  const KnnSelectParams& p = s.p;
  const bool with_rows = s.rows > 0 && !s.read_rows;
  const int64_t first_column = s.read_columns ? p.tile_cols : s.first_column;
  if (!with_rows && first_column == p.tile_cols) return;
  const int64_t across = ceil_div(p.tile_cols, kStep * kWarpsPerBlock);
  const dim3 grid(static_cast<unsigned>(across * ceil_div(p.tile_rows, kPatchRows)));
  const dim3 block(kWarp * kWarpsPerBlock);
  const auto on = static_cast<cudaStream_t>(stream);
  if (aligned_tile(p))
    DHCL_LAUNCH((knn_filter_kernel<true>), grid, block, 0, on, p, first_column, across, with_rows);
  else
    DHCL_LAUNCH((knn_filter_kernel<false>), grid, block, 0, on, p, first_column, across, with_rows);
}

void settle(Settling& s, void* stream) {
  const KnnSelectParams& p = s.p;
  s.limit = static_cast<int>(p.keep + (p.capacity - p.keep) / 6);
  const int64_t room = room_for(p.keep + kStep > p.capacity ? p.keep + kStep : p.capacity);
  s.room = static_cast<int>(room);
  int64_t warps = kWarpsPerBlock;
  while (warps * room * static_cast<int64_t>(sizeof(unsigned long long)) > kSharedBytes) warps /= 2;
  const dim3 grid(static_cast<unsigned>(ceil_div(s.rows + p.tile_cols - s.first_column, warps)));
  const dim3 block(static_cast<unsigned>(warps * kWarp));
  const size_t shared = warps * room * sizeof(unsigned long long);
  const auto on = static_cast<cudaStream_t>(stream);
  if (aligned_tile(p))
    DHCL_LAUNCH((knn_settle_kernel<true>), grid, block, shared, on, s);
  else
    DHCL_LAUNCH((knn_settle_kernel<false>), grid, block, shared, on, s);
}

}  // namespace

// Tiles come in ascending order, so a row has seen the features before the tile's. Where more than
// as many are new, more than `keep` are expected above the threshold, and it is better to raise it
// on the way than to have the list overflow.

void launch_knn_select(const KnnSelectParams& p, void* stream) {
  if (p.tile_rows == 0 || p.tile_cols == 0) return;
  Settling s{};
  s.p = p;
  s.rows = p.mirror ? 0 : p.tile_rows;
  s.first_column = p.mirror ? 0 : p.tile_cols;
  // Rows lie in memory as they are read, so one reading is enough for them.
  s.read_rows = true;
  s.read_columns = p.tile_rows > p.row_start;
  filter(s, stream);
  settle(s, stream);
}

void launch_knn_select_both(const KnnSelectParams& p, void* stream) {
  if (p.tile_rows == 0 || p.tile_cols == 0) return;
  Settling s{};
  s.p = p;
  s.rows = p.tile_rows;
  s.first_column = first_mirrored_column(p);
  s.read_rows = p.tile_cols > p.col_start;
  filter(s, stream);
  settle(s, stream);
}

void launch_knn_rank(const KnnRankParams& p, void* stream) {
  if (p.num_rows == 0) return;
  const dim3 grid(static_cast<unsigned>(p.num_rows));
  const size_t shared = room_for(p.capacity) * sizeof(unsigned long long);
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dim % kLane4 == 0 && aligned16(p.queries) && aligned16(p.features))
    DHCL_LAUNCH((knn_rank_kernel<true>), grid, dim3(kRankThreads), shared, on, p);
  else
    DHCL_LAUNCH((knn_rank_kernel<false>), grid, dim3(kRankThreads), shared, on, p);
}

void launch_knn_halves(const KnnHalvesParams& p, void* stream) {
  if (p.height == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.height, kWarpsPerBlock)));
  const dim3 block(kWarp * kWarpsPerBlock);
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.dim % kLane4 == 0 && aligned16(p.rows))
    DHCL_LAUNCH((knn_halves_kernel<true>), grid, block, 0, on, p);
  else
    DHCL_LAUNCH((knn_halves_kernel<false>), grid, block, 0, on, p);
}

void launch_knn_scores(const KnnScoresParams& p, void* stream) {
  const int64_t pairs = p.num_rows * p.num_candidates;
  if (pairs == 0) return;
  const bool aligned = p.dim % kLane4 == 0 && aligned16(p.queries) && aligned16(p.features);
  const auto s = static_cast<cudaStream_t>(stream);
  // The grid's first dimension ends at 2^31 - 1 blocks.
  const int64_t most = (int64_t{1} << 30) * kWarpsPerBlock / p.num_candidates * p.num_candidates;
  for (int64_t start = 0; start < pairs; start += most) {
    const int64_t count = pairs - start < most ? pairs - start : most;
    const dim3 grid(static_cast<unsigned>(ceil_div(count, kWarpsPerBlock)));
    const dim3 block(kWarp, kWarpsPerBlock);
    const float* queries = p.queries + start / p.num_candidates * p.dim;
    if (aligned)
      DHCL_LAUNCH((knn_scores_kernel<true>), grid, block, 0, s, p.scores + start, queries,
                  p.features, p.candidates + start, count, p.num_candidates, p.num_features, p.dim);
    else
      DHCL_LAUNCH((knn_scores_kernel<false>), grid, block, 0, s, p.scores + start, queries,
                  p.features, p.candidates + start, count, p.num_candidates, p.num_features, p.dim);
  }
}

}  // namespace dhcl
