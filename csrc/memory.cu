// CUDA kernels of the memory bank.
//
// All are bound by memory: a momentum update reads a bank row and a feature row and writes the bank
// row (12 bytes per element in fp32), a prototype reads each member row once. One warp owns one
// output row (or a 128-column slice of it) and nobody else writes there, so there are no atomics on
// floats and the result has the same bits every time.
#include "common/device.h"
#include "memory.h"

namespace dhcl {
namespace {

constexpr int kWarpsPerBlock = 8;
// Batch positions whose indices one block stages in shared memory: 32 KiB.
constexpr int64_t kChunk = 4096;

// v = m * old + (1 - m) * f, four columns.
template <bool kAligned, typename BankT, typename FeatureT>
__device__ __forceinline__ void mix4(const BankT* bank_row, const FeatureT* feature_row,
                                     int64_t col, int64_t d, float m, float one_minus_m,
                                     float (&v)[4]) {
  BankT old[4];
  FeatureT f[4];
  load4<kAligned>(bank_row, col, d, old);
  load4<kAligned>(feature_row, col, d, f);
#pragma unroll
  for (int c = 0; c < 4; ++c)
    v[c] = add_rn(mul_rn(m, to_float(old[c])), mul_rn(one_minus_m, to_float(f[c])));
}

// One warp per batch position. The warp of a row's first occurrence in the chunk applies all its
// occurrences in batch order; the others leave. Chunks are launches of their own, one after another
// on the stream, so order holds across them too.
template <bool kAligned, typename BankT, typename FeatureT>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    momentum_update_kernel(BankT* bank, const FeatureT* __restrict__ features,
                           const int64_t* __restrict__ indices, int64_t* skipped, int64_t num_rows,
                           int count, int64_t d, float m, float one_minus_m, float eps) {
  DHCL_DYNAMIC_SHARED(int64_t, rows);
  const int lane = threadIdx.x;
  for (int i = threadIdx.y * kWarp + lane; i < count; i += kWarp * kWarpsPerBlock)
    rows[i] = indices[i];
  __syncthreads();
  const int position = static_cast<int>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (position >= count) return;
  const int64_t row = rows[position];
  DHCL_DEVICE_ASSERT(row >= 0 && row < num_rows,
                     "momentum_update_: indices must be in [0, %lld) (got %lld at batch position "
                     "%d)\n",
                     static_cast<long long>(num_rows), static_cast<long long>(row), position);
  bool seen = false;
  for (int i = lane; i < position; i += kWarp) seen |= rows[i] == row;
  if (__any_sync(kFullWarp, seen)) return;

  BankT* bank_row = bank + row * d;
  for (int base = position; base < count; base += kWarp) {
    unsigned occurrences =
        __ballot_sync(kFullWarp, base + lane < count && rows[base + lane] == row);
    while (occurrences != 0) {
      const int occurrence = base + __ffs(static_cast<int>(occurrences)) - 1;
      occurrences &= occurrences - 1;
      const FeatureT* feature_row = features + occurrence * d;
      float squares[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
      for (int64_t col = 4 * lane; col < d; col += kSumColumns) {
        float v[4];
        mix4<kAligned>(bank_row, feature_row, col, d, m, one_minus_m, v);
#pragma unroll
        for (int c = 0; c < 4; ++c) squares[c] = add_rn(squares[c], mul_rn(v[c], v[c]));
      }
      const float norm = sqrt_rn(fold_columns(squares));
      const float divisor = fmaxf(norm, eps);
      if (!(isfinite(norm) && divisor > 0.0f)) {
        if (lane == 0 && skipped != nullptr)
          atomicAdd(reinterpret_cast<unsigned long long*>(skipped), 1ull);
        continue;
      }
      // The mixed row is computed again rather than kept: its inputs are in L1 by now, and d is not
      // bounded by registers.
#pragma unroll 4
      for (int64_t col = 4 * lane; col < d; col += kSumColumns) {
        float v[4];
        BankT out[4];
        mix4<kAligned>(bank_row, feature_row, col, d, m, one_minus_m, v);
#pragma unroll
        for (int c = 0; c < 4; ++c) out[c] = from_float<BankT>(div_rn(v[c], divisor));
        store4<kAligned>(bank_row, col, d, out);
      }
    }
  }
}

template <typename BankT, typename FeatureT>
void momentum_update(const MomentumParams& p, cudaStream_t stream) {
  const auto misaligned = [](const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes != 0;
  };
  const bool aligned = p.dim % 4 == 0 && !misaligned(p.bank, 4 * sizeof(BankT)) &&
                       !misaligned(p.features, 4 * sizeof(FeatureT));
  for (int64_t start = 0; start < p.batch; start += kChunk) {
    const int count = static_cast<int>(p.batch - start < kChunk ? p.batch - start : kChunk);
    const dim3 grid(static_cast<unsigned>(ceil_div(count, kWarpsPerBlock)));
    const dim3 block(kWarp, kWarpsPerBlock);
    const size_t smem = count * sizeof(int64_t);
    auto* bank = static_cast<BankT*>(p.bank);
    const auto* features = static_cast<const FeatureT*>(p.features) + start * p.dim;
    const int64_t* indices = p.indices + start;
    if (aligned) {
      DHCL_LAUNCH((momentum_update_kernel<true, BankT, FeatureT>), grid, block, smem, stream, bank,
                  features, indices, p.skipped, p.num_rows, count, p.dim, p.momentum,
                  p.one_minus_momentum, p.eps);
    } else {
      DHCL_LAUNCH((momentum_update_kernel<false, BankT, FeatureT>), grid, block, smem, stream, bank,
                  features, indices, p.skipped, p.num_rows, count, p.dim, p.momentum,
                  p.one_minus_momentum, p.eps);
    }
  }
}

template <typename BankT>
void momentum_update_for(const MomentumParams& p, cudaStream_t stream) {
  switch (p.feature_dtype) {
    case Dtype::kFloat16:
      return momentum_update<BankT, __half>(p, stream);
    case Dtype::kBFloat16:
      return momentum_update<BankT, __nv_bfloat16>(p, stream);
    default:
      return momentum_update<BankT, float>(p, stream);
  }
}

// True in every thread of the block where an earlier entry of the list names the same class.
__device__ __forceinline__ bool repeated(const int64_t* classes, int64_t entry) {
  bool seen = false;
  for (int64_t i = threadIdx.y * kWarp + threadIdx.x; i < entry; i += kWarp * kWarpsPerBlock)
    seen |= classes[i] == classes[entry];
  return __syncthreads_or(seen) != 0;
}

// Block (x: entry of the list, y: group of slices), one warp per 128-column slice of the mean.
template <bool kAligned, typename T, typename A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    segment_mean_kernel(T* means, const T* __restrict__ rows, const int64_t* __restrict__ members,
                        const int64_t* __restrict__ offsets, const int64_t* __restrict__ classes,
                        int64_t num_classes, int64_t d) {
  const int64_t entry = blockIdx.x;
  if (classes != nullptr && repeated(classes, entry)) return;
  const int64_t k = classes == nullptr ? entry : classes[entry];
  DHCL_DEVICE_ASSERT(k >= 0 && k < num_classes,
                     "update_segment_mean_: classes must be in [0, %lld) (got %lld)\n",
                     static_cast<long long>(num_classes), static_cast<long long>(k));
  const int64_t begin = offsets[k];
  const int64_t end = offsets[k + 1];
  const int64_t first =
      4 * threadIdx.x +
      kSumColumns * (static_cast<int64_t>(blockIdx.y) * kWarpsPerBlock + threadIdx.y);
  for (int64_t col = first; col < d; col += kSumColumns * kWarpsPerBlock * gridDim.y) {
    A total[4] = {A(0), A(0), A(0), A(0)};
    for (int64_t run = begin; run < end; run += kRunLength) {
      const int64_t stop = run + kRunLength < end ? run + kRunLength : end;
      A part[4] = {A(0), A(0), A(0), A(0)};
#pragma unroll 4
      for (int64_t j = run; j < stop; ++j) {
        T value[4];
        load4<kAligned>(rows + members[j] * d, col, d, value);
#pragma unroll
        for (int c = 0; c < 4; ++c) part[c] = add_rn(part[c], A(to_float(value[c])));
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) total[c] = add_rn(total[c], part[c]);
    }
    T out[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      out[c] = from_accumulator<T>(end > begin ? div_rn(total[c], A(end - begin)) : A(0));
    store4<kAligned>(means + k * d, col, d, out);
  }
}

// One block per entry of the list; its first warp normalises the row.
template <bool kAligned, typename T, typename A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    normalize_rows_kernel(T* means, const int64_t* __restrict__ classes, int64_t d) {
  const int64_t entry = blockIdx.x;
  if (classes != nullptr && repeated(classes, entry)) return;
  if (threadIdx.y != 0) return;
  T* row = means + (classes == nullptr ? entry : classes[entry]) * d;
  A squares[4] = {A(0), A(0), A(0), A(0)};
  for (int64_t col = 4 * threadIdx.x; col < d; col += kSumColumns) {
    T value[4];
    load4<kAligned>(row, col, d, value);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const A x = A(to_float(value[c]));
      squares[c] = add_rn(squares[c], mul_rn(x, x));
    }
  }
  const A norm = sqrt_rn(fold_columns(squares));
  const A divisor = norm > A(kMeanEps) ? norm : A(kMeanEps);
  for (int64_t col = 4 * threadIdx.x; col < d; col += kSumColumns) {
    T value[4];
    load4<kAligned>(row, col, d, value);
#pragma unroll
    for (int c = 0; c < 4; ++c)
      value[c] = from_accumulator<T>(div_rn(A(to_float(value[c])), divisor));
    store4<kAligned>(row, col, d, value);
  }
}

// Block (x: position in members, y: group of slices), one warp per 128-column slice.
template <typename T, typename A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    segment_mean_backward_kernel(T* grad_rows, const T* __restrict__ grad,
                                 const int64_t* __restrict__ members,
                                 const int64_t* __restrict__ offsets, int64_t num_classes,
                                 int64_t d) {
  const int64_t position = blockIdx.x;
  // The class of a position: the last k with offsets[k] <= position.
  int64_t low = 0, high = num_classes;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle + 1] <= position)
      low = middle + 1;
    else
      high = middle;
  }
  const bool member = low < num_classes && offsets[low] <= position;
  const A count = member ? A(offsets[low + 1] - offsets[low]) : A(1);
  T* out = grad_rows + members[position] * d;
  const int64_t first = threadIdx.x + kWarp * threadIdx.y;
  for (int64_t col = first; col < d; col += kWarp * kWarpsPerBlock)
    out[col] = from_accumulator<T>(member ? div_rn(A(to_float(grad[low * d + col])), count) : A(0));
}

