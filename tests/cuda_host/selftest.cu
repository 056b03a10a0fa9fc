// See selftest.h. Written as production kernels are, but for what nvcc would refuse to compile.
#include <stdexcept>

#include "cuda_host.h"
#include "selftest.h"

namespace selftest {
namespace {

static_assert(alignof(float2) == 8 && sizeof(float2) == 8, "");
static_assert(alignof(float3) == 4 && sizeof(float3) == 12, "");
static_assert(alignof(float4) == 16 && sizeof(float4) == 16, "");
static_assert(alignof(int2) == 8 && alignof(uint4) == 16 && alignof(uchar4) == 4, "");
static_assert(alignof(longlong2) == 16 && sizeof(double4) == 32 && alignof(double4) == 16, "");
static_assert(alignof(ushort4) == 8 && alignof(char2) == 2 && alignof(short2) == 4, "");
static_assert(sizeof(__half) == 2 && sizeof(__nv_bfloat16) == 2 && alignof(__half2) == 4, "");
static_assert(std::is_trivially_copyable<__half>::value, "");
static_assert(std::is_trivially_default_constructible<__nv_bfloat16>::value, "");

constexpr unsigned kFull = 0xffffffffu;

__device__ __forceinline__ int global_thread() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// ---- warp operations ----

__global__ void warp_op_kernel(WarpOp op, const unsigned* __restrict__ masks,
                               const int* __restrict__ values, const int* __restrict__ args,
                               int width, int* __restrict__ out) {
  const int i = threadIdx.x;
  const unsigned mask = masks[i];
  if (mask == 0) return;
  const int value = values[i], arg = args[i];
  const unsigned bits = static_cast<unsigned>(value);
  int result = 0, all_equal = 0;
  switch (op) {
    case WarpOp::kShfl:
      result = __shfl_sync(mask, value, arg, width);
      break;
    case WarpOp::kShflUp:
      result = __shfl_up_sync(mask, value, arg, width);
      break;
    case WarpOp::kShflDown:
      result = __shfl_down_sync(mask, value, arg, width);
      break;
    case WarpOp::kShflXor:
      result = __shfl_xor_sync(mask, value, arg, width);
      break;
    case WarpOp::kBallot:
      result = static_cast<int>(__ballot_sync(mask, value));
      break;
    case WarpOp::kAny:
      result = __any_sync(mask, value);
      break;
    case WarpOp::kAll:
      result = __all_sync(mask, value);
      break;
    case WarpOp::kMatchAny:
      result = static_cast<int>(__match_any_sync(mask, value));
      break;
    case WarpOp::kMatchAll:
      result = static_cast<int>(__match_all_sync(mask, value, &all_equal));
      if ((result != 0) != (all_equal != 0)) result = -2;
      break;
    case WarpOp::kReduceAdd:
      result = __reduce_add_sync(mask, value);
      break;
    case WarpOp::kReduceMin:
      result = __reduce_min_sync(mask, value);
      break;
    case WarpOp::kReduceMax:
      result = __reduce_max_sync(mask, value);
      break;
    case WarpOp::kReduceAnd:
      result = static_cast<int>(__reduce_and_sync(mask, bits));
      break;
    case WarpOp::kReduceOr:
      result = static_cast<int>(__reduce_or_sync(mask, bits));
      break;
    case WarpOp::kReduceXor:
      result = static_cast<int>(__reduce_xor_sync(mask, bits));
      break;
  }
  __syncwarp(mask);
  out[i] = result;
}

template <typename T>
__device__ __forceinline__ double through(T value) {
  return static_cast<double>(__shfl_xor_sync(kFull, value, 1));
}

__global__ void shuffle_types_kernel(const int* values, double* out) {
  const int i = threadIdx.x;
  const int v = values[i];
  double* row = out + 10 * i;
  row[0] = through(v);
  row[1] = through(static_cast<unsigned>(v));
  row[2] = through(static_cast<long>(v) << 24);
  row[3] = through(static_cast<unsigned long>(v) << 24);
  row[4] = through(static_cast<long long>(v) << 24);
  row[5] = through(static_cast<unsigned long long>(v) << 24);
  row[6] = through(0.5f * v);
  row[7] = through(v / 3.0);
  row[8] = __half2float(__shfl_xor_sync(kFull, __float2half_rn(0.5f * v), 1));
  row[9] = __bfloat162float(__shfl_xor_sync(kFull, __float2bfloat16_rn(0.5f * v), 1));
}

// ---- blocks ----

template <typename T>
__device__ __noinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = warpSize / 2; offset > 0; offset /= 2) v += __shfl_down_sync(kFull, v, offset);
  return v;
}

