// The memory bank on the CPU, and the glue that registers the CPU and CUDA kernels with torch.
// The orders of summation are those of memory.h; the CUDA kernels are in memory.cu.
#include "memory.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/cpu.h"

namespace dhcl {
namespace {

// ---- row loops ----------------------------------------------------------------------------------

DHCL_CLONES void mix(const float* old, const float* f, float m, float one_minus_m, int64_t d,
                     float* out) {
  for (int64_t j = 0; j < d; ++j) out[j] = m * old[j] + one_minus_m * f[j];
}

DHCL_CLONES float norm(const float* x, int64_t d) { return std::sqrt(sum_of_products(x, x, d)); }
DHCL_CLONES double norm(const double* x, int64_t d) { return std::sqrt(sum_of_products(x, x, d)); }

DHCL_CLONES void divide(const float* x, float divisor, int64_t d, float* out) {
  for (int64_t j = 0; j < d; ++j) out[j] = x[j] / divisor;
}
DHCL_CLONES void divide(const double* x, double divisor, int64_t d, double* out) {
  for (int64_t j = 0; j < d; ++j) out[j] = x[j] / divisor;
}

DHCL_CLONES void add(const float* x, int64_t d, float* sum) {
  for (int64_t j = 0; j < d; ++j) sum[j] += x[j];
}
DHCL_CLONES void add(const double* x, int64_t d, double* sum) {
  for (int64_t j = 0; j < d; ++j) sum[j] += x[j];
}
// Four rows in one pass over the sums, in the order of four calls of add.
DHCL_CLONES void add4(const float* a, const float* b, const float* c, const float* e, int64_t d,
                      float* sum) {
  for (int64_t j = 0; j < d; ++j) sum[j] = (((sum[j] + a[j]) + b[j]) + c[j]) + e[j];
}

template <typename T>
void widen(const T* x, int64_t d, float* out) {
  for (int64_t j = 0; j < d; ++j) out[j] = static_cast<float>(x[j]);
}
template <typename T>
void narrow(const float* x, int64_t d, T* out) {
  for (int64_t j = 0; j < d; ++j) out[j] = static_cast<T>(x[j]);
}
template <typename T>
const float* as_float(const T* x, int64_t d, float* scratch) {
  widen(x, d, scratch);
  return scratch;
}
const float* as_float(const float* x, int64_t, float*) { return x; }

// ---- momentum update ----------------------------------------------------------------------------

// Positions of the batch ordered by (row, position), and where each row's positions begin.
struct Groups {
  std::vector<int64_t> positions;
  std::vector<int64_t> starts;
};

Groups group_by_value(const int64_t* values, int64_t count) {
  Groups groups;
  groups.positions.resize(count);
  std::iota(groups.positions.begin(), groups.positions.end(), 0);
  std::sort(groups.positions.begin(), groups.positions.end(), [values](int64_t a, int64_t b) {
    return values[a] != values[b] ? values[a] < values[b] : a < b;
  });
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || values[groups.positions[i]] != values[groups.positions[i - 1]])
      groups.starts.push_back(i);
  groups.starts.push_back(count);
  return groups;
}

template <typename BankT, typename FeatureT>
int64_t update_row(BankT* bank_row, const FeatureT* features, const int64_t* begin,
                   const int64_t* end, const MomentumParams& p, float* scratch) {
  const int64_t d = p.dim;
  float* old_row = scratch;
  float* feature_row = scratch + d;
  float* mixed = scratch + 2 * d;
  int64_t skipped = 0;
  for (const int64_t* position = begin; position != end; ++position) {
    mix(as_float(bank_row, d, old_row), as_float(features + *position * d, d, feature_row),
        p.momentum, p.one_minus_momentum, d, mixed);
    const float length = norm(mixed, d);
    const float divisor = std::max(length, p.eps);
    if (!(std::isfinite(length) && divisor > 0.0f)) {
      ++skipped;
      continue;
    }
    divide(mixed, divisor, d, mixed);
    narrow(mixed, d, bank_row);
  }
  return skipped;
}

template <typename BankT, typename FeatureT>
void update_rows(const MomentumParams& p) {
  const Groups groups = group_by_value(p.indices, p.batch);
  std::atomic<int64_t> skipped{0};
  parallel_tasks(
      static_cast<int64_t>(groups.starts.size()) - 1, 4, p.batch * p.dim, [&](int64_t g) {
        thread_local std::vector<float> scratch;
        if (static_cast<int64_t>(scratch.size()) < 3 * p.dim) scratch.resize(3 * p.dim);
        const int64_t* begin = groups.positions.data() + groups.starts[g];
        const int64_t* end = groups.positions.data() + groups.starts[g + 1];
        skipped +=
            update_row(static_cast<BankT*>(p.bank) + p.indices[*begin] * p.dim,
                       static_cast<const FeatureT*>(p.features), begin, end, p, scratch.data());
      });
  if (p.skipped != nullptr) *p.skipped += skipped;
}

template <typename BankT>
void update_rows_for(const MomentumParams& p) {
  switch (p.feature_dtype) {
    case Dtype::kFloat16:
      return update_rows<BankT, Half>(p);
    case Dtype::kBFloat16:
      return update_rows<BankT, BFloat16>(p);
    default:
      return update_rows<BankT, float>(p);
  }
}

void run_momentum_update(const MomentumParams& p) {
  for (int64_t i = 0; i < p.batch; ++i)
    check(p.indices[i] >= 0 && p.indices[i] < p.num_rows,
          "momentum_update_: indices must be in [0, ", p.num_rows, ") (got ", p.indices[i],
          " at batch position ", i, ")");
  if (p.batch == 0 || p.dim == 0) return;
  switch (p.bank_dtype) {
    case Dtype::kFloat16:
      return update_rows_for<Half>(p);
    case Dtype::kBFloat16:
      return update_rows_for<BFloat16>(p);
    default:
      return update_rows_for<float>(p);
  }
}

// ---- class means --------------------------------------------------------------------------------

// Adds columns [first, first + width) of the given rows to sum, in order.
template <typename T>
void add_rows(const T* rows, const int64_t* begin, const int64_t* end, int64_t d, int64_t first,
              int64_t width, float* sum, float* scratch) {
  for (; begin != end; ++begin)
    add(as_float(rows + *begin * d + first, width, scratch), width, sum);
}
void add_rows(const float* rows, const int64_t* begin, const int64_t* end, int64_t d, int64_t first,
              int64_t width, float* sum, float*) {
  for (; end - begin >= 4; begin += 4)
    add4(rows + begin[0] * d + first, rows + begin[1] * d + first, rows + begin[2] * d + first,
         rows + begin[3] * d + first, width, sum);
  for (; begin != end; ++begin) add(rows + *begin * d + first, width, sum);
}
void add_rows(const double* rows, const int64_t* begin, const int64_t* end, int64_t d,
              int64_t first, int64_t width, double* sum, double*) {
  for (; begin != end; ++begin) add(rows + *begin * d + first, width, sum);
}

void store_row(const float* x, int64_t d, float* out) { std::copy_n(x, d, out); }
void store_row(const double* x, int64_t d, double* out) { std::copy_n(x, d, out); }
template <typename T>
void store_row(const float* x, int64_t d, T* out) {
  narrow(x, d, out);
}

template <typename T, typename A>
void mean_of_class(const SegmentMeanParams& p, int64_t k, int64_t first, int64_t width,
                   std::vector<A>& scratch) {
  const int64_t begin = p.offsets[k];
  const int64_t end = p.offsets[k + 1];
  scratch.assign(3 * width, A(0));
  A* total = scratch.data();
  A* part = total + width;
  for (int64_t run = begin; run < end; run += kRunLength) {
    const int64_t stop = std::min(run + kRunLength, end);
    // The first run sums into the total itself: 0 + x is x.
    A* sum = run == begin ? total : part;
    if (run != begin) std::fill_n(part, width, A(0));
    add_rows(static_cast<const T*>(p.rows), p.members + run, p.members + stop, p.dim, first, width,
             sum, part + width);
    if (run != begin) add(part, width, total);
  }
  if (end > begin) divide(total, static_cast<A>(end - begin), width, total);
  store_row(total, width, static_cast<T*>(p.means) + k * p.dim + first);
}

template <typename T, typename A>
void normalize_class(const SegmentMeanParams& p, int64_t k, std::vector<A>& scratch) {
  T* row = static_cast<T*>(p.means) + k * p.dim;
  scratch.resize(p.dim);
  for (int64_t j = 0; j < p.dim; ++j) scratch[j] = static_cast<A>(row[j]);
  const A divisor = std::max(norm(scratch.data(), p.dim), static_cast<A>(kMeanEps));
  divide(scratch.data(), divisor, p.dim, scratch.data());
  store_row(scratch.data(), p.dim, row);
}

// A class of this many members is split by columns, so that one giant cluster keeps all threads
// busy.
constexpr int64_t kGiantClass = 4096;
constexpr int64_t kGiantSlice = 256;

// The class that an entry of the list names.
int64_t listed_class(const SegmentMeanParams& p, int64_t entry) {
  constexpr const char* op = "update_segment_mean_";
  int64_t k = p.listed[entry];
  if (p.class_of != nullptr) {
    check(k >= 0 && k < p.num_rows, op, ": rows must be in [0, ", p.num_rows, ") (got ", k, ")");
    k = p.class_of[k];
  }
  check(k >= 0 && k < p.num_classes, op, ": classes must be in [0, ", p.num_classes, ") (got ", k,
        ")");
  return k;
}

template <typename T, typename A>
void mean_of_classes(const SegmentMeanParams& p) {
  std::vector<int64_t> small, giant;
  const auto place = [&](int64_t k) {
    check(p.offsets[k] >= 0 && p.offsets[k] <= p.offsets[k + 1] && p.offsets[k + 1] <= p.num_rows,
          "update_segment_mean_: offsets must ascend from 0 up to the number of rows, ", p.num_rows,
          " (got ", p.offsets[k], " and ", p.offsets[k + 1], " of class ", k, ")");
    (p.offsets[k + 1] - p.offsets[k] < kGiantClass ? small : giant).push_back(k);
  };
  if (p.listed == nullptr) {
    for (int64_t k = 0; k < p.num_classes; ++k) place(k);
  } else {
    std::vector<int64_t> listed(p.num_listed);
    for (int64_t i = 0; i < p.num_listed; ++i) listed[i] = listed_class(p, i);
    std::sort(listed.begin(), listed.end());
    listed.erase(std::unique(listed.begin(), listed.end()), listed.end());
    for (const int64_t k : listed) place(k);
  }
  const int64_t slices = (p.dim + kGiantSlice - 1) / kGiantSlice;
  const auto members_of = [&p](const std::vector<int64_t>& classes) {
    int64_t members = 0;
    for (const int64_t k : classes) members += p.offsets[k + 1] - p.offsets[k];
    return members;
  };
  parallel_tasks(static_cast<int64_t>(giant.size()) * slices, 1, members_of(giant) * p.dim,
                 [&](int64_t task) {
                   thread_local std::vector<A> scratch;
                   const int64_t first = task % slices * kGiantSlice;
                   mean_of_class<T, A>(p, giant[task / slices], first,
                                       std::min(kGiantSlice, p.dim - first), scratch);
                 });
  parallel_tasks(static_cast<int64_t>(small.size()), 8, members_of(small) * p.dim,
                 [&](int64_t task) {
                   thread_local std::vector<A> scratch;
                   mean_of_class<T, A>(p, small[task], 0, p.dim, scratch);
                   if (p.normalize) normalize_class<T, A>(p, small[task], scratch);
                 });
  if (p.normalize) {
    std::vector<A> scratch;
    for (const int64_t k : giant) normalize_class<T, A>(p, k, scratch);
  }
}

void run_segment_mean(const SegmentMeanParams& p) {
  if ((p.listed == nullptr ? p.num_classes : p.num_listed) == 0 || p.dim == 0) return;
  switch (p.dtype) {
    case Dtype::kFloat16:
      return mean_of_classes<Half, float>(p);
    case Dtype::kBFloat16:
      return mean_of_classes<BFloat16, float>(p);
    case Dtype::kFloat64:
      return mean_of_classes<double, double>(p);
    default:
      return mean_of_classes<float, float>(p);
  }
}

template <typename T, typename A>
void spread_gradient(const SegmentMeanBackwardParams& p) {
  const T* grad = static_cast<const T*>(p.grad);
  T* grad_rows = static_cast<T*>(p.grad_rows);
  const int64_t d = p.dim;
  parallel_tasks(p.num_classes, 8, p.num_rows * d, [&](int64_t k) {
    const int64_t begin = p.offsets[k];
    const int64_t end = p.offsets[k + 1];
    if (begin == end) return;
    T* first = grad_rows + p.members[begin] * d;
    for (int64_t j = 0; j < d; ++j)
      first[j] = static_cast<T>(static_cast<A>(grad[k * d + j]) / static_cast<A>(end - begin));
    for (int64_t i = begin + 1; i < end; ++i) std::copy_n(first, d, grad_rows + p.members[i] * d);
  });
  for (int64_t i = p.offsets[p.num_classes]; i < p.num_rows; ++i)
    std::fill_n(grad_rows + p.members[i] * d, d, T(0.0f));
}

void run_segment_mean_backward(const SegmentMeanBackwardParams& p) {
  if (p.num_rows == 0 || p.dim == 0) return;
  switch (p.dtype) {
    case Dtype::kFloat16:
      return spread_gradient<Half, float>(p);
    case Dtype::kBFloat16:
      return spread_gradient<BFloat16, float>(p);
    case Dtype::kFloat64:
      return spread_gradient<double, double>(p);
    default:
      return spread_gradient<float, float>(p);
  }
}

// ---- glue ---------------------------------------------------------------------------------------

Dtype dtype_of(const char* op, const char* name, const Tensor& t, bool allow_double) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Double:
      if (allow_double) return Dtype::kFloat64;
      [[fallthrough]];
    default:
      check(false, op, ": ", name, " must be float32, float16 or bfloat16",
            allow_double ? " or float64" : "");
      return Dtype::kFloat32;
  }
}

