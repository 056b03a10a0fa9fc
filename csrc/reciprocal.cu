// CUDA kernels of the k-reciprocal encoding. What the stages promise is in reciprocal.h.
//
// Floats are added by one thread at a time, in the stated order, so the results have the same bits
// every time and those of the reference. All stages are bound by reading neighbour lists and rows
// of the CSR matrices, the similarities also by reading features.
#include "common/csr_device.h"
#include "reciprocal.h"

namespace dhcl {
namespace {

// A near table of kSetCells takes 16 KiB, of which a dozen fit into a multiprocessor's shared
// memory.
constexpr int kSetBlocks = 12;

// ---- reciprocal neighbours

// The last place of an id in a list, -1 if it is not there; for the whole warp.
__device__ __forceinline__ int64_t place_in(const int32_t* list, int64_t width, int32_t id) {
  int64_t place = -1;
  for (int64_t base = 0; base < width; base += kWarp) {
    const int64_t q = base + lane_id();
    const unsigned found = __ballot_sync(kFullWarp, q < width && list[q] == id);
    if (found != 0) place = base + kWarp - 1 - __clz(static_cast<int>(found));
  }
  return place;
}

// A warp per row.
__global__ void __launch_bounds__(kThreads) reciprocal_positions_kernel(const ReciprocalParams p) {
  for (int64_t i = first_warp(); i < p.num_rows; i += warp_step()) {
    for (int64_t at = 0; at < p.width; ++at) {
      const int64_t j = p.ranks[i * p.width + at];
      DHCL_DEVICE_ASSERT(j >= 0 && j < p.num_rows,
                         "reciprocal_positions: ranks must be in [0, %lld) (got %lld in row "
                         "%lld)\n",
                         static_cast<long long>(p.num_rows), static_cast<long long>(j),
                         static_cast<long long>(i));
      const int64_t place = place_in(p.ranks + j * p.width, p.width, static_cast<int32_t>(i));
      if (lane_id() == 0) p.positions[i * p.width + at] = static_cast<int16_t>(place);
    }
  }
}

// A block per row, a warp per mutual neighbour. The number beside a key is 1 for the mutual
// neighbours themselves, 0 for what they bring.
template <Tier kTier>
__global__ void __launch_bounds__(kTier == kNear ? kRowThreads : kManyThreads,
                                  kTier == kNear ? kSetBlocks : 1)
    k_reciprocal_kernel(const KReciprocalParams p) {
  for_each_row<kTier>(p.lines, [&](int64_t r) {
    const int64_t i = p.lines.begin + r;
    const int32_t* list = p.ranks + i * p.width;
    const int16_t* back = p.positions + i * p.width;
    int64_t members = 0;
    for (int64_t base = 0; base < p.k; base += blockDim.x) {
      const int64_t at = base + threadIdx.x;
      members += __syncthreads_count(at < p.k && back[at] >= 0 && back[at] < p.k);
    }
    const auto cells = make_cells<kTier>(p.table, p.num_rows, members * (p.half + 1));
    bool full = false;
    for (int64_t at = threadIdx.x; at < p.k; at += blockDim.x) {
      if (back[at] < 0 || back[at] >= p.k) continue;
      const int64_t cell = cells.insert(list[at]);
      // A list that names an id twice has two threads say so.
      if (cell >= 0)
        *static_cast<volatile unsigned*>(cells.sums + cell) = 1;
      else
        full = true;
    }
    if (__syncthreads_or(full)) return false;
    for (int64_t at = warp_id(); at < p.k; at += blockDim.x / kWarp) {
      if (back[at] < 0 || back[at] >= p.k) continue;
      const int32_t* near = p.ranks + list[at] * p.width;
      const int16_t* near_back = p.positions + list[at] * p.width;
      const auto mutual = [&](int64_t q) {
        return q < p.half && near_back[q] >= 0 && near_back[q] < p.half;
      };
      int size = 0, shared = 0;
      for (int64_t base = 0; base < p.half; base += kWarp) {
        const int64_t q = base + lane_id();
        const bool exists = mutual(q);
        const int64_t cell = exists ? cells.find(near[q]) : -1;
        size += __popc(__ballot_sync(kFullWarp, exists));
        shared += __popc(__ballot_sync(kFullWarp, cell >= 0 && cells.sums[cell] == 1));
      }
      // More than two thirds, as an integer test: equal to the published one in doubles.
      if (3 * shared <= 2 * size) continue;
      for (int64_t q = lane_id(); q < p.half; q += kWarp)
        if (mutual(q) && cells.insert(near[q]) < 0) full = true;
    }
    if (__syncthreads_or(full)) return false;
    write_line(p.lines, r, cells, [](int64_t) { return 0.0f; });
    return true;
  });
}

// ---- weights

// A warp per entry.
template <bool kAligned>
__global__ void __launch_bounds__(kRowThreads) pair_dots_kernel(const PairDotsParams p) {
  const int64_t r = blockIdx.x;
  const int64_t i = p.begin + r;
  for (int64_t e = p.offsets[r] + warp_id(); e < p.offsets[r + 1]; e += kRowThreads / kWarp) {
    const int64_t c = p.columns[e];
    const int64_t place =
        p.similarities == nullptr ? -1 : place_in(p.ranks + i * p.width, p.width, p.columns[e]);
    const float dot =
        place >= 0 ? p.similarities[i * p.width + place]
                   : warp_dot<kAligned, 2>(p.features + i * p.dim, p.features + c * p.dim, p.dim);
    if (lane_id() == 0) p.dots[e] = dot;
  }
}

// A warp per row; the exponentials are computed twice rather than kept.
__global__ void __launch_bounds__(kThreads) softmax_rows_kernel(const SoftmaxParams p) {
  for (int64_t r = first_warp(); r < p.rows; r += warp_step()) {
    const int64_t begin = p.offsets[r], end = p.offsets[r + 1];
    if (begin == end) continue;
    float top = p.logits[begin];
    for (int64_t e = begin + lane_id(); e < end; e += kWarp) top = fmaxf(top, p.logits[e]);
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, offset));
    double sum = 0.0;
    for (int64_t e = begin + lane_id(); e < end; e += kWarp)
      sum += exp(static_cast<double>(p.logits[e]) - top);
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      sum += __shfl_xor_sync(kFullWarp, sum, offset);
    for (int64_t e = begin + lane_id(); e < end; e += kWarp)
      p.weights[e] = static_cast<float>(div_rn(exp(static_cast<double>(p.logits[e]) - top), sum));
  }
}

