// CUDA kernel that ranks a query's right matches.
//
// One block per query. The row of distances is read once for every few matches: 4 G bytes each
// time, from L2 after the first. Counts are integers, so their order of summation is free.
#include "common/device.h"
#include "ranking.h"

namespace dhcl {
namespace {

constexpr int kThreads = 256;
// Matches per pass over the row, as many as fit into registers.
template <typename T>
constexpr int kMatchesOf = sizeof(T) == 8 ? 4 : 8;

// Whether entry g of distance x comes before match m of distance d, or is it.
template <typename T>
__device__ __forceinline__ bool not_after(T x, int64_t g, T d, int64_t m) {
  return x < d || (x == d && g <= m);
}

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    match_ranks_kernel(int64_t* ranks, const T* __restrict__ distance,
                       const int64_t* __restrict__ members, const int64_t* __restrict__ begin,
                       const int64_t* __restrict__ offsets,
                       const int64_t* __restrict__ query_cameras,
                       const int64_t* __restrict__ gallery_cameras, int64_t num_gallery) {
  constexpr int kMatches = kMatchesOf<T>;
  __shared__ int partial[kThreads / kWarp][kMatches];
  const int64_t q = blockIdx.x;
  const T* row = distance + q * num_gallery;
  const int64_t* group = members + begin[q];
  const int64_t size = offsets[q + 1] - offsets[q];
  const int64_t camera = query_cameras == nullptr ? 0 : query_cameras[q];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t first = 0; first < size; first += kMatches) {
    T d[kMatches];
    int64_t match[kMatches];
    int count[kMatches];
#pragma unroll
    for (int i = 0; i < kMatches; ++i) {
      // Past the end the last match is counted again, and not stored.
      match[i] = group[first + i < size ? first + i : size - 1];
      DHCL_DEVICE_ASSERT(match[i] >= 0 && match[i] < num_gallery,
                         "match_ranks: members must be in [0, %lld) (got %lld)\n",
                         static_cast<long long>(num_gallery), static_cast<long long>(match[i]));
      d[i] = row[match[i]];
      count[i] = 0;
    }
    for (int64_t g = threadIdx.x; g < num_gallery; g += kThreads) {
      const T x = row[g];
#pragma unroll
      for (int i = 0; i < kMatches; ++i) count[i] += not_after(x, g, d[i], match[i]);
    }
    if (query_cameras != nullptr) {
      for (int64_t i = threadIdx.x; i < size; i += kThreads) {
        const int64_t g = group[i];
        if (gallery_cameras[g] != camera) continue;
        const T x = row[g];
#pragma unroll
        for (int j = 0; j < kMatches; ++j) count[j] -= not_after(x, g, d[j], match[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kMatches; ++i) {
      const int sum = warp_sum(count[i]);
      if (threadIdx.x % kWarp == 0) partial[warp][i] = sum;
    }
    __syncthreads();
    const int64_t mine = first + threadIdx.x;
    if (threadIdx.x < kMatches && mine < size) {
      int64_t rank = 0;
      for (int w = 0; w < kThreads / kWarp; ++w) rank += partial[w][threadIdx.x];
      const bool removed = query_cameras != nullptr && gallery_cameras[group[mine]] == camera;
      ranks[offsets[q] + mine] = removed ? 0 : rank;
    }
    __syncthreads();
  }
}

template <typename T>
void match_ranks(const MatchRanksParams& p, cudaStream_t stream) {
  DHCL_LAUNCH((match_ranks_kernel<T>), dim3(static_cast<unsigned>(p.num_queries)), dim3(kThreads),
              0, stream, p.ranks, static_cast<const T*>(p.distance), p.members, p.begin, p.offsets,
              p.query_cameras, p.gallery_cameras, p.num_gallery);
}

}  // namespace

void launch_match_ranks(const MatchRanksParams& p, void* stream) {
  if (p.num_queries == 0 || p.num_gallery == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.is_double)
    match_ranks<double>(p, s);
  else
    match_ranks<float>(p, s);
}

}  // namespace dhcl
