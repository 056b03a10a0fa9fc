// The contrastive loss on the CPU, and the glue that registers the CPU and CUDA kernels with torch.
// What the kernels compute is said in contrastive.h; the CUDA kernels are in contrastive.cu.
#include "contrastive.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/cpu.h"

namespace dhcl {
namespace {

template <typename T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

// Sums and maxima run in this many columns, which a vector unit adds side by side.
constexpr int64_t kLanes = 32;

// ---- exponentials -------------------------------------------------------------------------------

// e^x for x <= 0, to 2 units in the last place; 0 below -87, where fp32 loses its normal numbers;
// NaN stays NaN. Without branches, so that a loop over it becomes vector code. x = n log 2 + r with
// |r| <= log(2) / 2; e^r by its Taylor polynomial of degree 7 (remainder below 2^-27).
inline float exp_of(float x) {
  const float y = x < -87.0f ? -87.0f : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then lies in the lowest bits.
  const float shifted = y * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (y - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  float e = 1.0f / 5040.0f;
  e = e * r + 1.0f / 720.0f;
  e = e * r + 1.0f / 120.0f;
  e = e * r + 1.0f / 24.0f;
  e = e * r + 1.0f / 6.0f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  uint32_t power;
  uint32_t bits;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&bits, &e, sizeof bits);
  bits += power << 23;
  std::memcpy(&e, &bits, sizeof e);
  return x < -87.0f ? 0.0f : e;
}
inline double exp_of(double x) { return std::exp(x); }

// ---- row loops ----------------------------------------------------------------------------------

template <typename T>
inline void scale_row(T* x, int64_t n, T scale) {
  for (int64_t j = 0; j < n; ++j) x[j] *= scale;
}

template <typename T>
inline T largest_of(const T* x, int64_t n) {
  T lanes[kLanes];
  std::fill(lanes, lanes + kLanes, kNone<T>);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes)
    for (int64_t c = 0; c < kLanes; ++c) lanes[c] = x[j + c] > lanes[c] ? x[j + c] : lanes[c];
  for (int64_t j = whole; j < n; ++j) lanes[0] = x[j] > lanes[0] ? x[j] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

struct Sums {
  double mass = 0.0;
  double norm = 0.0;
  double squares = 0.0;
};

template <typename T>
inline double fold(const T* lanes) {
  double sum = 0.0;
  for (int64_t c = 0; c < kLanes; ++c) sum += static_cast<double>(lanes[c]);
  return sum;
}

// x holds logits, -inf where there is no negative; weights may be null.
template <typename T, bool kHard, bool kWeights>
inline Sums weigh(const T* x, int64_t n, T top, T beta, T weight_scale, T* weights) {
  alignas(64) T mass[kLanes] = {};
  alignas(64) T norm[kLanes] = {};
  alignas(64) T squares[kLanes] = {};
  const auto add = [&](int64_t j, int64_t c) {
    const T distance = x[j] - top;
    const T e = exp_of((T{1} + beta) * distance);
    mass[c] += e;
    squares[c] += e * e;
    if (kHard) norm[c] += exp_of(beta * distance);
    if (kWeights) weights[j] = e * weight_scale;
  };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes)
    for (int64_t c = 0; c < kLanes; ++c) add(j + c, c);
  for (int64_t j = whole; j < n; ++j) add(j, j - whole);
  return {fold(mass), fold(norm), fold(squares)};
}

DHCL_CLONES void scale(float* x, int64_t n, float factor) { scale_row(x, n, factor); }
DHCL_CLONES void scale(double* x, int64_t n, double factor) { scale_row(x, n, factor); }
DHCL_CLONES float largest(const float* x, int64_t n) { return largest_of(x, n); }
DHCL_CLONES double largest(const double* x, int64_t n) { return largest_of(x, n); }
DHCL_CLONES Sums weigh_plain(const float* x, int64_t n, float top, float scale, float* w) {
  return w == nullptr ? weigh<float, false, false>(x, n, top, 0.0f, scale, w)
                      : weigh<float, false, true>(x, n, top, 0.0f, scale, w);
}
DHCL_CLONES Sums weigh_hard(const float* x, int64_t n, float top, float beta, float scale,
                            float* w) {
  return w == nullptr ? weigh<float, true, false>(x, n, top, beta, scale, w)
                      : weigh<float, true, true>(x, n, top, beta, scale, w);
}
inline Sums weigh_plain(const double* x, int64_t n, double top, double scale, double* w) {
  return w == nullptr ? weigh<double, false, false>(x, n, top, 0.0, scale, w)
                      : weigh<double, false, true>(x, n, top, 0.0, scale, w);
}
inline Sums weigh_hard(const double* x, int64_t n, double top, double beta, double scale,
                       double* w) {
  return w == nullptr ? weigh<double, true, false>(x, n, top, beta, scale, w)
                      : weigh<double, true, true>(x, n, top, beta, scale, w);
}

// out[j] = alpha e^((1+beta) d) + gamma e^(beta d) with d = x[j] - top.
template <typename T>
inline void slope_row(T* x, int64_t n, T top, T beta, T alpha, T gamma) {
  if (gamma == T{0})
    for (int64_t j = 0; j < n; ++j) x[j] = alpha * exp_of((T{1} + beta) * (x[j] - top));
  else
    for (int64_t j = 0; j < n; ++j)
      x[j] = alpha * exp_of((T{1} + beta) * (x[j] - top)) + gamma * exp_of(beta * (x[j] - top));
}
DHCL_CLONES void slope(float* x, int64_t n, float top, float beta, float alpha, float gamma) {
  slope_row(x, n, top, beta, alpha, gamma);
}
DHCL_CLONES void slope(double* x, int64_t n, double top, double beta, double alpha, double gamma) {
  slope_row(x, n, top, beta, alpha, gamma);
}

// ---- roles --------------------------------------------------------------------------------------

// Calls found(j) for each positive of row i among n columns, in ascending order, and writes -inf to
// every column that is not negative.
template <typename T, typename Found>
void assign_roles(const ContrastiveRoles& roles, int64_t i, int64_t start, int64_t n, T* x,
                  const Found& found) {
  const int64_t label = roles.labels[i];
  const auto positive = [&](int64_t j) {
    return roles.proxy_labels != nullptr ? roles.proxy_labels[start + j] == label
                                         : start + j == label;
  };
  if (roles.proxy_labels != nullptr) {
    const int64_t* columns = roles.proxy_labels + start;
    for (int64_t j = 0; j < n; ++j)
      if (columns[j] == label) found(j);
  } else if (label >= start && label < start + n) {
    found(label - start);
  }
  if (roles.row_groups != nullptr && roles.row_groups[i] >= 0) {
    const int64_t group = roles.row_groups[i];
    const int64_t* columns = roles.column_groups + start;
    for (int64_t j = 0; j < n; ++j)
      if (columns[j] == group) x[j] = kNone<T>;
  }
  for (int64_t e = 0; e < roles.num_excluded; ++e) {
    const int64_t j = roles.excluded[i * roles.num_excluded + e] - start;
    if (j >= 0 && j < n) x[j] = kNone<T>;
  }
  if (roles.proxy_labels != nullptr) {
    for (int64_t j = 0; j < n; ++j)
      if (positive(j)) x[j] = kNone<T>;
  } else if (label >= start && label < start + n) {
    x[label - start] = kNone<T>;
  }
}

// ---- kernels ------------------------------------------------------------------------------------

void add_positive(double* state, double s) {
  if (s > state[kPositiveMax]) {
    state[kPositiveMass] = state[kPositiveMass] * std::exp(state[kPositiveMax] - s) + 1.0;
    state[kPositiveMax] = s;
  } else {
    state[kPositiveMass] += std::exp(s - state[kPositiveMax]);
  }
}

template <typename T>
void stream_row(const ContrastiveStreamParams& p, int64_t i) {
  const int64_t n = p.num_cols;
  T* x = static_cast<T*>(p.products) + i * n;
  T* weights = p.weights == nullptr ? nullptr : static_cast<T*>(p.weights) + i * n;
  double* state = p.state + i * kStateColumns;
  int64_t* counts = p.counts + i * kCountColumns;
  scale(x, n, static_cast<T>(p.scale));
  assign_roles(p.roles, i, p.start, n, x, [&](int64_t j) {
    const double s = static_cast<double>(x[j]);
    if (p.positives != nullptr && counts[kPositives] < p.num_slots)
      p.positives[i * p.num_slots + counts[kPositives]] = s;
    ++counts[kPositives];
    // A NaN must not vanish in a comparison.
    if (std::isnan(s)) state[kPositiveMass] = s;
    add_positive(state, s);
  });
  counts[kNegatives] += n - std::count(x, x + n, kNone<T>);

  const T top = largest(x, n);
  const double before = state[kMax];
  if (static_cast<double>(top) > before) {
    state[kMax] = static_cast<double>(top);
    counts[kHardest] = p.start + (std::find(x, x + n, top) - x);
  }
  const double shift = state[kMax] > kNone<double> ? state[kMax] : 0.0;
  const double factor = std::exp((1.0 + p.beta) * (before - shift));
  const Sums sums = p.beta > 0.0 ? weigh_hard(x, n, static_cast<T>(shift), static_cast<T>(p.beta),
                                              static_cast<T>(p.weight_scale), weights)
                                 : weigh_plain(x, n, static_cast<T>(shift),
                                               static_cast<T>(p.weight_scale), weights);
  state[kMass] = state[kMass] * factor + sums.mass;
  state[kSquares] = state[kSquares] * factor * factor + sums.squares;
  if (p.beta > 0.0)
    state[kNorm] = state[kNorm] * std::exp(p.beta * (before - shift)) + sums.norm;
  else
    state[kNorm] = static_cast<double>(counts[kNegatives]);
  if (p.factors != nullptr) static_cast<T*>(p.factors)[i] = static_cast<T>(factor);
}

template <typename T>
void slopes_row(const ContrastiveSlopesParams& p, int64_t i) {
  const int64_t n = p.num_cols;
  T* x = static_cast<T*>(p.products) + i * n;
  const double* row = p.rows + i * kRowColumns;
  const int64_t* counts = p.counts + i * kCountColumns;
  if (counts[kNegatives] == 0) {
    std::fill(x, x + n, T{0});
    return;
  }
  scale(x, n, static_cast<T>(p.scale));
  thread_local std::vector<std::pair<int64_t, T>> pulls;
  pulls.clear();
  assign_roles(p.roles, i, p.start, n, x, [&](int64_t j) {
    const double pull =
        contrastive_pull(static_cast<double>(x[j]), row, counts[kPositives], p.aggregation);
    pulls.emplace_back(j, static_cast<T>(-pull * p.grad[i]));
  });
  slope(x, n, static_cast<T>(p.state[i * kStateColumns + kMax]), static_cast<T>(p.beta),
        static_cast<T>(row[kAlpha] * p.grad[i]), static_cast<T>(row[kGamma] * p.grad[i]));
  for (const auto& [j, value] : pulls) x[j] = value;
}

void run_stream(const ContrastiveStreamParams& p) {
  parallel_tasks(p.num_rows, 4, p.num_rows * p.num_cols, [&](int64_t i) {
    p.dtype == ContrastiveDtype::kFloat64 ? stream_row<double>(p, i) : stream_row<float>(p, i);
  });
}

void run_finish(const ContrastiveFinishParams& p) {
  for (int64_t i = 0; i < p.num_rows; ++i) contrastive_finish_row(p, i);
}

void run_slopes(const ContrastiveSlopesParams& p) {
  parallel_tasks(p.num_rows, 4, p.num_rows * p.num_cols, [&](int64_t i) {
    p.dtype == ContrastiveDtype::kFloat64 ? slopes_row<double>(p, i) : slopes_row<float>(p, i);
  });
}

// ---- torch ops ----------------------------------------------------------------------------------

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

template <typename Run>
void stream_glue(const Tensor& state, const Tensor& counts, const MaybeTensor& positives,
                 const Tensor& products, const MaybeTensor& weights, const MaybeTensor& factors,
                 const Tensor& labels, const MaybeTensor& proxy_labels,
                 const MaybeTensor& row_groups, const MaybeTensor& column_groups,
                 const MaybeTensor& excluded, int64_t start, double scale, double beta,
                 double weight_scale, const Run& run) {
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
  run(p);
}

template <typename Run>
std::tuple<Tensor, Tensor> finish_glue(const Tensor& state, const Tensor& counts,
                                       const MaybeTensor& positives, const Tensor& kappa,
                                       bool prior, int64_t aggregation, double temperature,
                                       double beta, bool through, const Run& run) {
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
  run(p);
  return {loss, rows};
}

template <typename Run>
void slopes_glue(const Tensor& products, const Tensor& rows, const Tensor& state,
                 const Tensor& counts, const Tensor& grad, const Tensor& labels,
                 const MaybeTensor& proxy_labels, const MaybeTensor& row_groups,
                 const MaybeTensor& column_groups, const MaybeTensor& excluded, int64_t start,
                 double scale, double beta, int64_t aggregation, const Run& run) {
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
  run(p);
}

void contrastive_stream_cpu(const Tensor& state, const Tensor& counts, const MaybeTensor& positives,
                            const Tensor& products, const MaybeTensor& weights,
                            const MaybeTensor& factors, const Tensor& labels,
                            const MaybeTensor& proxy_labels, const MaybeTensor& row_groups,
                            const MaybeTensor& column_groups, const MaybeTensor& excluded,
                            int64_t start, double scale, double beta, double weight_scale) {
  check(!weights || weights->scalar_type() == products.scalar_type(),
        "contrastive_stream_: on the CPU weights must have the products' dtype");
  stream_glue(state, counts, positives, products, weights, factors, labels, proxy_labels,
              row_groups, column_groups, excluded, start, scale, beta, weight_scale, run_stream);
}

std::tuple<Tensor, Tensor> contrastive_finish_cpu(const Tensor& state, const Tensor& counts,
                                                  const MaybeTensor& positives, const Tensor& kappa,
                                                  bool prior, int64_t aggregation,
                                                  double temperature, double beta, bool through) {
  return finish_glue(state, counts, positives, kappa, prior, aggregation, temperature, beta,
                     through, run_finish);
}

void contrastive_slopes_cpu(const Tensor& products, const Tensor& rows, const Tensor& state,
                            const Tensor& counts, const Tensor& grad, const Tensor& labels,
                            const MaybeTensor& proxy_labels, const MaybeTensor& row_groups,
                            const MaybeTensor& column_groups, const MaybeTensor& excluded,
                            int64_t start, double scale, double beta, int64_t aggregation) {
  slopes_glue(products, rows, state, counts, grad, labels, proxy_labels, row_groups, column_groups,
              excluded, start, scale, beta, aggregation, run_slopes);
}

#ifdef DHCL_CUDA
// Runs a launcher on the tensor's device and stream.
template <typename Params>
auto on_device(const Tensor& t, void (*launch)(const Params&, void*)) {
  return [&t, launch](const Params& p) {
    const CudaScope scope(t);
    launch(p, scope.stream());
    scope.check_launch();
  };
}

void contrastive_stream_cuda(const Tensor& state, const Tensor& counts,
                             const MaybeTensor& positives, const Tensor& products,
                             const MaybeTensor& weights, const MaybeTensor& factors,
                             const Tensor& labels, const MaybeTensor& proxy_labels,
                             const MaybeTensor& row_groups, const MaybeTensor& column_groups,
                             const MaybeTensor& excluded, int64_t start, double scale, double beta,
                             double weight_scale) {
  stream_glue(state, counts, positives, products, weights, factors, labels, proxy_labels,
              row_groups, column_groups, excluded, start, scale, beta, weight_scale,
              on_device(products, launch_contrastive_stream));
}

std::tuple<Tensor, Tensor> contrastive_finish_cuda(const Tensor& state, const Tensor& counts,
                                                   const MaybeTensor& positives,
                                                   const Tensor& kappa, bool prior,
                                                   int64_t aggregation, double temperature,
                                                   double beta, bool through) {
  return finish_glue(state, counts, positives, kappa, prior, aggregation, temperature, beta,
                     through, on_device(state, launch_contrastive_finish));
}

void contrastive_slopes_cuda(const Tensor& products, const Tensor& rows, const Tensor& state,
                             const Tensor& counts, const Tensor& grad, const Tensor& labels,
                             const MaybeTensor& proxy_labels, const MaybeTensor& row_groups,
                             const MaybeTensor& column_groups, const MaybeTensor& excluded,
                             int64_t start, double scale, double beta, int64_t aggregation) {
  slopes_glue(products, rows, state, counts, grad, labels, proxy_labels, row_groups, column_groups,
              excluded, start, scale, beta, aggregation,
              on_device(products, launch_contrastive_slopes));
}
#endif

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) {
  m.impl("contrastive_stream_", TORCH_BOX(&dhcl::contrastive_stream_cpu));
  m.impl("contrastive_finish", TORCH_BOX(&dhcl::contrastive_finish_cpu));
  m.impl("contrastive_slopes_", TORCH_BOX(&dhcl::contrastive_slopes_cpu));
}

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) {
  m.impl("contrastive_stream_", TORCH_BOX(&dhcl::contrastive_stream_cuda));
  m.impl("contrastive_finish", TORCH_BOX(&dhcl::contrastive_finish_cuda));
  m.impl("contrastive_slopes_", TORCH_BOX(&dhcl::contrastive_slopes_cuda));
}
#endif
