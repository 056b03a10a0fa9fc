// Hard positives: of the bank rows of a feature's class, the one that is least similar to it.
//
// Similarities are fp32 inner products, summed as common/sums.h states, so that reference, C++ code
// and CUDA kernel choose the same row. Of equal similarities the member that comes first wins; one
// that is NaN or infinite is never the least.
#pragma once
#include <cstdint>

namespace dhcl {

enum class BankDtype : int32_t { kFloat32, kFloat16, kBFloat16 };

struct HardestPositiveParams {
  int64_t* rows;            // [B] <- bank row of the positive; the feature's own where none is left
  const float* features;    // [B, d]
  const void* bank;         // [N, d] dtype
  const int64_t* indices;   // [B] bank row of each feature
  const int64_t* class_of;  // [N]
  const int64_t* members;   // [N] bank rows by class, ascending in each
  const int64_t* offsets;   // [K + 1]
  const int64_t* cameras;   // [N] or null: only rows of another camera than the own row's count
  int64_t batch;            // B
  int64_t num_rows;         // N
  int64_t num_classes;      // K
  int64_t dim;              // d
  BankDtype dtype;
};

// The stream is a cudaStream_t; the launcher does not synchronise with the host.
void launch_hardest_positive(const HardestPositiveParams& p, void* stream);

}  // namespace dhcl
