// CUDA kernels of the contrastive loss.
//
// The products come from a library's GEMM and the read-out goes to one. What is left reads a chunk
// of products twice, the second time mostly from L2, and writes it once as weights: 4 + 4 + 4 + 2
// bytes per product against the GEMMs' 4 d operations. One block owns one row of the chunk. Each
// thread sums its own columns and a tree adds the threads, so no result depends on scheduling.
#include "common/device.h"
#include "contrastive.h"

namespace dhcl {
namespace {

constexpr int kThreads = 512;

template <typename T>
__device__ __forceinline__ T none() {
  return static_cast<T>(-HUGE_VAL);
}
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// Adds one number per thread; every thread gets the sum.
template <typename T>
__device__ T block_sum(T value, T* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const T sum = shared[0];
  __syncthreads();
  return sum;
}

// The largest value and the smallest index that has it; -1 with -inf.
template <typename T>
__device__ void block_max(T& value, int64_t& index, T* values, int64_t* indices) {
  values[threadIdx.x] = value;
  indices[threadIdx.x] = index;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      const T other = values[threadIdx.x + half];
      const int64_t at = indices[threadIdx.x + half];
      if (other > values[threadIdx.x] ||
          (other == values[threadIdx.x] && at < indices[threadIdx.x])) {
        values[threadIdx.x] = other;
        indices[threadIdx.x] = at;
      }
    }
    __syncthreads();
  }
  value = values[0];
  index = indices[0];
  __syncthreads();
}

__device__ __forceinline__ bool is_positive(const ContrastiveRoles& roles, int64_t label,
                                            int64_t column) {
  return roles.proxy_labels != nullptr ? roles.proxy_labels[column] == label : column == label;
}

// Writes -inf over a row's listed columns, which no other thread reads before the barrier.
template <typename T>
__device__ void exclude_listed(const ContrastiveRoles& roles, int64_t row, int64_t label,
                               int64_t start, int64_t n, T* x) {
  for (int64_t e = threadIdx.x; e < roles.num_excluded; e += kThreads) {
    const int64_t column = roles.excluded[row * roles.num_excluded + e];
    if (column >= start && column < start + n && !is_positive(roles, label, column))
      // A column that is listed twice has two writers.
      *static_cast<volatile T*>(x + (column - start)) = none<T>();
  }
  __syncthreads();
}

__device__ __forceinline__ int64_t pitch_of(const ContrastiveStreamParams& p) {
  return p.pitch == 0 ? p.num_cols : p.pitch;
}

// What turns a row's products into logits.
template <typename T>
struct Scale {
  T row;
  const float* columns;
  __device__ __forceinline__ Scale(const ContrastiveStreamParams& p, int64_t i)
      : row(static_cast<T>(p.scale)), columns(p.column_units) {
    if (columns != nullptr) row *= static_cast<T>(p.row_units[i]);
  }
  __device__ __forceinline__ T operator[](int64_t j) const {
    return columns == nullptr ? row : row * static_cast<T>(columns[j]);
  }
};

constexpr int kListedThreads = 128;

// A block for each row. Of lists of columns each thread takes every 128th entry, of lists of
// classes each warp every fourth, whose members go to its lanes. No column occurs twice in a list.
template <typename T>
__global__ void __launch_bounds__(kListedThreads)
    contrastive_weigh_kernel(const ContrastiveWeighParams p) {
  const ContrastiveListed& listed = p.listed;
  const int64_t row = blockIdx.x;
  const int64_t list = listed.rows[row];
  DHCL_DEVICE_ASSERT(list >= 0 && list < listed.num_lists,
                     "contrastive_weigh_: rows must be in [0, %lld) (got %lld)\n",
                     static_cast<long long>(listed.num_lists), static_cast<long long>(list));
  T* x = static_cast<T*>(p.products) + row * p.num_cols;
  const int64_t label = p.roles.labels[row];
  const auto add = [&](int64_t column, float log_weight) {
    const int64_t j = column - p.start;
    if (j < 0 || j >= p.num_cols || is_positive(p.roles, label, column)) return;
    x[j] += contrastive_shift<T>(p, row, j, log_weight);
  };
  const int64_t end = listed.offsets[list + 1];
  if (listed.members == nullptr) {
    for (int64_t e = listed.offsets[list] + threadIdx.x; e < end; e += kListedThreads)
      add(listed.entries[e], listed.logs[e]);
    return;
  }
  for (int64_t e = listed.offsets[list] + warp_id(); e < end; e += kListedThreads / kWarp) {
    const int64_t k = listed.entries[e];
    for (int64_t m = listed.member_offsets[k] + lane_id(); m < listed.member_offsets[k + 1];
         m += kWarp)
      add(listed.members[m], listed.logs[e]);
  }
}