template <typename Device>
void momentum_update(const Tensor& bank, const Tensor& features, const Tensor& indices,
                     double momentum, double eps, const std::optional<Tensor>& skipped) {
  constexpr const char* op = "momentum_update_";
  check_rank(op, "bank", bank, 2);
  check_rank(op, "features", features, 2);
  check_rank(op, "indices", indices, 1);
  check_int64(op, "indices", indices);
  check_contiguous(op, "bank", bank);
  check(features.size(0) == indices.size(0) && features.size(1) == bank.size(1), op,
        ": features must be (", indices.size(0), ", ", bank.size(1), ") (got (", features.size(0),
        ", ", features.size(1), "))");
  Tensor f = torch::stable::contiguous(features);
  // A view of the bank would change while it is read.
  if (overlap(f, bank)) f = torch::stable::clone(f);
  const Tensor i = torch::stable::contiguous(indices);
  MomentumParams p{};
  p.bank = bank.mutable_data_ptr();
  p.features = f.const_data_ptr();
  p.indices = int64_data(i);
  p.skipped = nullptr;
  if (skipped.has_value()) {
    check_int64(op, "skipped", *skipped);
    check(skipped->numel() == 1, op, ": skipped must have one element (got ", skipped->numel(),
          ")");
    p.skipped = skipped->mutable_data_ptr<int64_t>();
  }
  p.num_rows = bank.size(0);
  p.batch = i.size(0);
  p.dim = bank.size(1);
  p.momentum = static_cast<float>(momentum);
  p.one_minus_momentum = static_cast<float>(1.0 - momentum);
  p.eps = static_cast<float>(eps);
  p.bank_dtype = dtype_of(op, "bank", bank, false);
  p.feature_dtype = dtype_of(op, "features", f, false);
  Device::template run<run_momentum_update, launch_momentum_update>(bank, p);
}

