// CUDA kernels of the nearest-neighbour search.
//
// The products come from a library's GEMM. What is left reads them once: 4 bytes per product for
// the selection, and for the scores 4 d bytes per candidate, a gather that L2 serves in part. One
// block owns one row of the state and one warp one score, so no result depends on scheduling:
// candidates are appended in any order and then sorted by a key in which no two are equal.
#include "common/device.h"
#include "knn.h"

namespace dhcl {
namespace {

constexpr int kThreads = 128;
constexpr int kLoads = 4;  // per thread and step, so that several are in flight
constexpr int kStep = kThreads * kLoads;
constexpr int kWarpsPerBlock = 8;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// A number that is smaller the better a candidate is: by value, the largest first, then by index.
__device__ __forceinline__ unsigned long long sort_key(float value, int index) {
  unsigned bits = static_cast<unsigned>(__float_as_int(value));
  if (bits == 0x80000000u) bits = 0;  // -0 is 0
  bits = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
  return static_cast<unsigned long long>(bits) << 32 | static_cast<unsigned>(index);
}
__device__ __forceinline__ float value_of(unsigned long long key) {
  const unsigned bits = static_cast<unsigned>(key >> 32);
  return __int_as_float(static_cast<int>(bits & 0x80000000u ? bits : ~bits & 0x7fffffffu));
}

// Sorts keys[0 .. count) in ascending order; there must be room up to the next power of two.
__device__ void sort_keys(unsigned long long* keys, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + static_cast<int>(threadIdx.x); i < size; i += kThreads) keys[i] = ~0ull;
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        const int low = 2 * pair - (pair & (stride - 1));
        const int high = low + stride;
        const unsigned long long a = keys[low];
        const unsigned long long b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// One block per row of the tile. Shared memory holds the row's candidates as keys; when the next
// step might not fit any more they are sorted and cut to `keep`, which raises the threshold.
__global__ void __launch_bounds__(kThreads)
    knn_select_kernel(float* values, int32_t* indices, int32_t* counts, float* thresholds,
                      const float* __restrict__ tile, int64_t tile_cols, int64_t row_start,
                      int64_t col_start, int capacity, int keep, int room, bool self_search) {
  DHCL_DYNAMIC_SHARED(unsigned long long, keys);
  __shared__ int count;
  const int64_t row = row_start + blockIdx.x;
  const float* x = tile + static_cast<int64_t>(blockIdx.x) * tile_cols;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float threshold = thresholds[row];
  const int before = counts[row];
  if (threadIdx.x == 0) count = before;
  for (int i = threadIdx.x; i < before; i += kThreads)
    keys[i] = sort_key(values[row * capacity + i], indices[row * capacity + i]);
  __syncthreads();

  for (int64_t base = 0; base < tile_cols; base += kStep) {
    float loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t col = base + i * kThreads + threadIdx.x;
      loaded[i] = col < tile_cols ? x[col] : minus_infinity();
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t index = col_start + base + i * kThreads + threadIdx.x;
      const bool passes = loaded[i] > threshold && !(self_search && index == row);
      const unsigned ballot = __ballot_sync(kFullWarp, passes);
      if (ballot == 0) continue;
      int place = 0;
      if (lane == 0) place = atomicAdd(&count, __popc(ballot));
      place = __shfl_sync(kFullWarp, place, 0) + __popc(ballot & ((1u << lane) - 1));
      if (passes) keys[place] = sort_key(loaded[i], static_cast<int>(index));
    }
    __syncthreads();
    const int filled = count;
    __syncthreads();
    if (filled + kStep > room) {
      sort_keys(keys, filled);
      if (filled >= keep) threshold = value_of(keys[keep - 1]);
      if (threadIdx.x == 0) count = filled < keep ? filled : keep;
      __syncthreads();
    }
  }

  const int filled = count;
  sort_keys(keys, filled);
  const int kept = filled < keep ? filled : keep;
  for (int i = threadIdx.x; i < capacity; i += kThreads) {
    values[row * capacity + i] = i < kept ? value_of(keys[i]) : minus_infinity();
    indices[row * capacity + i] = i < kept ? static_cast<int32_t>(keys[i] & 0xffffffffull) : -1;
  }
  if (threadIdx.x == 0) {
    counts[row] = kept;
    if (filled >= keep) thresholds[row] = value_of(keys[keep - 1]);
  }
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

}  // namespace

void launch_knn_select(const KnnSelectParams& p, void* stream) {
  if (p.tile_rows == 0 || p.tile_cols == 0) return;
  // A power of two, as the sort pads to one.
  int64_t room = 2;
  while (room < p.capacity || room < p.keep + kStep) room *= 2;
  DHCL_LAUNCH(knn_select_kernel, dim3(static_cast<unsigned>(p.tile_rows)), dim3(kThreads),
              room * sizeof(unsigned long long), static_cast<cudaStream_t>(stream), p.values,
              p.indices, p.counts, p.thresholds, p.tile, p.tile_cols, p.row_start, p.col_start,
              static_cast<int>(p.capacity), static_cast<int>(p.keep), static_cast<int>(room),
              p.self_search);
}

void launch_knn_scores(const KnnScoresParams& p, void* stream) {
  const int64_t pairs = p.num_rows * p.num_candidates;
  if (pairs == 0) return;
  const bool aligned = p.dim % 4 == 0 && reinterpret_cast<uintptr_t>(p.queries) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(p.features) % 16 == 0;
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
