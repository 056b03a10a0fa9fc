// The loss's sums over chunks of proxies, its terms and its slopes against fp64, a row at a time.
// clang-format off: the harness comes first
#include "harness.h"
#include "contrastive.cpp"
// clang-format on

namespace {

using dhcl::Aggregation;
using dhcl::ContrastiveDtype;

// Similarities of rows to proxies, and which proxies are what to a row.
struct Batch {
  int64_t rows, columns;
  double scale, beta;
  bool finite = true;
  std::vector<float> products;
  std::vector<int64_t> labels, proxy_labels, row_groups, column_groups, excluded;
  dhcl::ContrastiveRoles roles{};

  explicit Batch(FuzzedDataProvider& in) {
    // More rows than a thread takes at once, where there are threads.
    rows = in.ConsumeIntegralInRange<int64_t>(0, dhcl::kParallelElements == 0 ? 20 : 5);
    columns = in.ConsumeIntegralInRange<int64_t>(1, 90);
    products = harness::some_floats(in, rows * columns);
    const bool wild = in.ConsumeProbability<float>() < 0.2f;
    for (float& x : products)
      if (!wild && !(std::abs(x) <= 1e6f)) x = 0.5f;
    scale = std::ldexp(1.0, in.ConsumeIntegralInRange<int>(-2, 10));
    beta = in.ConsumeBool() ? in.ConsumeIntegralInRange<int>(0, 8) / 4.0 : 0.0;
    for (const float x : products) finite &= std::isfinite(x * static_cast<float>(scale));
    labels.resize(rows);
    for (int64_t& label : labels) label = in.ConsumeIntegralInRange<int64_t>(0, columns - 1);
    roles.labels = labels.data();
    if (in.ConsumeBool()) roles.proxy_labels = some_ids(in, proxy_labels, columns, 0);
    if (in.ConsumeBool()) {
      roles.row_groups = some_ids(in, row_groups, rows, -1);
      roles.column_groups = some_ids(in, column_groups, columns, -1);
    }
    roles.num_excluded = in.ConsumeIntegralInRange<int64_t>(0, 2);
    excluded.resize(rows * roles.num_excluded);
    for (int64_t& j : excluded) j = in.ConsumeIntegralInRange<int64_t>(-1, columns);
    roles.excluded = roles.num_excluded == 0 ? nullptr : excluded.data();
  }

  static const int64_t* some_ids(FuzzedDataProvider& in, std::vector<int64_t>& ids, int64_t count,
                                 int64_t least) {
    uint32_t state = in.ConsumeIntegral<uint32_t>();
    ids.resize(count);
    for (int64_t& id : ids) id = least + ((state = state * 1664525u + 1013904223u) >> 16) % 4;
    return ids.data();
  }

  bool positive(int64_t i, int64_t j) const {
    return proxy_labels.empty() ? labels[i] == j : proxy_labels[j] == labels[i];
  }
  bool negative(int64_t i, int64_t j) const {
    const auto* const list = excluded.data() + i * roles.num_excluded;
    const bool listed = std::find(list, list + roles.num_excluded, j) != list + roles.num_excluded;
    const bool grouped =
        !row_groups.empty() && row_groups[i] >= 0 && row_groups[i] == column_groups[j];
    return !positive(i, j) && !listed && !grouped;
  }
  // As the code rounds it.
  template <typename T>
  double logit(int64_t i, int64_t j) const {
    return static_cast<T>(products[i * columns + j]) * static_cast<T>(scale);
  }
};

bool near(double got, double wanted, double scale = 0.0) {
  return std::abs(got - wanted) <= 1e-4 * std::max(std::abs(wanted), scale) + 1e-30;
}

template <typename T>
class Loss {
 public:
  Loss(FuzzedDataProvider& in, const Batch& batch)
      : batch_(batch),
        dtype_(sizeof(T) == 8 ? ContrastiveDtype::kFloat64 : ContrastiveDtype::kFloat32),
        slots_(in.ConsumeIntegralInRange<int64_t>(0, batch.columns)),
        state_(batch.rows * dhcl::kStateColumns, 7.0),
        positives_(batch.rows * slots_, -7.0),
        counts_(batch.rows * dhcl::kCountColumns, 7) {}

  // The proxies come in chunks.
  void stream(FuzzedDataProvider& in) {
    for (int64_t start = 0; start < batch_.columns;) {
      const int64_t count = in.ConsumeIntegralInRange<int64_t>(1, batch_.columns - start);
      std::vector<T> chunk = products(start, count), weights(chunk.size()), factors(batch_.rows);
      dhcl::ContrastiveStreamParams p{};
      p.state = state_.data();
      p.counts = counts_.data();
      p.positives = positives_.data();
      p.products = chunk.data();
      p.weights = in.ConsumeBool() ? weights.data() : nullptr;
      p.factors = in.ConsumeBool() ? factors.data() : nullptr;
      p.roles = batch_.roles;
      p.num_rows = batch_.rows;
      p.num_cols = count;
      p.num_slots = slots_;
      p.start = start;
      p.scale = batch_.scale;
      p.beta = batch_.beta;
      p.weight_scale = 1.0;
      p.fresh = start == 0;
      p.dtype = p.weight_dtype = dtype_;
      dhcl::run_stream(p);
      start += count;
    }
    for (int64_t i = 0; i < batch_.rows && batch_.finite; ++i) check_sums(i);
  }

