// CUDA kernels of DBSCAN over a sparse graph. What the labels are is in dbscan.h.
//
// All are bound by reading the graph, 12 bytes per pair, three times.
#include "common/csr.h"
#include "common/device.h"
#include "dbscan.h"

namespace dhcl {
namespace {

constexpr int kThreads = 256;

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

__device__ __forceinline__ void write(int64_t* address, int64_t value) {
  *static_cast<volatile int64_t*>(address) = value;
}

// The root as far as this thread can see, halving the path. What it writes is an ancestor, smaller
// than the row, whatever other threads have done to the path meanwhile.
__device__ __forceinline__ int64_t find_root(int64_t* parent, int64_t i) {
  int64_t above = read(parent + i);
  while (above != i) {
    const int64_t next = read(parent + above);
    if (next == above) return above;
    write(parent + i, next);
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
    // Others may be on their way through this row; from it they come to the same root.
    write(p.parent + i, root);
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

void launch_dbscan(const DbscanParams& p, void* stream) {
  if (p.num_rows == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 warps = blocks_for(p.num_rows, kThreads / kWarp);
  const dim3 threads = blocks_for(p.num_rows, kThreads);
  DHCL_LAUNCH(dbscan_core_kernel, warps, dim3(kThreads), 0, s, p);
  DHCL_LAUNCH(dbscan_unite_kernel, warps, dim3(kThreads), 0, s, p);
  DHCL_LAUNCH(dbscan_roots_kernel, threads, dim3(kThreads), 0, s, p);
  launch_scan({p.number, p.tiles, p.num_rows}, stream);
  DHCL_LAUNCH(dbscan_labels_kernel, warps, dim3(kThreads), 0, s, p);
}

}  // namespace dhcl
