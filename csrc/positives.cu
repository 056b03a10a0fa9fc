// CUDA kernel of hard positives. What is chosen is in positives.h.
//
// It reads each row of the features' classes once, 4 d bytes in fp32, and is bound by that. A block
// has a feature, and each of its warps every eighth member of the class, one inner product at a
// time; the feature comes from the cache near the block after its first reading.
#include "common/device.h"
#include "positives.h"

namespace dhcl {
namespace {

constexpr int kWarpsPerBlock = 8;

template <bool kAligned, typename T>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    hardest_positive_kernel(const HardestPositiveParams p) {
  __shared__ float similarities[kWarpsPerBlock];
  __shared__ int64_t places[kWarpsPerBlock];
  const int64_t own = p.indices[blockIdx.x];
  DHCL_DEVICE_ASSERT(own >= 0 && own < p.num_rows,
                     "hardest_positive: indices must be in [0, %lld) (got %lld)\n",
                     static_cast<long long>(p.num_rows), static_cast<long long>(own));
  const int64_t k = p.class_of[own];
  DHCL_DEVICE_ASSERT(k >= 0 && k < p.num_classes,
                     "hardest_positive: class_of must be in [0, %lld) (got %lld)\n",
                     static_cast<long long>(p.num_classes), static_cast<long long>(k));
  const int64_t b = blockIdx.x;
  const int64_t end = p.offsets[k + 1];
  const float* feature = p.features + b * p.dim;
  const T* bank = static_cast<const T*>(p.bank);
  float least = HUGE_VALF;
  int64_t place = end;
  for (int64_t j = p.offsets[k] + warp_id(); j < end; j += kWarpsPerBlock) {
    const int64_t member = p.members[j];
    if (p.cameras != nullptr && p.cameras[member] == p.cameras[own]) continue;
    const float similarity = warp_dot<kAligned, 4>(feature, bank + member * p.dim, p.dim);
    if (similarity < least) {
      least = similarity;
      place = j;
    }
  }
  if (lane_id() == 0) {
    similarities[warp_id()] = least;
    places[warp_id()] = place;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarpsPerBlock; ++w) {
    if (similarities[w] < least || (similarities[w] == least && places[w] < place)) {
      least = similarities[w];
      place = places[w];
    }
  }
  p.rows[b] = place < end ? p.members[place] : own;
}

template <typename T>
void hardest_positive(const HardestPositiveParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.batch)), block(kWarp * kWarpsPerBlock);
  const bool aligned = p.dim % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(p.bank) % (4 * sizeof(T)) == 0 &&
                       reinterpret_cast<uintptr_t>(p.features) % (4 * sizeof(float)) == 0;
  if (aligned)
    DHCL_LAUNCH((hardest_positive_kernel<true, T>), grid, block, 0, stream, p);
  else
    DHCL_LAUNCH((hardest_positive_kernel<false, T>), grid, block, 0, stream, p);
}

}  // namespace

void launch_hardest_positive(const HardestPositiveParams& p, void* stream) {
  if (p.batch == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case BankDtype::kFloat16:
      return hardest_positive<__half>(p, s);
    case BankDtype::kBFloat16:
      return hardest_positive<__nv_bfloat16>(p, s);
    default:
      return hardest_positive<float>(p, s);
  }
}

}  // namespace dhcl