template <typename T>
__device__ T block_sum(T v) {
  __shared__ T part[32];
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  v = warp_sum(v);
  if (lane == 0) part[warp] = v;
  __syncthreads();
  if (warp == 0) v = warp_sum(lane < static_cast<int>(blockDim.x) / warpSize ? part[lane] : T(0));
  return v;
}

template <typename T, bool kShuffle>
__global__ void __launch_bounds__(1024)
    row_sums_kernel(const T* __restrict__ x, T* __restrict__ out, int columns) {
  DHCL_DYNAMIC_SHARED(T, scratch);
  const T* row = x + static_cast<int64_t>(blockIdx.x) * columns;
  T sum = 0;
  for (int c = threadIdx.x; c < columns; c += blockDim.x) sum += __ldg(row + c);
  if (kShuffle) {
    sum = block_sum(sum);
  } else {
    scratch[threadIdx.x] = sum;
    for (unsigned count = blockDim.x; count > 1;) {
      const unsigned half_count = (count + 1) / 2;
      __syncthreads();
      if (threadIdx.x + half_count < count)
        scratch[threadIdx.x] += scratch[threadIdx.x + half_count];
      count = half_count;
    }
    __syncthreads();
    sum = scratch[0];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void block_votes_kernel(const int* predicates, int* out) {
  const int i = threadIdx.x;
  const int predicate = predicates[i];
  if (predicate < 0) return;
  out[4 * i] = __syncthreads_count(predicate);
  out[4 * i + 1] = __syncthreads_and(predicate);
  out[4 * i + 2] = __syncthreads_or(predicate);
  out[4 * i + 3] = __syncthreads_count(1);
}

// Without the barrier a thread may read what its neighbour has not written yet: a race.
__global__ void ring_kernel(int* out, int stay, bool barrier) {
  DHCL_DYNAMIC_SHARED(int, cell);
  const int i = threadIdx.x;
  if (i >= stay) return;
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    cell[i] = i + 100 * round;
    if (barrier) __syncthreads();
    sum += cell[(i + 1) % stay];
    if (barrier) __syncthreads();
  }
  out[i] = sum;
}

__global__ void record_order_kernel(int* out, int* counter) {
  for (int phase = 0; phase < 2; ++phase) {
    int* entry = out + 3 * atomicAdd(counter, 1);
    entry[0] = blockIdx.x;
    entry[1] = threadIdx.x;
    entry[2] = phase;
    __syncthreads();
  }
}

__global__ void coordinates_kernel(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  unsigned* row = out + 6 * (block * (blockDim.x * blockDim.y * blockDim.z) + thread);
  __syncthreads();  // the coordinates must survive a switch
  row[0] = blockIdx.x;
  row[1] = blockIdx.y;
  row[2] = blockIdx.z;
  row[3] = threadIdx.x;
  row[4] = threadIdx.y;
  row[5] = threadIdx.z;
}

// ---- atomics ----

template <typename T>
__global__ void atomics_kernel(T* cells, const T* values, T* old) {
  const int i = threadIdx.x;
  const T v = values[i];
  old[i] = atomicAdd(cells + 0, v);
  atomicMin(cells + 1, v);
  atomicMax(cells + 2, v);
  atomicAnd(cells + 3, v);
  atomicOr(cells + 4, v);
  atomicXor(cells + 5, v);
  atomicExch(cells + 6, v);
  // A maximum once more, by compare and swap.
  T seen = cells[7];
  while (seen < v) {
    const T before = atomicCAS(cells + 7, seen, v);
    if (before == seen) break;
    seen = before;
  }
}

__global__ void floating_atomics_kernel(float* f, double* d, int* counter, unsigned* wrapped) {
  const int i = global_thread();
  atomicAdd(f, 0.5f * i);
  atomicAdd(d, 0.25 * i);
  atomicSub(counter, 1);
  atomicInc(wrapped, 9);
  __threadfence();
}

// ---- numbers ----

__global__ void half_bits_kernel(const float* in, uint16_t* half, uint16_t* bfloat16, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  half[i] = __half_as_ushort(__float2half_rn(in[i]));
  bfloat16[i] = __bfloat16_as_ushort(__float2bfloat16_rn(in[i]));
}

__global__ void half_values_kernel(const uint16_t* in, float* half, float* bfloat16, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  half[i] = __half2float(__ushort_as_half(in[i]));
  bfloat16[i] = __bfloat162float(__ushort_as_bfloat16(in[i]));
}

__global__ void bits_kernel(const uint64_t* in, int64_t* out, int n) {
  const int i = global_thread();
  if (i >= n) return;
  const uint64_t wide = in[i];
  const auto narrow = static_cast<unsigned>(wide);
  int64_t* row = out + 12 * i;
  row[0] = __popc(narrow);
  row[1] = __popcll(wide);
  row[2] = __ffs(static_cast<int>(narrow));
  row[3] = __ffsll(static_cast<long long>(wide));
  row[4] = __clz(static_cast<int>(narrow));
  row[5] = __clzll(static_cast<long long>(wide));
  row[6] = __brev(narrow);
  row[7] = __umulhi(narrow, 0x9e3779b9u);
  row[8] = __float_as_uint(__uint_as_float(narrow));
  row[9] = __float_as_int(__int_as_float(static_cast<int>(narrow)));
  row[10] = __double_as_longlong(__longlong_as_double(static_cast<long long>(wide)));
  row[11] = __funnelshift_l(narrow, static_cast<unsigned>(wide >> 32), 7);
}

__global__ void rounding_kernel(const float* a, const float* b, const float* c, float* out, int n) {
  const int i = global_thread();
  if (i >= n) return;
  float* row = out + 8 * i;
  row[0] = __fadd_rn(__fmul_rn(a[i], b[i]), c[i]);
  row[1] = __fmaf_rn(a[i], b[i], c[i]);
  row[2] = __fdiv_rn(a[i], b[i]);
  row[3] = __fsqrt_rn(fabsf(a[i]));
  row[4] = __fsub_rn(a[i], c[i]);
  row[5] = __frcp_rn(b[i]);
  row[6] = static_cast<float>(__ddiv_rn(__dmul_rn(a[i], b[i]), __dadd_rn(c[i], 3.0)));
  row[7] = rsqrtf(fabsf(a[i]));
}

__global__ void to_integers_kernel(const float* in, int64_t* out, int n) {
  const int i = global_thread();
  if (i >= n) return;
  int64_t* row = out + 6 * i;
  row[0] = __float2int_rn(in[i]);
  row[1] = __float2int_rz(in[i]);
  row[2] = __float2int_rd(in[i]);
  row[3] = __float2int_ru(in[i]);
  row[4] = __float2uint_rz(in[i]);
  row[5] = __float2ll_rn(in[i]);
}

__global__ void mixed_min_max_kernel(double* out) {
  out[0] = min(-1, 2u);
  out[1] = max(-1, 2u);
  out[2] = static_cast<double>(min(int64_t{-5}, int64_t{3}));
  out[3] = min(NAN, 2.0f);
  out[4] = max(1.5f, 2.5);
  out[5] = fminf(NAN, 4.0f);
}

__global__ void vectors_kernel(const float* in, float* out, int n) {
  const int i = global_thread();
  if (4 * i >= n) return;
  const float4 v = __ldg(reinterpret_cast<const float4*>(in) + i);
  __stcs(reinterpret_cast<float4*>(out) + i, make_float4(v.w, v.z, v.y, v.x));
}

// ---- shared memory ----

__global__ void fresh_shared_kernel(unsigned char* out, int bytes) {
  DHCL_DYNAMIC_SHARED(unsigned char, raw);
  unsigned char* mine = out + static_cast<int64_t>(blockIdx.x) * bytes;
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) {
    mine[i] = raw[i];
    raw[i] = 1;  // the next block must not see it
  }
}

