// CUDA kernels of the memory bank.
//
// All are bound by memory: a momentum update reads a bank row and a feature row and writes the bank
// row (12 bytes per element in fp32), a prototype reads each member row once. One block or warp
// owns one output row (or a 128-column slice of it) and nobody else writes there, so there are no
// atomics on floats and the result has the same bits every time.
#include "common/device.h"
#include "memory.h"

namespace dhcl {
namespace {

constexpr int kWarpsPerBlock = 8;

// ---- momentum update

// A block per batch position. Thread c has the elements c, c + 128, .. of its row, which are those
// of column c of the sum, so a batch of 256 brings 32,768 threads and their loads go out together.
constexpr int kUpdateThreads = static_cast<int>(kSumColumns);
// Elements of a row that a thread keeps in registers; longer rows are read twice.
constexpr int kHeld = 16;
// Batch positions of one launch: every block looks at all of them.
constexpr int64_t kChunk = 1024;

// The first position from `from` on whose bit is set, or count.
__device__ __forceinline__ int next_position(const unsigned* named, int from, int count) {
  for (int word = from / kWarp; word * kWarp < count; ++word) {
    unsigned bits = named[word];
    if (word == from / kWarp) bits &= ~0u << (from % kWarp);
    if (bits != 0) return word * kWarp + __ffs(static_cast<int>(bits)) - 1;
  }
  return count;
}

// The norm from the threads' columns, in the order of sums.h; every thread gets it. Two of
// `columns` in turn spare a second barrier.
__device__ __forceinline__ float norm_of_columns(float own, float* columns) {
  columns[threadIdx.x] = own;
  __syncthreads();
  const int c = lane_id();
  float sum = add_rn(add_rn(columns[c], columns[c + 64]), add_rn(columns[c + 32], columns[c + 96]));
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    sum = add_rn(sum, __shfl_xor_sync(kFullWarp, sum, offset));
  return sqrt_rn(sum);
}

__device__ __forceinline__ bool usable(float norm, float divisor) {
  return isfinite(norm) && divisor > 0.0f;
}

__device__ __forceinline__ void count_skipped(int64_t* skipped) {
  if (threadIdx.x == 0 && skipped != nullptr) add_to(skipped, 1);
}

template <typename T>
__device__ __forceinline__ void load_own(const T* row, int64_t d, T (&own)[kHeld]) {
#pragma unroll
  for (int s = 0; s < kHeld; ++s) {
    const int64_t j = threadIdx.x + s * kSumColumns;
    own[s] = j < d ? row[j] : from_float<T>(0.0f);
  }
}

// Applies the occurrences of a row of at most kHeld * 128 elements. It stays in registers from the
// first to the last, and the next feature is on its way while a norm is summed up.
template <typename BankT, typename FeatureT>
__device__ __forceinline__ void update_held_row(const MomentumParams& p, BankT* bank_row,
                                                const FeatureT* features, const unsigned* named,
                                                int first, int count, float (*columns)[kSumColumns],
                                                FeatureT (&feature)[kHeld]) {
  BankT row[kHeld];
  load_own(bank_row, p.dim, row);
  bool moved = false;
  int buffer = 0;
  for (int at = first; at < count; buffer ^= 1) {
    float mixed[kHeld];
    float own = 0.0f;
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      mixed[s] = add_rn(mul_rn(p.momentum, to_float(row[s])),
                        mul_rn(p.one_minus_momentum, to_float(feature[s])));
      own = add_rn(own, mul_rn(mixed[s], mixed[s]));
    }
    at = next_position(named, at + 1, count);
    if (at < count) load_own(features + at * p.dim, p.dim, feature);
    const float norm = norm_of_columns(own, columns[buffer]);
    const float divisor = fmaxf(norm, p.eps);
    if (!usable(norm, divisor)) {
      count_skipped(p.skipped);
      continue;
    }
    moved = true;
#pragma unroll
    for (int s = 0; s < kHeld; ++s)
      if (threadIdx.x + s * kSumColumns < p.dim)
        row[s] = from_float<BankT>(div_rn(mixed[s], divisor));
  }
  if (!moved) return;
#pragma unroll
  for (int s = 0; s < kHeld; ++s) {
    const int64_t j = threadIdx.x + s * kSumColumns;
    if (j < p.dim) bank_row[j] = row[s];
  }
}

// The same for rows of any length: the mixed row is computed again rather than kept.
template <typename BankT, typename FeatureT>
__device__ __forceinline__ void update_long_row(const MomentumParams& p, BankT* bank_row,
                                                const FeatureT* features, const unsigned* named,
                                                int first, int count,
                                                float (*columns)[kSumColumns]) {
  int buffer = 0;
  for (int at = first; at < count; at = next_position(named, at + 1, count), buffer ^= 1) {
    const FeatureT* feature = features + at * p.dim;
    const auto mixed = [&](int64_t j) {
      return add_rn(mul_rn(p.momentum, to_float(bank_row[j])),
                    mul_rn(p.one_minus_momentum, to_float(feature[j])));
    };
    float own = 0.0f;
#pragma unroll 8
    for (int64_t j = threadIdx.x; j < p.dim; j += kUpdateThreads) {
      const float v = mixed(j);
      own = add_rn(own, mul_rn(v, v));
    }
    const float norm = norm_of_columns(own, columns[buffer]);
    const float divisor = fmaxf(norm, p.eps);
    if (!usable(norm, divisor)) {
      count_skipped(p.skipped);
      continue;
    }
#pragma unroll 8
    for (int64_t j = threadIdx.x; j < p.dim; j += kUpdateThreads)
      bank_row[j] = from_float<BankT>(div_rn(mixed(j), divisor));
  }
}

// The block of a row's first occurrence among the positions [start, start + count) applies all of
// them in batch order; the others leave. Chunks are launches of their own, one after another on the
// stream, so order holds across them too.
template <bool kFits, typename BankT, typename FeatureT>
__global__ void __launch_bounds__(kUpdateThreads)
    momentum_update_kernel(const MomentumParams p, int64_t start, int count) {
  __shared__ unsigned named[kChunk / kWarp];
  __shared__ float columns[2][kSumColumns];
  const int position = static_cast<int>(blockIdx.x);
  const int64_t* indices = p.indices + start;
  const auto* features = static_cast<const FeatureT*>(p.features) + start * p.dim;
  const int64_t row = indices[position];
  DHCL_DEVICE_ASSERT(row >= 0 && row < p.num_rows,
                     "momentum_update_: indices must be in [0, %lld) (got %lld at batch position "
                     "%lld)\n",
                     static_cast<long long>(p.num_rows), static_cast<long long>(row),
                     static_cast<long long>(start + position));
  [[maybe_unused]] FeatureT feature[kHeld];
  if constexpr (kFits) load_own(features + position * p.dim, p.dim, feature);
  for (int base = 0; base < count; base += kUpdateThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    const unsigned found = __ballot_sync(kFullWarp, i < count && indices[i] == row);
    if (lane_id() == 0) named[base / kWarp + warp_id()] = found;
  }
  __syncthreads();
  if (next_position(named, 0, count) != position) return;
  BankT* bank_row = static_cast<BankT*>(p.bank) + row * p.dim;
  if constexpr (kFits)
    update_held_row(p, bank_row, features, named, position, count, columns, feature);
  else
    update_long_row(p, bank_row, features, named, position, count, columns);
}

template <typename BankT, typename FeatureT>
void momentum_update(const MomentumParams& p, cudaStream_t stream) {
  for (int64_t start = 0; start < p.batch; start += kChunk) {
    const int count = static_cast<int>(p.batch - start < kChunk ? p.batch - start : kChunk);
    const dim3 grid(static_cast<unsigned>(count)), block(kUpdateThreads);
    if (p.dim <= kHeld * kSumColumns)
      DHCL_LAUNCH((momentum_update_kernel<true, BankT, FeatureT>), grid, block, 0, stream, p, start,
                  count);
    else
      DHCL_LAUNCH((momentum_update_kernel<false, BankT, FeatureT>), grid, block, 0, stream, p,
                  start, count);
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

// ---- class means

// Four columns of the sum of one run's rows; for a warp, which has 128.
template <bool kAligned, typename T, typename A>
__device__ __forceinline__ void sum_run(const SegmentMeanParams& p, int64_t begin, int64_t end,
                                        int64_t col, A (&sum)[4]) {
  const T* rows = static_cast<const T*>(p.rows);
#pragma unroll
  for (int c = 0; c < 4; ++c) sum[c] = A(0);
#pragma unroll 4
  for (int64_t j = begin; j < end; ++j) {
    T value[4];
    load4<kAligned>(rows + p.members[j] * p.dim, col, p.dim, value);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] = add_rn(sum[c], A(to_float(value[c])));
  }
}

template <bool kAligned, typename T, typename A>
__device__ __forceinline__ void store_mean(const SegmentMeanParams& p, int64_t k, int64_t col,
                                           const A (&total)[4]) {
  const int64_t size = p.offsets[k + 1] - p.offsets[k];
  T out[4];
#pragma unroll
  for (int c = 0; c < 4; ++c)
    out[c] = from_accumulator<T>(size > 0 ? div_rn(total[c], A(size)) : A(0));
  store4<kAligned>(static_cast<T*>(p.means) + k * p.dim, col, p.dim, out);
}

// A class of one run is summed by a warp for each slice of 128 columns, a longer one by the block.
__device__ __forceinline__ bool is_long(const SegmentMeanParams& p, int64_t k) {
  return p.offsets[k + 1] - p.offsets[k] > kRunLength;
}

template <bool kAligned, typename T, typename A>
__device__ __forceinline__ void short_mean(const SegmentMeanParams& p, int64_t k, int64_t slice) {
  const int64_t col = slice * kSumColumns + 4 * threadIdx.x;
  A total[4];
  sum_run<kAligned, T, A>(p, p.offsets[k], p.offsets[k + 1], col, total);
  store_mean<kAligned, T, A>(p, k, col, total);
}

// Each warp sums a run, and the first one adds the runs' sums in order.
template <bool kAligned, typename T, typename A>
__device__ void long_mean(const SegmentMeanParams& p, int64_t k, int64_t slice) {
  __shared__ A parts[kWarpsPerBlock][4 * kWarp];
  const int64_t col = slice * kSumColumns + 4 * threadIdx.x;
  const int64_t begin = p.offsets[k], end = p.offsets[k + 1];
  A total[4] = {A(0), A(0), A(0), A(0)};
  for (int64_t base = begin; base < end; base += kRunLength * kWarpsPerBlock) {
    const int64_t run = base + kRunLength * threadIdx.y;
    A part[4];
    sum_run<kAligned, T, A>(p, run, run + kRunLength < end ? run + kRunLength : end, col, part);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 4; ++c) parts[threadIdx.y][4 * threadIdx.x + c] = part[c];
    __syncthreads();
    for (int w = 0; w < kWarpsPerBlock && base + kRunLength * w < end; ++w)
#pragma unroll
      for (int c = 0; c < 4; ++c) total[c] = add_rn(total[c], parts[w][4 * threadIdx.x + c]);
  }
  if (threadIdx.y == 0) store_mean<kAligned, T, A>(p, k, col, total);
}

// All classes: a warp per slice, slices of one class after another.
template <bool kAligned, typename T, typename A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    all_means_kernel(const SegmentMeanParams p, int64_t slices) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock;
  const int64_t own = first + threadIdx.y, count = p.num_classes * slices;
  const bool waits = own < count && is_long(p, own / slices);
  if (own < count && !waits) short_mean<kAligned, T, A>(p, own / slices, own % slices);
  if (__syncthreads_or(waits) == 0) return;
  for (int64_t at = first; at < first + kWarpsPerBlock && at < count; ++at)
    if (is_long(p, at / slices)) long_mean<kAligned, T, A>(p, at / slices, at % slices);
}

