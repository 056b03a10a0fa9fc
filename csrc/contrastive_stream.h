// What the loop over the proxies holds, in torch's tensors: formats, operands and the read-out.
// Only contrastive.cpp includes this.
#pragma once
#include <algorithm>
#include <optional>

#include "common/torch_glue.h"
#include "contrastive.h"
#include "contrastive_cpu.h"

namespace dhcl {
namespace {

using MaybeTensor = std::optional<Tensor>;

ContrastiveDtype dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return ContrastiveDtype::kFloat32;
    case ScalarType::Double:
      return ContrastiveDtype::kFloat64;
    case ScalarType::Half:
      return ContrastiveDtype::kFloat16;
    case ScalarType::BFloat16:
      return ContrastiveDtype::kBFloat16;
    default:
      check(false, op, ": ", name, " must be a floating-point tensor");
      return ContrastiveDtype::kFloat32;
  }
}

// As in dhcl_ops/_contrastive_stream.py, which is the same in PyTorch: bytes of the buffers for one
// chunk, the fewest and most proxies in it, and powers of two that keep operands and weights out of
// fp16's subnormal numbers.
template <typename Device>
constexpr int64_t kWorkspace = Device::kCuda ? 256 << 20 : 24 << 20;
template <typename Device>
constexpr int64_t kFewest = Device::kCuda ? 4096 : 256;
template <typename Device>
constexpr int64_t kMost = Device::kCuda ? 1 << 20 : 4096;
constexpr double kOperandScale = 256.0;
constexpr double kWeightScale = 32768.0;

// A temperature that puts the floor of the debiased estimate at -inf.
constexpr double kNoFloor = 5e-324;

// What a chunk's products are weighed with, from what they will be streamed with.
inline ContrastiveWeighParams weighing(const ContrastiveStreamParams& p,
                                       const ContrastiveListed& listed) {
  ContrastiveWeighParams w{};
  w.products = p.products;
  w.roles = p.roles;
  w.listed = listed;
  w.row_units = p.row_units;
  w.column_units = p.column_units;
  w.num_rows = p.num_rows;
  w.num_cols = p.num_cols;
  w.start = p.start;
  w.scale = p.scale;
  w.dtype = p.dtype;
  return w;
}

int64_t size_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// As in dhcl_ops/_products.py: fewest rows, and multiplications in all, from which fp32 products
// are made of fp16 pieces on CUDA.
constexpr int64_t kSplitRows = 128;
constexpr int64_t kSplitWork = int64_t{1} << 30;

// In which formats a loss is computed: products and sums are fp32, or fp64 where an operand is; on
// CUDA 16-bit operands are multiplied as they are, and fp32 ones as fp16 if speed is asked for.
struct Formats {
  ScalarType sums = ScalarType::Float;
  ScalarType operands = ScalarType::Float;
  double scale = 1.0;         // of both operands
  double weight_scale = 1.0;  // of the gradient weights
  bool split = false;         // fp32 products are made of fp16 pieces
};

template <typename Device>
Formats formats_of(const Tensor& features, const Tensor& proxies, bool fast) {
  const ScalarType left = features.scalar_type();
  const ScalarType right = proxies.scalar_type();
  Formats formats;
  if (left == ScalarType::Double || right == ScalarType::Double) {
    formats.sums = formats.operands = ScalarType::Double;
  } else if (Device::kCuda && left == right && left != ScalarType::Float) {
    formats.operands = left;
  } else if (Device::kCuda && fast) {
    formats.operands = ScalarType::Half;
    formats.scale = kOperandScale;
  }
  const int64_t rows = features.size(0);
  formats.split = Device::kCuda && formats.operands == ScalarType::Float && rows >= kSplitRows &&
                  rows * proxies.size(0) * proxies.size(1) >= kSplitWork;
  if (formats.operands == ScalarType::Half || formats.split) formats.weight_scale = kWeightScale;
  return formats;
}

// A buffer of rows x columns elements, of which a chunk with fewer columns takes the beginning.
class ChunkBuffer {
 public:
  ChunkBuffer(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype)
      : rows_(rows), flat_(torch::stable::new_empty(like, {rows * columns}, dtype)) {}
  Tensor first(int64_t columns) const {
    return torch::stable::view(rows_of(flat_, 0, rows_ * columns), {rows_, columns});
  }

 private:
  int64_t rows_;
  Tensor flat_;
};

// Proxies in a chunk: as asked, or as many as the workspace has room for.
template <typename Device>
int64_t columns_in_chunk(int64_t asked, int64_t per_column, int64_t num_proxies) {
  int64_t columns = asked;
  if (columns <= 0) {
    columns = kWorkspace<Device> / std::max<int64_t>(per_column, 1);
    columns = std::min(std::max(columns, kFewest<Device>), kMost<Device>);
    columns -= columns % 16;
  }
  return std::max<int64_t>(std::min(columns, num_proxies), 1);
}