__global__ void fill_shared_kernel(int* out, int count) {
  DHCL_DYNAMIC_SHARED(int, cell);
  for (int i = threadIdx.x; i < count; i += blockDim.x) cell[i] = i;
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < count; ++i) sum += cell[i];
  out[threadIdx.x] = sum;
}

__global__ void spin_kernel(int* out) {
  DHCL_DYNAMIC_SHARED(int, turn);
  if (threadIdx.x == 0) *turn = 0;
  __syncthreads();
  const int me = threadIdx.x;
  // The last thread goes first.
  while (atomicAdd(turn, 0) != static_cast<int>(blockDim.x) - 1 - me) __nanosleep(10);
  out[me] = atomicAdd(turn, 1);
}

__global__ void empty_kernel() {}
__global__ void touch_kernel(int bytes) {
  DHCL_DYNAMIC_SHARED(unsigned char, raw);
  if (threadIdx.x == 0 && bytes > 0) raw[bytes - 1] = 1;
}

// ---- faults ----

struct Counted {
  int* live;
  explicit Counted(int* counter) : live(counter) { ++*live; }
  ~Counted() { --*live; }
  Counted(const Counted&) = delete;
};

enum class Divergence {
  kDifferentLines,
  kBlockAgainstWarp,
  kDifferentMasks,
  kOverlappingMasks,
  kDifferentOperations,
  kNotInMask,
  kBadWidth,
  kTwoRounds,
};

