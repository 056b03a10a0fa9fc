// Small device building blocks shared by the op families: places in a grid, number formats, 4-wide
// loads, warp sums.
#pragma once
#include "cuda_compat.h"
#include "sums.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dhcl {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int64_t kMaxGrid = 2147483647;

__host__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many blocks as items need, or as a grid can have: kernels step over the rest.
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

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ double to_float(double x) { return x; }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ double from_float<double>(float x) {
  return x;
}
// From an accumulator, which is double for a double tensor and float for all others.
template <typename T>
__device__ __forceinline__ T from_accumulator(float x) {
  return from_float<T>(x);
}
template <typename T>
__device__ __forceinline__ T from_accumulator(double x) {
  return x;
}

// Sums in this project have a fixed order, and a contracted multiply-add would change their bits;
// the intrinsics keep nvcc from contracting.
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add_rn(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double div_rn(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ float sqrt_rn(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ double sqrt_rn(double a) { return __dsqrt_rn(a); }

// Four neighbouring elements, moved in one transaction where the address allows it.
template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T x[4];
};

// Columns col .. col+3 of a row of length d; what lies past the end reads as zero.
template <bool kAligned, typename T>
__device__ __forceinline__ void load4(const T* row, int64_t col, int64_t d, T (&out)[4]) {
  if (kAligned) {
    if (col < d) {
      const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(row + col);
#pragma unroll
      for (int c = 0; c < 4; ++c) out[c] = quad.x[c];
      return;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) out[c] = from_float<T>(0.0f);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) out[c] = col + c < d ? row[col + c] : from_float<T>(0.0f);
  }
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store4(T* row, int64_t col, int64_t d, const T (&in)[4]) {
  if (kAligned) {
    if (col < d) {
      Quad<T> quad;
#pragma unroll
      for (int c = 0; c < 4; ++c) quad.x[c] = in[c];
      *reinterpret_cast<Quad<T>*>(row + col) = quad;
    }
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (col + c < d) row[col + c] = in[c];
  }
}

// Ends the fixed-order sum of 128 columns (see sums.h): the lane holds columns 4*lane .. 4*lane+3,
// and halving the columns from 64 down to 1 is five shuffles, then two adds.
// Every lane gets the same bits.
template <typename A>
__device__ __forceinline__ A fold_columns(A (&part)[4]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
      part[c] = add_rn(part[c], __shfl_xor_sync(kFullWarp, part[c], offset));
  }
  return add_rn(add_rn(part[0], part[2]), add_rn(part[1], part[3]));
}

// The inner product of two rows by a whole warp. kUnroll: columns in flight.
template <bool kAligned, int kUnroll, typename T>
__device__ __forceinline__ float warp_dot(const float* x, const T* y, int64_t d) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll kUnroll
  for (int64_t col = 4 * lane_id(); col < d; col += kSumColumns) {
    float a[4];
    T b[4];
    load4<kAligned>(x, col, d, a);
    load4<kAligned>(y, col, d, b);
#pragma unroll
    for (int c = 0; c < 4; ++c) part[c] = add_rn(part[c], mul_rn(a[c], to_float(b[c])));
  }
  return fold_columns(part);
}

}  // namespace dhcl