// ---- query expansion

// A block per row. The columns of one neighbour are distinct, so each sum has one writer until the
// barrier, and neighbours come in order.
template <Tier kTier>
__global__ void __launch_bounds__(kTier == kNear ? kRowThreads : kManyThreads,
                                  kTier == kNear ? kSetBlocks : 1)
    query_expand_kernel(const QueryExpandParams p) {
  for_each_row<kTier>(p.lines, [&](int64_t r) {
    const int32_t* near = p.ranks + (p.lines.begin + r) * p.width;
    int64_t entries = 0;
    for (int64_t q = 0; q < p.k2; ++q) {
      entries += p.offsets[near[q] + 1] - p.offsets[near[q]];
    }
    const auto cells = make_cells<kTier>(p.table, p.num_rows, entries);
    for (int64_t q = 0; q < p.k2; ++q) {
      const int64_t end = p.offsets[near[q] + 1];
      bool full = false;
      for (int64_t e = p.offsets[near[q]] + threadIdx.x; e < end; e += blockDim.x) {
        const int64_t cell = cells.insert(p.columns[e]);
        if (cell < 0) {
          full = true;
          break;
        }
        cells.sums[cell] = __float_as_uint(add_rn(__uint_as_float(cells.sums[cell]), p.values[e]));
      }
      if (__syncthreads_or(full)) return false;
    }
    const float count = static_cast<float>(p.k2);
    write_line(p.lines, r, cells,
               [&](int64_t c) { return div_rn(__uint_as_float(cells.sums[c]), count); });
    return true;
  });
}

}  // namespace

void launch_reciprocal_positions(const ReciprocalParams& p, void* stream) {
  if (p.num_rows == 0 || p.width == 0) return;
  DHCL_LAUNCH(reciprocal_positions_kernel, blocks_for(p.num_rows, kThreads / kWarp), dim3(kThreads),
              0, static_cast<cudaStream_t>(stream), p);
}

void launch_k_reciprocal(const KReciprocalParams& p, void* stream) {
  if (p.lines.rows == 0) return;
  launch_rows<kRowThreads>(k_reciprocal_kernel<kNear>, k_reciprocal_kernel<kLarge>,
                           k_reciprocal_kernel<kWide>, p, static_cast<cudaStream_t>(stream));
}

void launch_pair_dots(const PairDotsParams& p, void* stream) {
  if (p.rows == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(p.rows));
  if (p.dim % 4 == 0 && reinterpret_cast<uintptr_t>(p.features) % (4 * sizeof(float)) == 0)
    DHCL_LAUNCH(pair_dots_kernel<true>, grid, dim3(kRowThreads), 0, s, p);
  else
    DHCL_LAUNCH(pair_dots_kernel<false>, grid, dim3(kRowThreads), 0, s, p);
}

void launch_softmax_rows(const SoftmaxParams& p, void* stream) {
  if (p.rows == 0) return;
  DHCL_LAUNCH(softmax_rows_kernel, blocks_for(p.rows, kThreads / kWarp), dim3(kThreads), 0,
              static_cast<cudaStream_t>(stream), p);
}

void launch_query_expand(const QueryExpandParams& p, void* stream) {
  if (p.lines.rows == 0) return;
  launch_rows<kRowThreads>(query_expand_kernel<kNear>, query_expand_kernel<kLarge>,
                           query_expand_kernel<kWide>, p, static_cast<cudaStream_t>(stream));
}

}  // namespace dhcl
