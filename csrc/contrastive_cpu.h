// The kernels of the contrastive loss on the CPU: what contrastive.h says, a row at a time. Only
// contrastive.cpp includes this.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "common/cpu.h"
#include "contrastive.h"

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
void weigh_row(const ContrastiveWeighParams& p, int64_t i) {
  const char* op = "debiased_contrastive_loss";
  const ContrastiveListed& listed = p.listed;
  T* x = static_cast<T*>(p.products) + i * p.num_cols;
  const int64_t label = p.roles.labels[i];
  const auto add = [&](int64_t column, float log_weight) {
    const int64_t j = column - p.start;
    if (j < 0 || j >= p.num_cols) return;
    if ((p.roles.proxy_labels != nullptr ? p.roles.proxy_labels[column] : column) == label) return;
    x[j] += contrastive_shift<T>(p, i, j, log_weight);
  };
  const int64_t list = listed.rows[i];
  check(list >= 0 && list < listed.num_lists, op, ": weights.rows must be in [0, ",
        listed.num_lists, ") (got ", list, " at batch position ", i, ")");
  const int64_t begin = listed.offsets[list], end = listed.offsets[list + 1];
  check(0 <= begin && begin <= end && end <= listed.num_entries, op,
        ": weights.offsets must ascend up to the number of entries (got ", begin, " and ", end,
        ")");
  for (int64_t e = begin; e < end; ++e) {
    const int64_t entry = listed.entries[e];
    if (listed.members == nullptr) {
      add(entry, listed.logs[e]);
      continue;
    }
    check(entry >= 0 && entry < listed.num_classes, op, ": weights.entries must be in [0, ",
          listed.num_classes, ") (got ", entry, ")");
    const int64_t first = listed.member_offsets[entry], last = listed.member_offsets[entry + 1];
    check(0 <= first && first <= last && last <= listed.num_members, op,
          ": weights.member_offsets must ascend up to the number of members (got ", first, " and ",
          last, ")");
    for (int64_t m = first; m < last; ++m) add(listed.members[m], listed.logs[e]);
  }
}

void run_weigh(const ContrastiveWeighParams& p) {
  parallel_tasks(p.num_rows, 4, p.num_rows * p.num_cols, [&](int64_t i) {
    p.dtype == ContrastiveDtype::kFloat64 ? weigh_row<double>(p, i) : weigh_row<float>(p, i);
  });
}

template <typename T>
void stream_row(const ContrastiveStreamParams& p, int64_t i) {
  const int64_t n = p.num_cols;
  T* x = static_cast<T*>(p.products) + i * n;
  T* weights = p.weights == nullptr ? nullptr : static_cast<T*>(p.weights) + i * n;
  double* state = p.state + i * kStateColumns;
  int64_t* counts = p.counts + i * kCountColumns;
  if (p.fresh) {
    std::fill(state, state + kStateColumns, 0.0);
    state[kMax] = state[kPositiveMax] = kNone<double>;
    std::fill(counts, counts + kCountColumns, 0);
    counts[kHardest] = -1;
  }
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

template <typename T>
inline void fold_row(T* sums, const T* part, T factor, int64_t d) {
  if (part == nullptr)
    for (int64_t j = 0; j < d; ++j) sums[j] *= factor;
  else
    for (int64_t j = 0; j < d; ++j) sums[j] = part[j] + sums[j] * factor;
}

// The sum's rounding and then one multiply-add, as torch's addcmul does it on most processors.
template <typename T, typename P>
inline void gradient_row(T* g, const P* proxy, T alpha, T pull, int64_t d) {
  for (int64_t j = 0; j < d; ++j) g[j] = std::fma(static_cast<T>(proxy[j]), pull, g[j] * alpha);
}
DHCL_CLONES void gradient_of(float* g, const float* proxy, float alpha, float pull, int64_t d) {
  gradient_row(g, proxy, alpha, pull, d);
}
template <typename T, typename P>
void gradient_of(T* g, const P* proxy, T alpha, T pull, int64_t d) {
  gradient_row(g, proxy, alpha, pull, d);
}

template <typename T>
void fold_rows(const ContrastiveFoldParams& p) {
  T* sums = static_cast<T*>(p.sums);
  const T* part = static_cast<const T*>(p.part);
  const T* factors = static_cast<const T*>(p.factors);
  parallel_tasks(p.num_rows, 4, p.num_rows * p.dim, [&](int64_t i) {
    fold_row(sums + i * p.dim, part == nullptr ? nullptr : part + i * p.dim, factors[i], p.dim);
  });
}

template <typename T, typename P>
void gradient_rows(const ContrastiveGradientParams& p) {
  T* gradient = static_cast<T*>(p.gradient);
  const P* proxies = static_cast<const P*>(p.proxies);
  parallel_tasks(p.num_rows, 4, p.num_rows * p.dim, [&](int64_t i) {
    const double* row = p.rows + i * kRowColumns;
    const int64_t label = p.labels == nullptr ? i : p.labels[i];
    gradient_of(gradient + i * p.dim, proxies + label * p.dim, static_cast<T>(row[kAlpha] / p.unit),
                static_cast<T>(row[kSlope] / -p.temperature), p.dim);
  });
}

template <typename T>
void gradient_rows_for(const ContrastiveGradientParams& p) {
  switch (p.proxy_dtype) {
    case ContrastiveDtype::kFloat16:
      return gradient_rows<T, Half>(p);
    case ContrastiveDtype::kBFloat16:
      return gradient_rows<T, BFloat16>(p);
    case ContrastiveDtype::kFloat64:
      return gradient_rows<T, double>(p);
    default:
      return gradient_rows<T, float>(p);
  }
}

void run_fold(const ContrastiveFoldParams& p) {
  p.dtype == ContrastiveDtype::kFloat64 ? fold_rows<double>(p) : fold_rows<float>(p);
}

void run_gradient(const ContrastiveGradientParams& p) {
  p.dtype == ContrastiveDtype::kFloat64 ? gradient_rows_for<double>(p)
                                        : gradient_rows_for<float>(p);
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

}  // namespace
}  // namespace dhcl
