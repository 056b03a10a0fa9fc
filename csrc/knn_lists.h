// Lists of candidates that are sorted in shared memory, for the kernels of the neighbour search.
#pragma once
#include "common/device.h"

namespace dhcl {

constexpr int kLane4 = 4;  // neighbouring columns per lane
constexpr int kStep = kWarp * kLane4;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

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
__device__ __forceinline__ int index_of(unsigned long long key) {
  return static_cast<int>(key & 0xffffffffull);
}

// The threads that sort together: a warp, or a block of one dimension.
struct WarpThreads {
  static constexpr int kThreads = kWarp;
  __device__ static int rank() { return lane_id(); }
  __device__ static void sync() { __syncwarp(); }
};
template <int kSize>
struct BlockThreads {
  static constexpr int kThreads = kSize;
  __device__ static int rank() { return static_cast<int>(threadIdx.x); }
  __device__ static void sync() { __syncthreads(); }
};

// Sorts keys[0 .. count) in ascending order, whoever of the threads has written them; there must be
// room up to the next power of two.
template <typename Threads>
__device__ void sort_keys(unsigned long long* keys, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + Threads::rank(); i < size; i += Threads::kThreads) keys[i] = ~0ull;
  Threads::sync();
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int pair = Threads::rank(); pair < size / 2; pair += Threads::kThreads) {
        const int low = 2 * pair - (pair & (stride - 1));
        const int high = low + stride;
        const unsigned long long a = keys[low];
        const unsigned long long b = keys[high];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      Threads::sync();
    }
  }
}

// The candidates of one row in shared memory, a warp's own: every lane holds the same numbers.
struct WarpList {
  unsigned long long* keys;
  int count;
  int keep;
  int room;  // a power of two, at least keep + kStep
  float threshold;

  __device__ void cut() {
    sort_keys<WarpThreads>(keys, count);
    if (count >= keep) {
      threshold = value_of(keys[keep - 1]);
      count = keep;
    }
  }
  // After this kStep more fit, as count is at most keep then.
  __device__ void make_room() {
    if (count + kStep > room) cut();
  }
  // All lanes together, each with one entry or none; fewer than kStep since make_room.
  __device__ void push(bool passes, float value, int index) {
    const unsigned ballot = __ballot_sync(kFullWarp, passes);
    if (passes) keys[count + __popc(ballot & ((1u << lane_id()) - 1))] = sort_key(value, index);
    count += __popc(ballot);
  }
};

}  // namespace dhcl
