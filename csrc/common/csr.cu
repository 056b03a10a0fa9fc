// CUDA kernels that every family with rows of lists needs: the scan that turns lengths into
// offsets, and the gathering of rows from the pool they were written to. csr.h says how a row
// travels.
#include "csr_device.h"

namespace dhcl {
namespace {

// ---- scan

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

// ---- gather

__global__ void __launch_bounds__(kRowThreads) gather_lines_kernel(const GatherParams p) {
  const int64_t r = blockIdx.x;
  const int64_t begin = p.offsets[r];
  sort_and_put(p.pool + p.starts[r], p.offsets[r + 1] - begin, [&](int64_t place, uint64_t key) {
    if (p.columns != nullptr) p.columns[begin + place] = static_cast<int32_t>(key >> 32);
    if (p.columns64 != nullptr) p.columns64[begin + place] = static_cast<int64_t>(key >> 32);
    if (p.values != nullptr) p.values[begin + place] = unpack_value(key);
  });
}

}  // namespace

void launch_scan(const ScanParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  cudaMemsetAsync(p.values, 0, sizeof(int64_t), s);
  if (p.n == 0) return;
  const int64_t count = scan_tiles(p.n);
  DHCL_LAUNCH(scan_within_tiles_kernel, dim3(static_cast<unsigned>(count)), dim3(kThreads), 0, s,
              p.values + 1, p.tiles, p.n);
  if (count == 1) return;
  DHCL_LAUNCH(scan_tiles_kernel, dim3(1), dim3(kThreads), 0, s, p.tiles, count);
  DHCL_LAUNCH(scan_add_kernel, blocks_for(p.n, kThreads), dim3(kThreads), 0, s, p.values + 1,
              p.tiles, p.n);
}

void launch_gather_lines(const GatherParams& p, void* stream) {
  if (p.rows == 0) return;
  DHCL_LAUNCH(gather_lines_kernel, dim3(static_cast<unsigned>(p.rows)), dim3(kRowThreads), 0,
              static_cast<cudaStream_t>(stream), p);
}

}  // namespace dhcl