// A row's positives in ascending order of columns, found by one warp.
template <typename T>
__device__ void list_positives(const ContrastiveStreamParams& p, int64_t row, int64_t label,
                               const T* x) {
  const Scale<T> scale(p, row);
  if (threadIdx.x >= kWarp) return;
  const int lane = threadIdx.x;
  int64_t filled = p.counts[row * kCountColumns + kPositives];
  for (int64_t base = 0; base < p.num_cols; base += kWarp) {
    const int64_t j = base + lane;
    const bool found = j < p.num_cols && is_positive(p.roles, label, p.start + j);
    const unsigned ballot = __ballot_sync(kFullWarp, found);
    const int64_t slot = filled + __popc(ballot & ((1u << lane) - 1));
    DHCL_DEVICE_ASSERT(!found || slot < p.num_slots,
                       "contrastive: a row has more positives than %lld\n",
                       static_cast<long long>(p.num_slots));
    if (found) p.positives[row * p.num_slots + slot] = static_cast<double>(x[j] * scale[j]);
    filled += __popc(ballot);
  }
}

// What one thread saw of a row: its negatives' largest, and its positives' log-sum-exp.
template <typename T>
struct Seen {
  T top = none<T>();
  int64_t where = INT64_MAX;
  int64_t negatives = 0;
  int64_t positives = 0;
  double positive_max = none<double>();
  double positive_mass = 0.0;

  __device__ __forceinline__ void add_positive(double r) {
    ++positives;
    if (r > positive_max) {
      positive_mass = positive_mass * exp(positive_max - r) + 1.0;
      positive_max = r;
    } else {
      positive_mass += exp(r - positive_max);
    }
  }

  __device__ __forceinline__ void add_negative(T s, int64_t column) {
    if (!(s == none<T>())) ++negatives;
    if (s > top) {
      top = s;
      where = column;
    }
  }
};

// The first pass: similarities become logits, and what is no negative becomes -inf.
template <typename T>
__device__ __forceinline__ Seen<T> scan_roles(const ContrastiveStreamParams& p, int64_t row,
                                              int64_t label, T* x) {
  const bool grouped = p.roles.row_groups != nullptr && p.roles.row_groups[row] >= 0;
  const int64_t group = grouped ? p.roles.row_groups[row] : 0;
  const Scale<T> scale(p, row);
  Seen<T> seen;
  for (int64_t j = threadIdx.x; j < p.num_cols; j += kThreads) {
    const int64_t column = p.start + j;
    T s = x[j] * scale[j];
    if (is_positive(p.roles, label, column)) {
      seen.add_positive(static_cast<double>(s));
      s = none<T>();
    } else if (grouped && p.roles.column_groups[column] == group) {
      s = none<T>();
    }
    x[j] = s;
    seen.add_negative(s, column);
  }
  return seen;
}

// Adds the chunk's positives to the row's log-sum-exp over them. Every thread of the block takes
// part.
template <typename T>
__device__ __forceinline__ void add_positives(const Seen<T>& seen, double* state, double* doubles,
                                              int64_t* indices) {
  int64_t unused = 0;
  double largest = seen.positive_max;
  block_max(largest, unused, doubles, indices);
  const double before = state[kPositiveMax];
  const double shift = before > largest ? before : largest;
  // A NaN logit leaves its thread's maximum at -inf and its sum NaN.
  double mass =
      seen.positive_mass == 0.0 ? 0.0 : seen.positive_mass * exp(seen.positive_max - shift);
  if (seen.positive_mass != seen.positive_mass) mass = seen.positive_mass;
  mass = block_sum(mass, doubles);
  if (threadIdx.x == 0) {
    if (before > none<double>()) mass += state[kPositiveMass] * exp(before - shift);
    state[kPositiveMass] = mass;
    state[kPositiveMax] = shift;
  }
}