template <bool kAligned, typename T, typename A>
void segment_mean_aligned(const SegmentMeanParams& p, cudaStream_t stream) {
  const int64_t groups = ceil_div(p.dim, kSumColumns * kWarpsPerBlock);
  // Few entries: spread the columns over more blocks. Many: one block each, so that the search for
  // repeats is done once per entry.
  const int64_t spread = p.num_listed >= 4096 ? 1 : groups;
  const dim3 block(kWarp, kWarpsPerBlock);
  DHCL_LAUNCH((segment_mean_kernel<kAligned, T, A>),
              dim3(static_cast<unsigned>(p.num_listed), static_cast<unsigned>(spread)), block, 0,
              stream, static_cast<T*>(p.means), static_cast<const T*>(p.rows), p.members, p.offsets,
              p.classes, p.num_classes, p.dim);
  if (p.normalize)
    DHCL_LAUNCH((normalize_rows_kernel<kAligned, T, A>), dim3(static_cast<unsigned>(p.num_listed)),
                block, 0, stream, static_cast<T*>(p.means), p.classes, p.dim);
}

template <typename T, typename A>
void segment_mean(const SegmentMeanParams& p, cudaStream_t stream) {
  const bool aligned = p.dim % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(p.rows) % (4 * sizeof(T)) == 0 &&
                       reinterpret_cast<uintptr_t>(p.means) % (4 * sizeof(T)) == 0;
  if (aligned)
    segment_mean_aligned<true, T, A>(p, stream);
  else
    segment_mean_aligned<false, T, A>(p, stream);
}