// The factors of the products: features once, proxies chunk by chunk, in the operands' format.
template <typename Device>
class Operands {
 public:
  Operands(const Tensor& features, const Tensor& proxies, const Formats& formats, int64_t columns,
           bool weighted)
      : formats_(formats),
        proxies_(proxies),
        left_(left_of(features, formats)),
        converts_(proxies.scalar_type() != formats.operands || formats.scale != 1.0) {
    const int64_t rows = features.size(0);
    const int64_t narrow = size_of(formats.operands);
    int64_t per_column = rows * size_of(formats.sums);
    if (weighted) per_column += rows * narrow;
    if (converts_) per_column += features.size(1) * narrow;
    columns_ = columns_in_chunk<Device>(columns, per_column, proxies.size(0));
    if (converts_)
      converted_ = torch::stable::new_empty(proxies, {columns_, proxies.size(1)}, formats.operands);
  }
  const Tensor& left() const { return left_; }
  int64_t columns() const { return columns_; }
  Tensor chunk(int64_t start, int64_t count) const {
    const Tensor part = rows_of(proxies_, start, count);
    if (!converts_) return part;
    Tensor converted = rows_of(*converted_, 0, count);
    if (formats_.scale != 1.0)
      multiply_by(part, formats_.scale, converted);
    else
      torch::stable::copy_(converted, part);
    return converted;
  }

 private:
  static Tensor left_of(const Tensor& features, const Formats& formats) {
    if (formats.scale == 1.0)
      return torch::stable::contiguous(torch::stable::to(features, formats.operands));
    const Tensor left =
        torch::stable::new_empty(features, {features.size(0), features.size(1)}, formats.operands);
    multiply_by(torch::stable::to(features, ScalarType::Float), formats.scale, left);
    return left;
  }
  Formats formats_;
  Tensor proxies_, left_;
  bool converts_;
  int64_t columns_ = 0;
  MaybeTensor converted_;
};

// The gradient with respect to the features, along with the loss: the proxies of each chunk are
// read out by their weights, as sums that the gradient is made of at the end.
template <typename Device>
class ReadOut {
 public:
  ReadOut(const Tensor& features, const Formats& formats, int64_t columns)
      : formats_(formats),
        weights_(features, features.size(0), columns, formats.operands),
        factors_(torch::stable::new_empty(features, {features.size(0)}, formats.sums)),
        sums_(torch::stable::new_empty(features, {features.size(0), features.size(1)},
                                       formats.sums)) {}
  // The buffer of a chunk's weights.
  Tensor weights(int64_t columns) const { return weights_.first(columns); }
  // By what the sums shrink before the chunk is added.
  const Tensor& factors() const { return factors_; }

  void add(const Tensor& weights, const Tensor& chunk) {
    if (first_) {
      multiply<Device>(weights, chunk, sums_);
      first_ = false;
      return;
    }
    const bool narrow = formats_.operands != formats_.sums;
    ContrastiveFoldParams p{};
    MaybeTensor part;
    if (narrow) {
      part = torch::stable::empty_like(sums_);
      multiply<Device>(weights, chunk, *part);
      p.part = part->const_data_ptr();
    }
    p.sums = sums_.mutable_data_ptr();
    p.factors = factors_.const_data_ptr();
    p.num_rows = sums_.size(0);
    p.dim = sums_.size(1);
    p.dtype = dtype_of("contrastive", "sums", sums_);
    Device::template run<run_fold, launch_contrastive_fold>(sums_, p);
    if (!narrow) multiply_add<Device>(weights, chunk, sums_);
  }

  const Tensor& sums() const { return sums_; }

 private:
  Formats formats_;
  ChunkBuffer weights_;
  Tensor factors_, sums_;
  bool first_ = true;
};

// Makes the features' gradient of what was read out, in its place.
template <typename Device>
Tensor gradient_of(const Tensor& sums, const Formats& formats, const Tensor& rows,
                   const Tensor& proxies, const Tensor& labels, double temperature) {
  // Of proxies in any other layout the positives alone are copied.
  const bool direct = proxies.is_contiguous();
  const Tensor own = direct ? proxies : gather_rows(proxies, labels);
  const Tensor columns = torch::stable::contiguous(labels);
  ContrastiveGradientParams p{};
  p.gradient = sums.mutable_data_ptr();
  p.rows = rows.const_data_ptr<double>();
  p.proxies = own.const_data_ptr();
  p.labels = direct ? int64_data(columns) : nullptr;
  p.num_rows = sums.size(0);
  p.num_proxies = own.size(0);
  p.dim = sums.size(1);
  p.unit = formats.weight_scale * formats.scale * temperature;
  p.temperature = temperature;
  p.dtype = dtype_of("contrastive", "sums", sums);
  p.proxy_dtype = dtype_of("contrastive", "proxies", own);
  Device::template run<run_gradient, launch_contrastive_gradient>(sums, p);
  return sums;
}

}  // namespace
}  // namespace dhcl
