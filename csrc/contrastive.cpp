// Glue of the contrastive loss: registers the CPU and CUDA forms of its ops with torch. What the
// kernels compute is said in contrastive.h; the CPU's are in contrastive_cpu.h, CUDA's in
// contrastive.cu.
#include "contrastive.h"

#include <optional>
#include <tuple>

#include "common/torch_glue.h"
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

void check_rows(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t rows,
                int64_t columns) {
  check_rank(op, name, t, 2);
  check(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  check(t.size(0) == rows && (columns < 0 || t.size(1) == columns), op, ": ", name,
        " has the wrong shape");
  check_contiguous(op, name, t);
}

// Contiguous copies stay alive as long as the roles point into them.
class Roles {
 public:
  Roles(const char* op, const Tensor& labels, const MaybeTensor& proxy_labels,
        const MaybeTensor& row_groups, const MaybeTensor& column_groups,
        const MaybeTensor& excluded, int64_t rows, int64_t columns)
      : labels_(keep(op, "labels", labels)),
        proxy_labels_(keep(op, "proxy_labels", proxy_labels)),
        row_groups_(keep(op, "row_groups", row_groups)),
        column_groups_(keep(op, "column_groups", column_groups)),
        excluded_(keep(op, "excluded", excluded)) {
    check(labels_->dim() == 1 && labels_->size(0) == rows, op, ": one label per row is needed");
    check(!proxy_labels_ || proxy_labels_->size(0) >= columns, op, ": proxy_labels are too few");
    check(row_groups_.has_value() == column_groups_.has_value(), op,
          ": row_groups and column_groups go together");
    check(!row_groups_ || (row_groups_->size(0) == rows && column_groups_->size(0) >= columns), op,
          ": groups are too few");
    check(!excluded_ || (excluded_->dim() == 2 && excluded_->size(0) == rows), op,
          ": excluded must have one list per row");
  }
  ContrastiveRoles get() const {
    ContrastiveRoles roles{};
    roles.labels = data(labels_);
    roles.proxy_labels = data(proxy_labels_);
    roles.row_groups = data(row_groups_);
    roles.column_groups = data(column_groups_);
    roles.excluded = data(excluded_);
    roles.num_excluded = excluded_ ? excluded_->size(1) : 0;
    return roles;
  }

 private:
  static MaybeTensor keep(const char* op, const char* name, const MaybeTensor& t) {
    if (!t) return std::nullopt;
    check_int64(op, name, *t);
    return torch::stable::contiguous(*t);
  }
  static const int64_t* data(const MaybeTensor& t) { return t ? int64_data(*t) : nullptr; }
  MaybeTensor labels_, proxy_labels_, row_groups_, column_groups_, excluded_;
};

template <typename Device>
void contrastive_stream(const Tensor& state, const Tensor& counts, const MaybeTensor& positives,
                        const Tensor& products, const MaybeTensor& weights,
                        const MaybeTensor& factors, const Tensor& labels,
                        const MaybeTensor& proxy_labels, const MaybeTensor& row_groups,
                        const MaybeTensor& column_groups, const MaybeTensor& excluded,
                        int64_t start, double scale, double beta, double weight_scale) {
  const char* op = "contrastive_stream_";
  check_rank(op, "products", products, 2);
  check_contiguous(op, "products", products);
  ContrastiveStreamParams p{};
  p.num_rows = products.size(0);
  p.num_cols = products.size(1);
  p.start = start;
  p.dtype = dtype_of(op, "products", products);
  check(p.dtype == ContrastiveDtype::kFloat32 || p.dtype == ContrastiveDtype::kFloat64, op,
        ": products must be float32 or float64");
  check_rows(op, "state", state, ScalarType::Double, p.num_rows, kStateColumns);
  check_rows(op, "counts", counts, ScalarType::Long, p.num_rows, kCountColumns);
  p.state = state.mutable_data_ptr<double>();
  p.counts = counts.mutable_data_ptr<int64_t>();
  p.products = products.mutable_data_ptr();
  if (positives) {
    check_rows(op, "positives", *positives, ScalarType::Double, p.num_rows, -1);
    p.positives = positives->mutable_data_ptr<double>();
    p.num_slots = positives->size(1);
  }
  if (weights) {
    p.weight_dtype = dtype_of(op, "weights", *weights);
    check(Device::kCuda || p.weight_dtype == p.dtype, op,
          ": on the CPU weights must have the products' dtype");
    check_rows(op, "weights", *weights, weights->scalar_type(), p.num_rows, p.num_cols);
    p.weights = weights->mutable_data_ptr();
  }
  if (factors) {
    check(factors->scalar_type() == products.scalar_type() && factors->dim() == 1 &&
              factors->size(0) == p.num_rows && factors->is_contiguous(),
          op, ": factors must have one entry per row in the products' dtype");
    p.factors = factors->mutable_data_ptr();
  }
  const Roles roles(op, labels, proxy_labels, row_groups, column_groups, excluded, p.num_rows,
                    start + p.num_cols);
  p.roles = roles.get();
  p.scale = scale;
  p.beta = beta;
  p.weight_scale = weight_scale;
  Device::template run<run_stream, launch_contrastive_stream>(products, p);
}

template <typename Device>
std::tuple<Tensor, Tensor> contrastive_finish(const Tensor& state, const Tensor& counts,
                                              const MaybeTensor& positives, const Tensor& kappa,
                                              bool prior, int64_t aggregation, double temperature,
                                              double beta, bool through) {
  const char* op = "contrastive_finish";
  ContrastiveFinishParams p{};
  p.num_rows = state.size(0);
  check_rows(op, "state", state, ScalarType::Double, p.num_rows, kStateColumns);
  check_rows(op, "counts", counts, ScalarType::Long, p.num_rows, kCountColumns);
  check(kappa.scalar_type() == ScalarType::Double && kappa.dim() == 1 &&
            kappa.size(0) == p.num_rows && kappa.is_contiguous(),
        op, ": kappa must have one float64 per row");
  p.aggregation = static_cast<Aggregation>(aggregation);
  check(p.aggregation != Aggregation::kEach || positives.has_value(), op,
        ": the positives' logits are needed");
  Tensor loss = torch::stable::new_empty(state, {p.num_rows});
  Tensor rows = torch::stable::new_empty(state, {p.num_rows, kRowColumns});
  p.loss = loss.mutable_data_ptr<double>();
  p.rows = rows.mutable_data_ptr<double>();
  p.state = state.const_data_ptr<double>();
  p.counts = int64_data(counts);
  if (positives) {
    check_rows(op, "positives", *positives, ScalarType::Double, p.num_rows, -1);
    p.positives = positives->const_data_ptr<double>();
    p.num_slots = positives->size(1);
  }
  p.kappa = kappa.const_data_ptr<double>();
  p.temperature = temperature;
  p.beta = beta;
  p.prior = prior;
  p.through = through;
  Device::template run<run_finish, launch_contrastive_finish>(state, p);
  return {loss, rows};
}

template <typename Device>
void contrastive_slopes(const Tensor& products, const Tensor& rows, const Tensor& state,
                        const Tensor& counts, const Tensor& grad, const Tensor& labels,
                        const MaybeTensor& proxy_labels, const MaybeTensor& row_groups,
                        const MaybeTensor& column_groups, const MaybeTensor& excluded,
                        int64_t start, double scale, double beta, int64_t aggregation) {
  const char* op = "contrastive_slopes_";
  check_rank(op, "products", products, 2);
  check_contiguous(op, "products", products);
  ContrastiveSlopesParams p{};
  p.num_rows = products.size(0);
  p.num_cols = products.size(1);
  p.start = start;
  p.dtype = dtype_of(op, "products", products);
  check(p.dtype == ContrastiveDtype::kFloat32 || p.dtype == ContrastiveDtype::kFloat64, op,
        ": products must be float32 or float64");
  check_rows(op, "rows", rows, ScalarType::Double, p.num_rows, kRowColumns);
  check_rows(op, "state", state, ScalarType::Double, p.num_rows, kStateColumns);
  check_rows(op, "counts", counts, ScalarType::Long, p.num_rows, kCountColumns);
  check(grad.scalar_type() == ScalarType::Double && grad.dim() == 1 && grad.size(0) == p.num_rows,
        op, ": grad must have one float64 per row");
  const Tensor upstream = torch::stable::contiguous(grad);
  p.products = products.mutable_data_ptr();
  p.rows = rows.const_data_ptr<double>();
  p.state = state.const_data_ptr<double>();
  p.counts = int64_data(counts);
  p.grad = upstream.const_data_ptr<double>();
  const Roles roles(op, labels, proxy_labels, row_groups, column_groups, excluded, p.num_rows,
                    start + p.num_cols);
  p.roles = roles.get();
  p.scale = scale;
  p.beta = beta;
  p.aggregation = static_cast<Aggregation>(aggregation);
  Device::template run<run_slopes, launch_contrastive_slopes>(products, p);
}

template <typename Device, typename Library>
void register_ops(Library& m) {
  m.impl("contrastive_stream_", TORCH_BOX(&contrastive_stream<Device>));
  m.impl("contrastive_finish", TORCH_BOX(&contrastive_finish<Device>));
  m.impl("contrastive_slopes_", TORCH_BOX(&contrastive_slopes<Device>));
}

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) { dhcl::register_ops<dhcl::Cpu>(m); }

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) { dhcl::register_ops<dhcl::Cuda>(m); }
#endif