template <typename T, typename A>
void segment_mean_backward(const SegmentMeanBackwardParams& p, cudaStream_t stream) {
  DHCL_LAUNCH((segment_mean_backward_kernel<T, A>), dim3(static_cast<unsigned>(p.num_rows)),
              dim3(kWarp, kWarpsPerBlock), 0, stream, static_cast<T*>(p.grad_rows),
              static_cast<const T*>(p.grad), p.members, p.offsets, p.num_classes, p.dim);
}

}  // namespace

void launch_momentum_update(const MomentumParams& p, void* stream) {
  if (p.batch == 0 || p.dim == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.bank_dtype) {
    case Dtype::kFloat16:
      return momentum_update_for<__half>(p, s);
    case Dtype::kBFloat16:
      return momentum_update_for<__nv_bfloat16>(p, s);
    default:
      return momentum_update_for<float>(p, s);
  }
}

void launch_segment_mean(const SegmentMeanParams& p, void* stream) {
  if (p.num_listed == 0 || p.dim == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::kFloat16:
      return segment_mean<__half, float>(p, s);
    case Dtype::kBFloat16:
      return segment_mean<__nv_bfloat16, float>(p, s);
    case Dtype::kFloat64:
      return segment_mean<double, double>(p, s);
    default:
      return segment_mean<float, float>(p, s);
  }
}

void launch_segment_mean_backward(const SegmentMeanBackwardParams& p, void* stream) {
  if (p.num_rows == 0 || p.dim == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::kFloat16:
      return segment_mean_backward<__half, float>(p, s);
    case Dtype::kBFloat16:
      return segment_mean_backward<__nv_bfloat16, float>(p, s);
    case Dtype::kFloat64:
      return segment_mean_backward<double, double>(p, s);
    default:
      return segment_mean_backward<float, float>(p, s);
  }
}

}  // namespace dhcl