// The largest unit of the chunk's proxies, for every thread.
template <typename T>
__device__ __forceinline__ T largest_unit(const ContrastiveStreamParams& p, T* values,
                                          int64_t* indices) {
  T largest = 0;
  for (int64_t j = threadIdx.x; j < p.num_cols; j += kThreads) {
    const T unit = static_cast<T>(p.column_units[j]);
    largest = unit > largest ? unit : largest;
  }
  int64_t unused = 0;
  block_max(largest, unused, values, indices);
  return largest;
}

// A chunk's sums over a row's negatives, relative to the row's largest logit so far.
struct NegativeSums {
  double mass, norm, squares;
};

// The second pass: the negatives' sums, and their gradient weights. Every thread gets the sums.
template <typename T, typename W>
__device__ __forceinline__ NegativeSums weigh_negatives(const ContrastiveStreamParams& p,
                                                        int64_t row, const T* x, double shift,
                                                        T unit, double* doubles) {
  const int64_t n = p.num_cols;
  const T base = static_cast<T>(shift);
  const T sharp = static_cast<T>(1.0 + p.beta);
  const T beta = static_cast<T>(p.beta);
  W* weights = p.weights == nullptr ? nullptr : static_cast<W*>(p.weights) + row * pitch_of(p);
  W* low = p.low_weights == nullptr ? nullptr : static_cast<W*>(p.low_weights) + row * pitch_of(p);
  const T weight_scale = static_cast<T>(p.weight_scale);
  const T inverse = T{1} / unit;
  T mass = 0;
  T norm = 0;
  T squares = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) {
    const T distance = x[j] - base;
    const T e = exp_of(sharp * distance);
    mass += e;
    squares += e * e;
    if (p.beta > 0.0) norm += exp_of(beta * distance);
    if (weights == nullptr) continue;
    T weight = e * weight_scale;
    if (low != nullptr) weight *= static_cast<T>(p.column_units[j]) * inverse;
    weights[j] = from_accumulator<W>(weight);
    if (low != nullptr) low[j] = from_accumulator<W>(weight - static_cast<T>(to_float(weights[j])));
  }
  for (int64_t j = n + threadIdx.x; j < pitch_of(p) && weights != nullptr; j += kThreads) {
    weights[j] = from_accumulator<W>(T{0});
    if (low != nullptr) low[j] = from_accumulator<W>(T{0});
  }
  NegativeSums sums;
  sums.mass = block_sum(static_cast<double>(mass), doubles);
  sums.norm = block_sum(static_cast<double>(norm), doubles);
  sums.squares = block_sum(static_cast<double>(squares), doubles);
  return sums;
}

template <typename T, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    contrastive_stream_kernel(ContrastiveStreamParams p) {
  __shared__ T values[kThreads];
  __shared__ int64_t indices[kThreads];
  __shared__ double doubles[kThreads];
  const int64_t row = blockIdx.x;
  T* x = static_cast<T*>(p.products) + row * pitch_of(p);
  double* state = p.state + row * kStateColumns;
  int64_t* counts = p.counts + row * kCountColumns;
  const int64_t label = p.roles.labels[row];
  if (p.fresh && threadIdx.x == 0) {
    // Read by other threads only after the barriers below.
    for (int c = 0; c < kStateColumns; ++c) state[c] = 0.0;
    state[kMax] = state[kPositiveMax] = none<double>();
    counts[kNegatives] = counts[kPositives] = 0;
    counts[kHardest] = -1;
  }
  exclude_listed(p.roles, row, label, p.start, p.num_cols, x);
  if (p.positives != nullptr) {
    list_positives(p, row, label, x);
    __syncthreads();
  }

  Seen<T> seen = scan_roles(p, row, label, x);
  block_max(seen.top, seen.where, values, indices);
  const int64_t positives = block_sum(seen.positives, indices);
  const int64_t negatives = block_sum(seen.negatives, indices);
  if (positives > 0) add_positives(seen, state, doubles, indices);

  const double before = state[kMax];
  const double top = static_cast<double>(seen.top);
  const double largest = top > before ? top : before;
  const double shift = largest > none<double>() ? largest : 0.0;
  const T unit = p.low_weights == nullptr ? T{1} : largest_unit(p, values, indices);
  const NegativeSums sums = weigh_negatives<T, W>(p, row, x, shift, unit, doubles);
  if (threadIdx.x != 0) return;
  if (p.low_weights != nullptr) p.largest_units[row] = static_cast<float>(unit);
  const double factor = exp((1.0 + p.beta) * (before - shift));
  counts[kPositives] += positives;
  counts[kNegatives] += negatives;
  if (top > before) counts[kHardest] = seen.where;
  state[kMax] = largest;
  state[kMass] = state[kMass] * factor + sums.mass;
  state[kSquares] = state[kSquares] * factor * factor + sums.squares;
  if (p.beta > 0.0)
    state[kNorm] = state[kNorm] * exp(p.beta * (before - shift)) + sums.norm;
  else
    state[kNorm] = static_cast<double>(counts[kNegatives]);
  if (p.factors != nullptr) static_cast<T*>(p.factors)[row] = static_cast<T>(factor);
}