__global__ void diverge_kernel(Divergence how, int* live_objects) {
  const Counted counted(live_objects);
  const unsigned i = threadIdx.x;
  switch (how) {
    case Divergence::kDifferentLines:
      if (i < 7) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Divergence::kBlockAgainstWarp:
      if (i < 7) __syncthreads();
      __shfl_xor_sync(kFull, 1, 1);
      break;
    case Divergence::kDifferentMasks:
      __syncwarp(i % 32 < 16 ? kFull : 0xffff0000u);
      __syncthreads();
      break;
    case Divergence::kOverlappingMasks:
      __syncwarp(i % 2 ? kFull : 0x7fffffffu);
      break;
    case Divergence::kDifferentOperations:
      if (i % 2)
        __ballot_sync(kFull, 1);
      else
        __any_sync(kFull, 1);
      break;
    case Divergence::kNotInMask:
      __syncwarp(0xfffffffeu);
      break;
    case Divergence::kBadWidth:
      __shfl_sync(kFull, 1, 0, 12);
      break;
    case Divergence::kTwoRounds:
      for (unsigned round = 0; round < 1 + i % 2; ++round) __syncthreads();
      __syncthreads();
      break;
  }
}

enum class Fault { kDeviceAssert, kAssert, kTrap, kException, kNestedLaunch };

__global__ void fail_kernel(Fault how, int thread, int* live_objects) {
  const Counted counted(live_objects);
  __syncthreads();
  if (global_thread() == thread) {
    switch (how) {
      case Fault::kDeviceAssert:
        DHCL_DEVICE_ASSERT(threadIdx.x > 5000, "index %d is not in [0, %d)\n", thread, 3);
        break;
      case Fault::kAssert:
        assert(threadIdx.x > 6000);
        break;
      case Fault::kTrap:
        __trap();
        break;
      case Fault::kException:
        throw std::out_of_range("thrown by a thread");
      case Fault::kNestedLaunch:
        DHCL_LAUNCH(empty_kernel, 1, 1, 0, nullptr);
        break;
    }
  }
  __syncthreads();
}

template <typename Choice>
Choice choose(const std::string& text, std::initializer_list<std::pair<const char*, Choice>> of) {
  for (const auto& candidate : of)
    if (text == candidate.first) return candidate.second;
  throw std::invalid_argument(text);
}

}  // namespace

void warp_op(WarpOp op, const unsigned* mask, const int* value, const int* arg, int width, int* out,
             int n) {
  DHCL_LAUNCH(warp_op_kernel, 1, n, 0, nullptr, op, mask, value, arg, width, out);
}

void shuffle_types(const int* value, double* out, int n) {
  DHCL_LAUNCH(shuffle_types_kernel, dim3(1), dim3(n), 0, nullptr, value, out);
}

void row_sums(const float* x, float* by_tree, float* by_shuffle, int rows, int columns,
              int threads) {
  const dim3 grid(rows), block(threads);
  DHCL_LAUNCH((row_sums_kernel<float, false>), grid, block, threads * sizeof(float), nullptr, x,
              by_tree, columns);
  DHCL_LAUNCH((row_sums_kernel<float, true>), grid, block, 0, nullptr, x, by_shuffle, columns);
}

void block_votes(const int* predicate, int* out, int n) {
  DHCL_LAUNCH(block_votes_kernel, 1, n, 0, nullptr, predicate, out);
}

void ring(int* out, int n, int stay, bool barrier) {
  DHCL_LAUNCH(ring_kernel, 1, n, stay * sizeof(int), nullptr, out, stay, barrier);
}

void record_order(int* out, int blocks, int threads) {
  int counter = 0;
  DHCL_LAUNCH(record_order_kernel, blocks, threads, 0, nullptr, out, &counter);
}

void coordinates(unsigned* out, const unsigned* grid, const unsigned* block) {
  DHCL_LAUNCH(coordinates_kernel, dim3(grid[0], grid[1], grid[2]),
              dim3(block[0], block[1], block[2]), 0, nullptr, out);
}

