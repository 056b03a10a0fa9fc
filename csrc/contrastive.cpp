// The contrastive loss as ops of torch: the glue of its kernels, and the loop that streams the
// proxies through them and torch's matrix products. What the kernels compute is said in
// contrastive.h; the CPU's are in contrastive_cpu.h, CUDA's in contrastive.cu, and what the loop
// holds is in contrastive_stream.h.
#include "contrastive.h"

#include <optional>
#include <tuple>

#include "common/torch_glue.h"
#include "contrastive_cpu.h"
#include "contrastive_stream.h"
#ifdef DHCL_CUDA
#include "contrastive_split.h"
#endif

namespace dhcl {
namespace {

void check_rows(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t rows,
                int64_t columns) {
  check_rank(op, name, t, 2);
  check(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  check(t.size(0) == rows && (columns < 0 || t.size(1) == columns), op, ": ", name,
        " has the wrong shape");
  check_contiguous(op, name, t);
}

void check_kappa(const char* op, const Tensor& kappa, int64_t rows) {
  check(kappa.scalar_type() == ScalarType::Double && kappa.dim() == 1 && kappa.size(0) == rows &&
            kappa.is_contiguous(),
        op, ": kappa must have one float64 per row");
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

// Lists of negatives that count by a weight, kept as the roles are.
class Listed {
 public:
  Listed(const char* op, const MaybeTensor& rows, const MaybeTensor& offsets,
         const MaybeTensor& entries, const MaybeTensor& logs, const MaybeTensor& members,
         const MaybeTensor& member_offsets, int64_t num_rows)
      : rows_(keep(op, "rows", rows)),
        offsets_(keep(op, "offsets", offsets)),
        entries_(keep(op, "entries", entries)),
        members_(keep(op, "members", members)),
        member_offsets_(keep(op, "member_offsets", member_offsets)) {
    if (!rows_) return;
    check(offsets_ && entries_ && logs.has_value(), op,
          ": rows, offsets, entries and logs go together");
    check_float(op, "logs", *logs);
    logs_ = torch::stable::contiguous(*logs);
    check(rows_->size(0) == num_rows, op, ": one list per row is needed");
    check(offsets_->size(0) > 0 && logs_->size(0) == entries_->size(0), op,
          ": one logarithm per entry is needed");
    check(members_.has_value() == member_offsets_.has_value() &&
              (!member_offsets_ || member_offsets_->size(0) > 0),
          op, ": members and member_offsets go together");
  }
  explicit operator bool() const { return rows_.has_value(); }
  ContrastiveListed get() const {
    ContrastiveListed listed{};
    if (!rows_) return listed;
    listed.rows = int64_data(*rows_);
    listed.offsets = int64_data(*offsets_);
    listed.entries = int64_data(*entries_);
    listed.logs = float_data(*logs_);
    listed.num_lists = offsets_->size(0) - 1;
    listed.num_entries = entries_->size(0);
    if (!members_) return listed;
    listed.members = int64_data(*members_);
    listed.member_offsets = int64_data(*member_offsets_);
    listed.num_members = members_->size(0);
    listed.num_classes = member_offsets_->size(0) - 1;
    return listed;
  }

 private:
  static MaybeTensor keep(const char* op, const char* name, const MaybeTensor& t) {
    if (!t) return std::nullopt;
    check_int64(op, name, *t);
    check_rank(op, name, *t, 1);
    return torch::stable::contiguous(*t);
  }
  MaybeTensor rows_, offsets_, entries_, logs_, members_, member_offsets_;
};

template <typename Device>
void contrastive_weigh(const Tensor& products, const Tensor& labels,
                       const MaybeTensor& proxy_labels, const Tensor& rows, const Tensor& offsets,
                       const Tensor& entries, const Tensor& logs, const MaybeTensor& members,
                       const MaybeTensor& member_offsets, int64_t start, double scale) {
  const char* op = "contrastive_weigh_";
  check_rank(op, "products", products, 2);
  check_contiguous(op, "products", products);
  ContrastiveWeighParams p{};
  p.products = products.mutable_data_ptr();
  p.num_rows = products.size(0);
  p.num_cols = products.size(1);
  p.start = start;
  p.scale = scale;
  p.dtype = dtype_of(op, "products", products);
  check(p.dtype == ContrastiveDtype::kFloat32 || p.dtype == ContrastiveDtype::kFloat64, op,
        ": products must be float32 or float64");
  const Roles roles(op, labels, proxy_labels, std::nullopt, std::nullopt, std::nullopt, p.num_rows,
                    start + p.num_cols);
  const Listed listed(op, rows, offsets, entries, logs, members, member_offsets, p.num_rows);
  p.roles = roles.get();
  p.listed = listed.get();
  Device::template run<run_weigh, launch_contrastive_weigh>(products, p);
}

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
  check_kappa(op, kappa, p.num_rows);
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

// ---- the loss, streamed over the proxies --------------------------------------------------------

// Most positives that a row can have: the size of the largest class of proxies.
template <typename Device>
int64_t largest_class(const Tensor& proxy_labels) {
#ifdef DHCL_CUDA
  if constexpr (Device::kCuda) {
    const Tensor most = torch::stable::amax(value_counts(proxy_labels), 0);
    int64_t result = 0;
    CudaScope(proxy_labels).read_back(&result, int64_data(most), 1);
    return result;
  }
#endif
  const Tensor labels = torch::stable::contiguous(proxy_labels);
  std::vector<int64_t> sorted(int64_data(labels), int64_data(labels) + labels.size(0));
  std::sort(sorted.begin(), sorted.end());
  int64_t most = 0, run = 0;
  for (size_t j = 0; j < sorted.size(); ++j) {
    run = j > 0 && sorted[j] == sorted[j - 1] ? run + 1 : 1;
    most = std::max(most, run);
  }
  return most;
}

// Raises on the CPU for what shows only in the sums; on CUDA the kernels assert.
void refuse(const Tensor& state, const Tensor& counts, const Tensor& kappa, bool prior,
            const Tensor& proxies) {
  const char* op = "debiased_contrastive_loss";
  const double* sums = state.const_data_ptr<double>();
  const int64_t* count = int64_data(counts);
  const double* expected = kappa.const_data_ptr<double>();
  bool finite = true;
  for (int64_t i = 0; i < state.size(0); ++i, sums += kStateColumns) {
    // An infinite logit shows as the maximum, one that is NaN in the sums.
    finite &= std::isfinite(sums[kMass]) && std::isfinite(sums[kPositiveMass]) &&
              sums[kMax] < HUGE_VAL && sums[kPositiveMax] < HUGE_VAL;
  }
  if (!finite) {
    const Tensor wide = torch::stable::contiguous(torch::stable::to(proxies, ScalarType::Double));
    const double* values = wide.const_data_ptr<double>();
    const int64_t dim = wide.size(1);
    const double* end = values + wide.size(0) * dim;
    const double* wrong = std::find_if(values, end, [](double v) { return !std::isfinite(v); });
    check(wrong == end, op, ": proxies must be finite (got one that is not at row ",
          dim == 0 ? 0 : (wrong - values) / dim, ")");
    check(false, op, ": similarities overflow float32");
  }
  for (int64_t i = 0; i < counts.size(0); ++i)
    check(count[i * kCountColumns + kPositives] > 0, op,
          ": every row needs a positive proxy (got none for batch position ", i, ")");
  for (int64_t i = 0; i < counts.size(0) && !prior; ++i) {
    const int64_t negatives = count[i * kCountColumns + kNegatives];
    check(negatives == 0 || expected[i] < static_cast<double>(negatives), op,
          ": kappa must be smaller than the number of negatives (got ", expected[i], " and ",
          negatives, " at batch position ", i, ")");
  }
}

// The rows' running sums: state, counts and, for Aggregation::kEach, the positives' logits.
struct RowSums {
  Tensor state, counts;
  MaybeTensor positives;
};

template <typename Device>
RowSums new_sums(const Tensor& features, Aggregation aggregation, const MaybeTensor& proxy_labels) {
  const int64_t rows = features.size(0);
  MaybeTensor positives;
  if (aggregation == Aggregation::kEach) {
    check(proxy_labels.has_value(), "contrastive: proxy_labels are needed");
    const int64_t slots = largest_class<Device>(*proxy_labels);
    positives = torch::stable::new_zeros(features, {rows, slots}, ScalarType::Double);
  }
  return {torch::stable::new_empty(features, {rows, kStateColumns}, ScalarType::Double),
          torch::stable::new_empty(features, {rows, kCountColumns}, ScalarType::Long), positives};
}

// Streams the proxies through the sums and, where there is one, the read-out. p holds what is the
// same for every chunk.
template <typename Device>
void stream_chunks(const Operands<Device>& operands, const Formats& formats, int64_t num_proxies,
                   ContrastiveStreamParams p, const ContrastiveListed& listed,
                   ReadOut<Device>* read_out) {
  const ChunkBuffer products(operands.left(), p.num_rows, operands.columns(), formats.sums);
  p.factors = read_out == nullptr ? nullptr : read_out->factors().mutable_data_ptr();
  for (p.start = 0; p.start < num_proxies; p.start += p.num_cols) {
    p.num_cols = std::min(operands.columns(), num_proxies - p.start);
    const Tensor chunk = operands.chunk(p.start, p.num_cols);
    const Tensor similarities = products.first(p.num_cols);
    multiply<Device>(operands.left(), torch::stable::transpose(chunk, 0, 1), similarities);
    p.products = similarities.mutable_data_ptr();
    p.dtype = p.weight_dtype = dtype_of("contrastive", "products", similarities);
    p.fresh = p.start == 0;
    MaybeTensor weights;
    if (read_out != nullptr) {
      weights = read_out->weights(p.num_cols);
      p.weights = weights->mutable_data_ptr();
      p.weight_dtype = dtype_of("contrastive", "weights", *weights);
    }
    if (listed.rows != nullptr)
      Device::template run<run_weigh, launch_contrastive_weigh>(similarities, weighing(p, listed));
    Device::template run<run_stream, launch_contrastive_stream>(similarities, p);
    if (read_out != nullptr) read_out->add(*weights, chunk);
  }
}

// The same for all proxies; gives what was read out of them (B, d), nothing unless weighted.
template <typename Device>
MaybeTensor stream_proxies(const Tensor& features, const Tensor& proxies, const Formats& formats,
                           int64_t columns, bool weighted, const ContrastiveStreamParams& p,
                           const ContrastiveListed& listed) {
  const IeeeProducts guard;
#ifdef DHCL_CUDA
  if constexpr (Device::kCuda)
    if (formats.split) return SplitStream(features, proxies, columns, weighted).run(p, listed);
#endif
  const Operands<Device> operands(features, proxies, formats, columns, weighted);
  std::optional<ReadOut<Device>> read_out;
  if (weighted) read_out.emplace(features, formats, operands.columns());
  stream_chunks(operands, formats, proxies.size(0), p, listed, read_out ? &*read_out : nullptr);
  return read_out ? MaybeTensor(read_out->sums()) : std::nullopt;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> contrastive(
    const Tensor& features, const Tensor& proxies, const Tensor& labels,
    const MaybeTensor& proxy_labels, const MaybeTensor& row_groups,
    const MaybeTensor& column_groups, const MaybeTensor& excluded, const Tensor& kappa, bool prior,
    int64_t aggregation, double temperature, double beta, bool through, bool one_pass, bool fast,
    int64_t columns, const MaybeTensor& listed_rows, const MaybeTensor& listed_offsets,
    const MaybeTensor& listed_entries, const MaybeTensor& listed_logs, const MaybeTensor& members,
    const MaybeTensor& member_offsets) {
  const char* op = "contrastive";
  check_rank(op, "features", features, 2);
  check_rank(op, "proxies", proxies, 2);
  check(features.size(1) == proxies.size(1), op, ": features and proxies must have one width");
  check(proxies.size(0) > 0, op, ": at least one proxy is needed");
  check(!one_pass || !proxy_labels, op, ": one pass needs a column per label");
  check_kappa(op, kappa, features.size(0));
  const Formats formats = formats_of<Device>(features, proxies, fast);
  const Roles roles(op, labels, proxy_labels, row_groups, column_groups, excluded, features.size(0),
                    proxies.size(0));
  const Listed listed(op, listed_rows, listed_offsets, listed_entries, listed_logs, members,
                      member_offsets, features.size(0));
  const RowSums sums =
      new_sums<Device>(features, static_cast<Aggregation>(aggregation), proxy_labels);
  ContrastiveStreamParams p{};
  p.state = sums.state.mutable_data_ptr<double>();
  p.counts = sums.counts.mutable_data_ptr<int64_t>();
  p.positives = sums.positives ? sums.positives->mutable_data_ptr<double>() : nullptr;
  p.num_slots = sums.positives ? sums.positives->size(1) : 0;
  p.roles = roles.get();
  p.num_rows = features.size(0);
  p.scale = 1.0 / temperature / (formats.scale * formats.scale);
  p.beta = beta;
  p.weight_scale = formats.weight_scale;
  const MaybeTensor read_out =
      stream_proxies<Device>(features, proxies, formats, columns, one_pass, p, listed.get());
  if constexpr (!Device::kCuda) refuse(sums.state, sums.counts, kappa, prior, proxies);
  // finish takes the temperature for the floor alone, which weighted negatives may lie below.
  const double floor = listed ? kNoFloor : temperature;
  auto [losses, rows] = contrastive_finish<Device>(sums.state, sums.counts, sums.positives, kappa,
                                                   prior, aggregation, floor, beta, through);
  const Tensor gradient =
      read_out ? gradient_of<Device>(*read_out, formats, rows, proxies, labels, temperature)
               : torch::stable::new_empty(features, {0, features.size(1)});
  return {losses, gradient, sums.state, sums.counts, rows};
}

template <typename Device, typename Library>
void register_ops(Library& m) {
  m.impl("contrastive", TORCH_BOX(&contrastive<Device>));
  m.impl("contrastive_weigh_", TORCH_BOX(&contrastive_weigh<Device>));
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