__global__ void contrastive_finish_kernel(ContrastiveFinishParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= p.num_rows) return;
  const int64_t* counts = p.counts + row * kCountColumns;
  DHCL_DEVICE_ASSERT(counts[kPositives] > 0,
                     "contrastive: every row needs a positive proxy (got none for batch position "
                     "%lld: is its label in range?)\n",
                     static_cast<long long>(row));
  DHCL_DEVICE_ASSERT(
      p.prior || counts[kNegatives] == 0 || p.kappa[row] < static_cast<double>(counts[kNegatives]),
      "contrastive: kappa must be smaller than the number of negatives (got %g and %lld at batch "
      "position %lld)\n",
      p.kappa[row], static_cast<long long>(counts[kNegatives]), static_cast<long long>(row));
  contrastive_finish_row(p, row);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    contrastive_slopes_kernel(ContrastiveSlopesParams p) {
  const int64_t row = blockIdx.x;
  const int64_t n = p.num_cols;
  T* x = static_cast<T*>(p.products) + row * n;
  const double* constants = p.rows + row * kRowColumns;
  const int64_t* counts = p.counts + row * kCountColumns;
  const int64_t label = p.roles.labels[row];
  const bool grouped = p.roles.row_groups != nullptr && p.roles.row_groups[row] >= 0;
  const int64_t group = grouped ? p.roles.row_groups[row] : 0;
  const bool some = counts[kNegatives] > 0;
  const double upstream = p.grad[row];
  const T scale = static_cast<T>(p.scale);
  const T base = some ? static_cast<T>(p.state[row * kStateColumns + kMax]) : T{0};
  const T sharp = static_cast<T>(1.0 + p.beta);
  const T beta = static_cast<T>(p.beta);
  const T alpha = static_cast<T>(constants[kAlpha] * upstream);
  const T gamma = static_cast<T>(constants[kGamma] * upstream);
  exclude_listed(p.roles, row, label, p.start, n, x);
  for (int64_t j = threadIdx.x; j < n; j += kThreads) {
    const int64_t column = p.start + j;
    const T s = x[j] * scale;
    T slope = 0;
    if (!some) {
    } else if (is_positive(p.roles, label, column)) {
      const double pull =
          contrastive_pull(static_cast<double>(s), constants, counts[kPositives], p.aggregation);
      slope = static_cast<T>(-pull * upstream);
    } else if (!(grouped && p.roles.column_groups[column] == group)) {
      slope = alpha * exp_of(sharp * (s - base));
      if (gamma != T{0}) slope += gamma * exp_of(beta * (s - base));
    }
    x[j] = slope;
  }
}

constexpr int kSplitThreads = 128;