  void finish_and_slope(FuzzedDataProvider& in) {
    std::vector<double> loss(batch_.rows), kappa(batch_.rows), grad(batch_.rows);
    rows_.assign(batch_.rows * dhcl::kRowColumns, 7.0);
    for (double& k : kappa) k = in.ConsumeIntegralInRange<int>(0, 15) / 16.0;
    for (double& g : grad) g = in.ConsumeIntegralInRange<int>(-2, 2);
    dhcl::ContrastiveFinishParams p{};
    p.loss = loss.data();
    p.rows = rows_.data();
    p.state = state_.data();
    p.counts = counts_.data();
    p.positives = positives_.data();
    p.kappa = kappa.data();
    p.num_rows = batch_.rows;
    p.num_slots = slots_;
    p.temperature = 1.0 / batch_.scale;
    p.beta = batch_.beta;
    // Of each positive only where all have a place, as the glue sees to.
    bool room = true;
    for (int64_t i = 0; i < batch_.rows; ++i) room &= count(i, dhcl::kPositives) <= slots_;
    p.aggregation = static_cast<Aggregation>(in.ConsumeIntegralInRange<int>(room ? 0 : 1, 2));
    p.prior = true;
    p.through = in.ConsumeBool();
    dhcl::run_finish(p);
    for (int64_t i = 0; i < batch_.rows && batch_.finite; ++i)
      if (count(i, dhcl::kPositives) > 0)
        harness::require(loss[i] >= 0.0 && std::isfinite(loss[i]), "a loss of what is finite");
    slopes(grad, p.aggregation);
  }

 private:
  int64_t count(int64_t i, int column) const { return counts_[i * dhcl::kCountColumns + column]; }
  double state(int64_t i, int column) const { return state_[i * dhcl::kStateColumns + column]; }

  std::vector<T> products(int64_t start, int64_t count) const {
    std::vector<T> chunk;
    for (int64_t i = 0; i < batch_.rows; ++i)
      for (int64_t j = start; j < start + count; ++j)
        chunk.push_back(static_cast<T>(batch_.products[i * batch_.columns + j]));
    return chunk;
  }

  void check_sums(int64_t i) const {
    double top = -HUGE_VAL, mass = 0.0, norm = 0.0, positive = 0.0;
    int64_t negatives = 0, positives = 0, hardest = -1;
    for (int64_t j = 0; j < batch_.columns; ++j) {
      const double s = batch_.logit<T>(i, j);
      if (batch_.negative(i, j) && (++negatives, s > top)) top = s, hardest = j;
      if (!batch_.positive(i, j)) continue;
      if (positives < slots_)
        harness::require(positives_[i * slots_ + positives] == s, "the positives' logits in turn");
      ++positives;
    }
    for (int64_t j = 0; j < batch_.columns; ++j) {
      const double s = batch_.logit<T>(i, j);
      if (batch_.positive(i, j)) positive += std::exp(s - state(i, dhcl::kPositiveMax));
      if (!batch_.negative(i, j)) continue;
      mass += std::exp((1.0 + batch_.beta) * (s - top));
      norm += std::exp(batch_.beta * (s - top));
    }
    harness::require(count(i, dhcl::kNegatives) == negatives &&
                         count(i, dhcl::kPositives) == positives &&
                         count(i, dhcl::kHardest) == hardest,
                     "positives and negatives are counted, and the hardest is the first");
    harness::require(near(state(i, dhcl::kPositiveMass), positive), "the positives' mass");
    harness::require(state(i, dhcl::kMax) == top, "the largest logit of a negative");
    harness::require(near(state(i, dhcl::kMass), mass) && near(state(i, dhcl::kNorm), norm),
                     "the negatives' mass and norm");
  }