// The class that an entry of the list names; none, -1, for a row that isn't there.
__device__ __forceinline__ int64_t listed_class(const SegmentMeanParams& p, int64_t entry) {
  const int64_t named = p.listed[entry];
  if (p.class_of == nullptr) return named;
  return named >= 0 && named < p.num_rows ? p.class_of[named] : -1;
}

// True in every thread of the block where an earlier entry of the list names the same class.
__device__ __forceinline__ bool repeated(const SegmentMeanParams& p, int64_t entry, int64_t k) {
  bool seen = false;
  for (int64_t i = threadIdx.y * kWarp + threadIdx.x; i < entry; i += kWarp * kWarpsPerBlock)
    seen |= listed_class(p, i) == k;
  return __syncthreads_or(seen) != 0;
}

// Block (x: entry of the list, y: group of slices).
template <bool kAligned, typename T, typename A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    listed_means_kernel(const SegmentMeanParams p, int64_t slices) {
  const int64_t k = listed_class(p, blockIdx.x);
  DHCL_DEVICE_ASSERT(
      p.class_of == nullptr || (p.listed[blockIdx.x] >= 0 && p.listed[blockIdx.x] < p.num_rows),
      "update_segment_mean_: rows must be in [0, %lld) (got %lld)\n",
      static_cast<long long>(p.num_rows), static_cast<long long>(p.listed[blockIdx.x]));
  DHCL_DEVICE_ASSERT(k >= 0 && k < p.num_classes,
                     "update_segment_mean_: classes must be in [0, %lld) (got %lld)\n",
                     static_cast<long long>(p.num_classes), static_cast<long long>(k));
  if (repeated(p, blockIdx.x, k)) return;
  const bool together = is_long(p, k);
  for (int64_t group = static_cast<int64_t>(blockIdx.y) * kWarpsPerBlock; group < slices;
       group += kWarpsPerBlock * gridDim.y) {
    if (!together && group + threadIdx.y < slices)
      short_mean<kAligned, T, A>(p, k, group + threadIdx.y);
    for (int64_t slice = group; together && slice < group + kWarpsPerBlock && slice < slices;
         ++slice)
      long_mean<kAligned, T, A>(p, k, slice);
  }
}