// A block for each row, read twice, the second time from the cache near it: 4 d bytes against the
// 2 t d written.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kSplitThreads)
    contrastive_split_kernel(ContrastiveSplitParams p) {
  __shared__ float tops[kSplitThreads / kWarp];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.rows) + row * p.dim;
  __half* out = static_cast<__half*>(p.operand) + row * p.terms * p.dim;
  float top = 0.0f;
  for (int64_t col = 4 * threadIdx.x; col < p.dim; col += 4 * kSplitThreads) {
    T quad[4];
    load4<kAligned>(x, col, p.dim, quad);
#pragma unroll
    for (int c = 0; c < 4; ++c) top = fmaxf(top, fabsf(to_float(quad[c])));
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, offset));
  if (lane_id() == 0) tops[warp_id()] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kSplitThreads / kWarp; ++w) top = fmaxf(top, tops[w]);
  // The number's own bits say its exponent, which is kept to what fp32 has reciprocals of.
  const int exponent = min(max((__float_as_int(top) >> 23) - 126, -100), 128) - 14;
  const float scale = __int_as_float((127 - exponent) << 23);
  for (int64_t col = 4 * threadIdx.x; col < p.dim; col += 4 * kSplitThreads) {
    T quad[4];
    __half high[4], low[4];
    load4<kAligned>(x, col, p.dim, quad);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float scaled = to_float(quad[c]) * scale;
      high[c] = __float2half_rn(scaled);
      low[c] = __float2half_rn(scaled - __half2float(high[c]));
    }
    for (int t = 0; t < p.terms; ++t) {
      if (p.low_terms >> t & 1u)
        store4<kAligned>(out + t * p.dim, col, p.dim, low);
      else
        store4<kAligned>(out + t * p.dim, col, p.dim, high);
    }
  }
  if (threadIdx.x == 0) p.units[row] = __int_as_float((127 + exponent) << 23);
}

template <typename T>
void split_as(const ContrastiveSplitParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.num_rows));
  if (p.dim % 4 == 0)
    DHCL_LAUNCH((contrastive_split_kernel<T, true>), grid, dim3(kSplitThreads), 0, stream, p);
  else
    DHCL_LAUNCH((contrastive_split_kernel<T, false>), grid, dim3(kSplitThreads), 0, stream, p);
}

__global__ void contrastive_fold_pieces_kernel(ContrastiveFoldPiecesParams p) {
  const int64_t row = blockIdx.x;
  float* sums = p.sums + row * p.dim;
  const float* part = p.part + row * p.pieces * p.dim;
  const float* low_part = p.low_part + row * p.dim;
  const float factor = p.factors[row];
  const float unit = p.units[row];
  for (int64_t j = threadIdx.x; j < p.dim; j += kThreads) {
    float sum = part[j];
    if (p.pieces == 2) sum += part[p.dim + j];
    sum = (sum + low_part[j]) * unit;
    if (!p.fresh) sum += sums[j] * factor;
    sums[j] = sum;
  }
}

template <typename T>
__global__ void contrastive_fold_kernel(ContrastiveFoldParams p) {
  const int64_t row = blockIdx.x;
  T* sums = static_cast<T*>(p.sums) + row * p.dim;
  const T* part = p.part == nullptr ? nullptr : static_cast<const T*>(p.part) + row * p.dim;
  const T factor = static_cast<const T*>(p.factors)[row];
  for (int64_t j = threadIdx.x; j < p.dim; j += kThreads) {
    const T sum = sums[j] * factor;
    sums[j] = part == nullptr ? sum : part[j] + sum;
  }
}

template <typename T, typename P>
__global__ void contrastive_gradient_kernel(ContrastiveGradientParams p) {
  const int64_t row = blockIdx.x;
  const int64_t label = p.labels == nullptr ? row : p.labels[row];
  DHCL_DEVICE_ASSERT(label >= 0 && label < p.num_proxies,
                     "contrastive: labels must be in [0, %lld) (got %lld)\n",
                     static_cast<long long>(p.num_proxies), static_cast<long long>(label));
  T* gradient = static_cast<T*>(p.gradient) + row * p.dim;
  const P* proxy = static_cast<const P*>(p.proxies) + label * p.dim;
  const double* constants = p.rows + row * kRowColumns;
  const T alpha = static_cast<T>(constants[kAlpha] / p.unit);
  const T pull = static_cast<T>(constants[kSlope] / -p.temperature);
  for (int64_t j = threadIdx.x; j < p.dim; j += kThreads)
    gradient[j] = gradient[j] * alpha + static_cast<T>(to_float(proxy[j])) * pull;
}

template <typename T, typename P>
void gradient_as(const ContrastiveGradientParams& p, cudaStream_t stream) {
  DHCL_LAUNCH((contrastive_gradient_kernel<T, P>), dim3(static_cast<unsigned>(p.num_rows)),
              dim3(kThreads), 0, stream, p);
}