  void slopes(const std::vector<double>& grad, Aggregation aggregation) {
    std::vector<T> x = products(0, batch_.columns);
    dhcl::ContrastiveSlopesParams p{};
    p.products = x.data();
    p.rows = rows_.data();
    p.state = state_.data();
    p.counts = counts_.data();
    p.grad = grad.data();
    p.roles = batch_.roles;
    p.num_rows = batch_.rows;
    p.num_cols = batch_.columns;
    p.scale = batch_.scale;
    p.beta = batch_.beta;
    p.aggregation = aggregation;
    p.dtype = dtype_;
    dhcl::run_slopes(p);
    for (int64_t i = 0; i < batch_.rows && batch_.finite; ++i) {
      // The glue refuses rows without a positive.
      if (count(i, dhcl::kPositives) == 0) continue;
      const double* const row = rows_.data() + i * dhcl::kRowColumns;
      for (int64_t j = 0; j < batch_.columns; ++j) {
        const double s = batch_.logit<T>(i, j), d = s - state(i, dhcl::kMax);
        const double a = row[dhcl::kAlpha] * std::exp((1.0 + batch_.beta) * d);
        const double g = row[dhcl::kGamma] * std::exp(batch_.beta * d);
        double wanted = 0.0;
        if (count(i, dhcl::kNegatives) > 0 && batch_.positive(i, j))
          wanted = -dhcl::contrastive_pull(s, row, count(i, dhcl::kPositives), aggregation);
        else if (count(i, dhcl::kNegatives) > 0 && batch_.negative(i, j))
          wanted = a + g;
        const double large = std::max(std::abs(a), std::abs(g));
        const double got = static_cast<double>(x[i * batch_.columns + j]);
        // Below e^-87 fp32 has no normal numbers.
        harness::require(near(got, wanted * grad[i], large * std::abs(grad[i]) + 1e-30),
                         "a derivative of the loss");
      }
    }
  }

  const Batch& batch_;
  const ContrastiveDtype dtype_;
  const int64_t slots_;
  std::vector<double> state_, positives_, rows_;
  std::vector<int64_t> counts_;
};

template <typename T>
void loss(FuzzedDataProvider& in) {
  const Batch batch(in);
  Loss<T> loss(in, batch);
  loss.stream(in);
  loss.finish_and_slope(in);
}

// What was read out shrinks and grows, and becomes the features' gradient.
template <typename T, typename P>
void gradient(FuzzedDataProvider& in, ContrastiveDtype dtype, ContrastiveDtype proxy_dtype) {
  const int64_t rows = in.ConsumeIntegralInRange<int64_t>(0, 20);
  const int64_t proxies = in.ConsumeIntegralInRange<int64_t>(1, 6);
  const int64_t dim = in.ConsumeIntegralInRange<int64_t>(0, 70);
  const auto numbers = [&](int64_t size) {
    const std::vector<float> x = harness::some_floats(in, size);
    return std::vector<T>(x.begin(), x.end());
  };
  std::vector<T> sums = numbers(rows * dim), wanted = sums;
  const std::vector<T> part = numbers(rows * dim), factors = numbers(rows);
  const std::vector<float> few = harness::some_floats(in, std::max(proxies, rows) * dim);
  const std::vector<P> columns(few.begin(), few.end());
  std::vector<int64_t> labels(rows);
  for (int64_t& label : labels) label = in.ConsumeIntegralInRange<int64_t>(0, proxies - 1);
  const bool added = in.ConsumeBool(), own = in.ConsumeBool();
  std::vector<double> terms(rows * dhcl::kRowColumns);
  for (double& x : terms) x = in.ConsumeIntegralInRange<int>(-3, 3) / 4.0;
  dhcl::run_fold({sums.data(), added ? part.data() : nullptr, factors.data(), rows, dim, dtype});
  dhcl::ContrastiveGradientParams p{};
  p.gradient = sums.data();
  p.rows = terms.data();
  p.proxies = columns.data();
  p.labels = own ? nullptr : labels.data();
  p.num_rows = rows;
  p.num_proxies = std::max(proxies, rows);
  p.dim = dim;
  p.unit = 0.25;
  p.temperature = 0.5;
  p.dtype = dtype;
  p.proxy_dtype = proxy_dtype;
  dhcl::run_gradient(p);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < dim; ++j) {
      T& x = wanted[i * dim + j];
      x = x * factors[i];
      if (added) x = part[i * dim + j] + x;
      const double* const row = terms.data() + i * dhcl::kRowColumns;
      const T proxy = static_cast<T>(columns[(own ? i : labels[i]) * dim + j]);
      x = std::fma(proxy, static_cast<T>(row[dhcl::kSlope] * -2.0),
                   x * static_cast<T>(row[dhcl::kAlpha] * 4.0));
    }
  harness::require(harness::same(sums, wanted), "the gradient of what was read out");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider in(data, size);
  switch (in.ConsumeIntegralInRange<int>(0, 7)) {
    case 0:
      gradient<float, float>(in, ContrastiveDtype::kFloat32, ContrastiveDtype::kFloat32);
      break;
    case 1:
      gradient<float, dhcl::Half>(in, ContrastiveDtype::kFloat32, ContrastiveDtype::kFloat16);
      break;
    case 2:
      gradient<double, double>(in, ContrastiveDtype::kFloat64, ContrastiveDtype::kFloat64);
      break;
    case 3:
      loss<double>(in);
      break;
    default:
      loss<float>(in);
  }
  return 0;
}