// Checks the class lists that every segment op takes, beside rows or the gradient of the means.
void check_segments(const char* op, const char* name, const Tensor& rows, const Tensor& members,
                    const Tensor& offsets) {
  check_rank(op, name, rows, 2);
  check_rank(op, "members", members, 1);
  check_rank(op, "offsets", offsets, 1);
  check_int64(op, "members", members);
  check_int64(op, "offsets", offsets);
  check(offsets.size(0) >= 1, op, ": offsets must have num_classes + 1 elements (got 0)");
}

template <typename Device>
void update_segment_mean(const Tensor& means, const Tensor& rows, const Tensor& members,
                         const Tensor& offsets, const std::optional<Tensor>& classes,
                         bool normalize, const std::optional<Tensor>& class_of) {
  constexpr const char* op = "update_segment_mean_";
  check_segments(op, "rows", rows, members, offsets);
  check(members.size(0) == rows.size(0), op, ": members must have ", rows.size(0),
        " elements, one per row (got ", members.size(0), ")");
  check_rank(op, "means", means, 2);
  check_contiguous(op, "means", means);
  check(means.size(0) == offsets.size(0) - 1 && means.size(1) == rows.size(1), op,
        ": means must be (", offsets.size(0) - 1, ", ", rows.size(1), ") (got (", means.size(0),
        ", ", means.size(1), "))");
  check(means.scalar_type() == rows.scalar_type(), op, ": means and rows must have one dtype");
  const Tensor r = torch::stable::contiguous(rows);
  const Tensor m = torch::stable::contiguous(members);
  const Tensor o = torch::stable::contiguous(offsets);
  SegmentMeanParams p{};
  std::optional<Tensor> listed, owners;
  if (classes.has_value()) {
    check_rank(op, "classes", *classes, 1);
    check_int64(op, "classes", *classes);
    listed = torch::stable::contiguous(*classes);
    // An empty list has no address, and null means "all": nothing to do, then.
    if (listed->size(0) == 0) return;
    p.listed = int64_data(*listed);
    p.num_listed = listed->size(0);
  }
  if (class_of.has_value()) {
    check_int64(op, "class_of", *class_of);
    check(class_of->dim() == 1 && class_of->size(0) == rows.size(0), op, ": class_of must have ",
          rows.size(0), " elements (got ", class_of->numel(), ")");
    // An empty list has no address, and null means that classes are listed.
    check(!listed.has_value() || rows.size(0) > 0, op, ": rows must be in [0, 0) (got ",
          p.num_listed, " of them)");
    owners = torch::stable::contiguous(*class_of);
    p.class_of = int64_data(*owners);
  }
  p.means = means.mutable_data_ptr();
  p.rows = r.const_data_ptr();
  p.members = int64_data(m);
  p.offsets = int64_data(o);
  p.num_rows = r.size(0);
  p.num_classes = o.size(0) - 1;
  p.dim = r.size(1);
  p.normalize = normalize;
  p.dtype = dtype_of(op, "rows", r, true);
  Device::template run<run_segment_mean, launch_segment_mean>(rows, p);
}