template <typename T>
void gradient_for(const ContrastiveGradientParams& p, cudaStream_t stream) {
  switch (p.proxy_dtype) {
    case ContrastiveDtype::kFloat16:
      return gradient_as<T, __half>(p, stream);
    case ContrastiveDtype::kBFloat16:
      return gradient_as<T, __nv_bfloat16>(p, stream);
    case ContrastiveDtype::kFloat64:
      return gradient_as<T, double>(p, stream);
    default:
      return gradient_as<T, float>(p, stream);
  }
}

template <typename T, typename W>
void stream_as(const ContrastiveStreamParams& p, cudaStream_t stream) {
  DHCL_LAUNCH((contrastive_stream_kernel<T, W>), dim3(static_cast<unsigned>(p.num_rows)),
              dim3(kThreads), 0, stream, p);
}

}  // namespace

void launch_contrastive_stream(const ContrastiveStreamParams& p, void* stream) {
  if (p.num_rows == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.dtype == ContrastiveDtype::kFloat64) return stream_as<double, double>(p, s);
  if (p.weights == nullptr) return stream_as<float, float>(p, s);
  switch (p.weight_dtype) {
    case ContrastiveDtype::kFloat16:
      return stream_as<float, __half>(p, s);
    case ContrastiveDtype::kBFloat16:
      return stream_as<float, __nv_bfloat16>(p, s);
    default:
      return stream_as<float, float>(p, s);
  }
}

void launch_contrastive_split(const ContrastiveSplitParams& p, void* stream) {
  if (p.num_rows == 0 || p.dim == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case ContrastiveDtype::kFloat16:
      return split_as<__half>(p, s);
    case ContrastiveDtype::kBFloat16:
      return split_as<__nv_bfloat16>(p, s);
    default:
      return split_as<float>(p, s);
  }
}

void launch_contrastive_weigh(const ContrastiveWeighParams& p, void* stream) {
  if (p.num_rows == 0 || p.num_cols == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(p.num_rows));
  if (p.dtype == ContrastiveDtype::kFloat64)
    DHCL_LAUNCH(contrastive_weigh_kernel<double>, grid, dim3(kListedThreads), 0, s, p);
  else
    DHCL_LAUNCH(contrastive_weigh_kernel<float>, grid, dim3(kListedThreads), 0, s, p);
}

void launch_contrastive_fold_pieces(const ContrastiveFoldPiecesParams& p, void* stream) {
  if (p.num_rows == 0 || p.dim == 0) return;
  DHCL_LAUNCH(contrastive_fold_pieces_kernel, dim3(static_cast<unsigned>(p.num_rows)),
              dim3(kThreads), 0, static_cast<cudaStream_t>(stream), p);
}

void launch_contrastive_fold(const ContrastiveFoldParams& p, void* stream) {
  if (p.num_rows == 0 || p.dim == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(p.num_rows));
  if (p.dtype == ContrastiveDtype::kFloat64)
    DHCL_LAUNCH(contrastive_fold_kernel<double>, grid, dim3(kThreads), 0, s, p);
  else
    DHCL_LAUNCH(contrastive_fold_kernel<float>, grid, dim3(kThreads), 0, s, p);
}

void launch_contrastive_gradient(const ContrastiveGradientParams& p, void* stream) {
  if (p.num_rows == 0 || p.dim == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.dtype == ContrastiveDtype::kFloat64) return gradient_for<double>(p, s);
  gradient_for<float>(p, s);
}

void launch_contrastive_finish(const ContrastiveFinishParams& p, void* stream) {
  if (p.num_rows == 0) return;
  constexpr int kRows = 64;
  DHCL_LAUNCH(contrastive_finish_kernel, dim3(static_cast<unsigned>(ceil_div(p.num_rows, kRows))),
              dim3(kRows), 0, static_cast<cudaStream_t>(stream), p);
}

void launch_contrastive_slopes(const ContrastiveSlopesParams& p, void* stream) {
  if (p.num_rows == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(p.num_rows));
  if (p.dtype == ContrastiveDtype::kFloat64)
    DHCL_LAUNCH(contrastive_slopes_kernel<double>, grid, dim3(kThreads), 0, s, p);
  else
    DHCL_LAUNCH(contrastive_slopes_kernel<float>, grid, dim3(kThreads), 0, s, p);
}

}  // namespace dhcl
