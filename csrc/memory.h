// The memory bank: parameters and launchers of its kernels.
//
// Two orders of summation are fixed here, so that the PyTorch reference, the C++ code and the CUDA
// kernels give the same bits in fp32, for any number of threads and any vector width:
//
// * The norm of a row. Squares are summed as common/sums.h states.
// * The sum of the rows of a class. Members in ascending row index are summed one after another in
//   runs of 256, and the sums of the runs are added one after another.
#pragma once
#include <cstdint>

namespace dhcl {

constexpr int64_t kRunLength = 256;
// Below this a class mean counts as zero and is left as it is when prototypes are normalised.
constexpr float kMeanEps = 1e-12f;

enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

// bank[i] <- v / max(|v|, eps), v = momentum * bank[i] + one_minus_momentum * f, batch order.
// An occurrence whose norm is zero (with eps = 0) or not finite leaves its row alone and adds 1 to
// *skipped.
struct MomentumParams {
  void* bank;              // [N, d] bank_dtype
  const void* features;    // [B, d] feature_dtype
  const int64_t* indices;  // [B]
  int64_t* skipped;        // [1] or null
  int64_t num_rows;        // N
  int64_t batch;           // B
  int64_t dim;             // d
  float momentum;
  float one_minus_momentum;
  float eps;
  Dtype bank_dtype;
  Dtype feature_dtype;
};

// means[k] <- mean of rows[members[offsets[k] .. offsets[k+1]]], zero for an empty class.
struct SegmentMeanParams {
  void* means;             // [K, d] dtype
  const void* rows;        // [N, d] dtype
  const int64_t* members;  // [N] row ids by class; those past offsets[K] belong to no class
  const int64_t* offsets;  // [K + 1]
  // Which classes to refresh: all K where the list is null.
  const int64_t* listed;    // [L] classes, or rows of these classes where class_of is given
  const int64_t* class_of;  // [N] the class of every row, or null
  int64_t num_listed;       // L; repeats are allowed
  int64_t num_rows;         // N
  int64_t num_classes;      // K
  int64_t dim;              // d
  bool normalize;           // divide each refreshed mean by its norm
  Dtype dtype;
};

// grad_rows[members[j]] <- grad[k] / n_k for each member of class k, zero for rows of no class.
struct SegmentMeanBackwardParams {
  void* grad_rows;         // [N, d] dtype
  const void* grad;        // [K, d] dtype
  const int64_t* members;  // [N]
  const int64_t* offsets;  // [K + 1]
  int64_t num_rows;        // N
  int64_t num_classes;     // K
  int64_t dim;             // d
  Dtype dtype;
};

// The stream is a cudaStream_t; no launcher synchronises with the host.
void launch_momentum_update(const MomentumParams& p, void* stream);
void launch_segment_mean(const SegmentMeanParams& p, void* stream);
void launch_segment_mean_backward(const SegmentMeanBackwardParams& p, void* stream);

}  // namespace dhcl