template <typename Device>
Tensor segment_mean(const Tensor& rows, const Tensor& members, const Tensor& offsets) {
  check_segments("segment_mean", "rows", rows, members, offsets);
  Tensor means = torch::stable::new_empty(rows, {offsets.size(0) - 1, rows.size(1)});
  update_segment_mean<Device>(means, rows, members, offsets, std::nullopt, false, std::nullopt);
  return means;
}

template <typename Device>
Tensor segment_mean_backward(const Tensor& grad, const Tensor& members, const Tensor& offsets) {
  constexpr const char* op = "segment_mean_backward";
  check_segments(op, "grad", grad, members, offsets);
  check(grad.size(0) == offsets.size(0) - 1, op, ": grad must have ", offsets.size(0) - 1,
        " rows (got ", grad.size(0), ")");
  const Tensor g = torch::stable::contiguous(grad);
  const Tensor m = torch::stable::contiguous(members);
  const Tensor o = torch::stable::contiguous(offsets);
  check_lists<Device>(op, "offsets", o, m.size(0));
  Tensor out = torch::stable::new_empty(g, {m.size(0), g.size(1)});
  SegmentMeanBackwardParams p{};
  p.grad_rows = out.mutable_data_ptr();
  p.grad = g.const_data_ptr();
  p.members = int64_data(m);
  p.offsets = int64_data(o);
  p.num_rows = m.size(0);
  p.num_classes = o.size(0) - 1;
  p.dim = g.size(1);
  p.dtype = dtype_of(op, "grad", g, true);
  Device::template run<run_segment_mean_backward, launch_segment_mean_backward>(grad, p);
  return out;
}