template <bool kAligned, typename T, typename A>
__device__ __forceinline__ void normalize_row(T* row, int64_t d) {
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

// A warp per class.
template <bool kAligned, typename T, typename A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    normalize_all_kernel(const SegmentMeanParams p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (k < p.num_classes) normalize_row<kAligned, T, A>(static_cast<T*>(p.means) + k * p.dim, p.dim);
}

// A block per entry of the list; its first warp normalises the row.
template <bool kAligned, typename T, typename A>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    normalize_listed_kernel(const SegmentMeanParams p) {
  const int64_t k = listed_class(p, blockIdx.x);
  if (repeated(p, blockIdx.x, k) || threadIdx.y != 0) return;
  normalize_row<kAligned, T, A>(static_cast<T*>(p.means) + k * p.dim, p.dim);
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
void all_means(const SegmentMeanParams& p, cudaStream_t stream) {
  const dim3 block(kWarp, kWarpsPerBlock);
  const int64_t slices = ceil_div(p.dim, kSumColumns);
  const auto blocks = [](int64_t warps) {
    return dim3(static_cast<unsigned>(ceil_div(warps, kWarpsPerBlock)));
  };
  DHCL_LAUNCH((all_means_kernel<kAligned, T, A>), blocks(p.num_classes * slices), block, 0, stream,
              p, slices);
  if (p.normalize)
    DHCL_LAUNCH((normalize_all_kernel<kAligned, T, A>), blocks(p.num_classes), block, 0, stream, p);
}

template <bool kAligned, typename T, typename A>
void listed_means(const SegmentMeanParams& p, cudaStream_t stream) {
  const dim3 block(kWarp, kWarpsPerBlock);
  const int64_t slices = ceil_div(p.dim, kSumColumns);
  // Few entries: spread the columns over more blocks. Many: one block each, so that the search for
  // repeats is done once per entry.
  const int64_t spread = p.num_listed >= 4096 ? 1 : ceil_div(slices, kWarpsPerBlock);
  const auto entries = static_cast<unsigned>(p.num_listed);
  DHCL_LAUNCH((listed_means_kernel<kAligned, T, A>), dim3(entries, static_cast<unsigned>(spread)),
              block, 0, stream, p, slices);
  if (p.normalize)
    DHCL_LAUNCH((normalize_listed_kernel<kAligned, T, A>), dim3(entries), block, 0, stream, p);
}

template <bool kAligned, typename T, typename A>
void segment_mean_aligned(const SegmentMeanParams& p, cudaStream_t stream) {
  if (p.listed == nullptr)
    all_means<kAligned, T, A>(p, stream);
  else
    listed_means<kAligned, T, A>(p, stream);
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
  if ((p.listed == nullptr ? p.num_classes : p.num_listed) == 0 || p.dim == 0) return;
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