template <typename T>
void atomics(T* cells, const T* values, T* old, int n) {
  DHCL_LAUNCH((atomics_kernel<T>), 1, n, 0, nullptr, cells, values, old);
}
template void atomics(int*, const int*, int*, int);
template void atomics(unsigned*, const unsigned*, unsigned*, int);
template void atomics(unsigned long long*, const unsigned long long*, unsigned long long*, int);

void floating_atomics(float* f, double* d, int* counter, int n) {
  unsigned wrapped = 0;
  DHCL_LAUNCH(floating_atomics_kernel, n, 1, 0, nullptr, f, d, counter, &wrapped);
  counter[1] = static_cast<int>(wrapped);
}

void half_bits(const float* in, uint16_t* half, uint16_t* bfloat16, int64_t n) {
  DHCL_LAUNCH(half_bits_kernel, static_cast<unsigned>((n + 255) / 256), 256, 0, nullptr, in, half,
              bfloat16, n);
}

void half_values(const uint16_t* in, float* half, float* bfloat16, int64_t n) {
  DHCL_LAUNCH(half_values_kernel, static_cast<unsigned>((n + 255) / 256), 256, 0, nullptr, in, half,
              bfloat16, n);
}

void bits(const uint64_t* in, int64_t* out, int n) {
  DHCL_LAUNCH(bits_kernel, (n + 31) / 32, 32, 0, nullptr, in, out, n);
}

void rounding(const float* a, const float* b, const float* c, float* out, int n) {
  DHCL_LAUNCH(rounding_kernel, (n + 31) / 32, 32, 0, nullptr, a, b, c, out, n);
}

void to_integers(const float* in, int64_t* out, int n) {
  DHCL_LAUNCH(to_integers_kernel, (n + 31) / 32, 32, 0, nullptr, in, out, n);
}

void mixed_min_max(double* out) { DHCL_LAUNCH(mixed_min_max_kernel, 1, 1, 0, nullptr, out); }

void vectors(const float* in, float* out, int n) {
  DHCL_LAUNCH(vectors_kernel, 1, (n + 3) / 4, 0, nullptr, in, out, n);
}

void fresh_shared(unsigned char* out, int blocks, int bytes) {
  DHCL_LAUNCH(fresh_shared_kernel, blocks, 8, bytes, nullptr, out, bytes);
}

void fill_shared(int* out, int room, int count) {
  DHCL_LAUNCH(fill_shared_kernel, 1, 32, room * sizeof(int), nullptr, out, count);
}

void spin(int* out, int threads) {
  DHCL_LAUNCH(spin_kernel, 1, threads, sizeof(int), nullptr, out);
}

void empty(const unsigned* grid, const unsigned* block, uint64_t shared_bytes) {
  DHCL_LAUNCH(empty_kernel, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
              shared_bytes, nullptr);
}

std::string opt_in(int bytes, uint64_t shared_bytes) {
  cudaFuncSetAttribute(touch_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const cudaError_t error = cudaGetLastError();
  DHCL_LAUNCH(touch_kernel, 1, 1, shared_bytes, nullptr, static_cast<int>(shared_bytes));
  // Read once, an error is gone.
  return std::string(cudaGetErrorString(error)) + "; " + cudaGetErrorString(cudaGetLastError());
}

void diverge(const std::string& how, int threads, int* live_objects) {
  const auto choice = choose<Divergence>(how, {
                                                  {"lines", Divergence::kDifferentLines},
                                                  {"block_warp", Divergence::kBlockAgainstWarp},
                                                  {"masks", Divergence::kDifferentMasks},
                                                  {"overlap", Divergence::kOverlappingMasks},
                                                  {"operations", Divergence::kDifferentOperations},
                                                  {"not_in_mask", Divergence::kNotInMask},
                                                  {"width", Divergence::kBadWidth},
                                                  {"rounds", Divergence::kTwoRounds},
                                              });
  DHCL_LAUNCH(diverge_kernel, 2, threads, 0, nullptr, choice, live_objects);
}

void fail(const std::string& how, int thread, int blocks, int threads, int* live_objects) {
  const auto choice = choose<Fault>(how, {
                                             {"device_assert", Fault::kDeviceAssert},
                                             {"assert", Fault::kAssert},
                                             {"trap", Fault::kTrap},
                                             {"exception", Fault::kException},
                                             {"nested", Fault::kNestedLaunch},
                                         });
  DHCL_LAUNCH(fail_kernel, blocks, threads, 0, nullptr, choice, thread, live_objects);
}

}  // namespace selftest