// Members in ascending row index, class after class; rows of no class last.
std::tuple<Tensor, Tensor> class_csr_cpu(const Tensor& labels, int64_t num_classes) {
  constexpr const char* op = "class_csr";
  check_rank(op, "labels", labels, 1);
  check_int64(op, "labels", labels);
  check(num_classes >= 0, op, ": num_classes must not be negative (got ", num_classes, ")");
  const Tensor l = torch::stable::contiguous(labels);
  const int64_t n = l.size(0);
  const int64_t* label = int64_data(l);
  Tensor members = torch::stable::new_empty(l, {n});
  Tensor offsets = torch::stable::new_empty(l, {num_classes + 1});
  std::vector<int64_t> start(num_classes + 2, 0);
  const auto bucket = [&](int64_t i) {
    return label[i] >= 0 && label[i] < num_classes ? label[i] : num_classes;
  };
  for (int64_t i = 0; i < n; ++i) ++start[bucket(i) + 1];
  std::partial_sum(start.begin(), start.end(), start.begin());
  std::copy_n(start.begin(), num_classes + 1, offsets.mutable_data_ptr<int64_t>());
  int64_t* out = members.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) out[start[bucket(i)]++] = i;
  return {members, offsets};
}

template <typename Device, typename Library>
void register_ops(Library& m) {
  m.impl("momentum_update_", TORCH_BOX(&momentum_update<Device>));
  m.impl("segment_mean", TORCH_BOX(&segment_mean<Device>));
  m.impl("segment_mean_backward", TORCH_BOX(&segment_mean_backward<Device>));
  m.impl("update_segment_mean_", TORCH_BOX(&update_segment_mean<Device>));
  // On CUDA it is torch's own sort.
  if constexpr (!Device::kCuda) m.impl("class_csr", TORCH_BOX(&class_csr_cpu));
}

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) { dhcl::register_ops<dhcl::Cpu>(m); }

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) { dhcl::register_ops<dhcl::Cuda>(m); }
#endif
