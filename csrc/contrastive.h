// The debiased, hardness-weighted contrastive loss: parameters and launchers of the kernels.
//
// For features f and proxies c, logits are s = f.c / temperature. A row's loss needs, over its
// negatives and with m the largest of their logits,
//
//     mass = sum e^((1+beta)(s-m)),   norm = sum e^(beta(s-m)),
//
// and the logit r of its positives. Proxies come in chunks: a matrix product gives the chunk's
// similarities, `stream` adds them to the rows' state and turns them into weights e^((1+beta)(s-m))
// for the product that reads the gradient out; `finish` makes the loss of the state; `slopes`, for
// a second pass, turns similarities into the derivatives of the loss. When m grows the sums shrink
// by a factor, which is returned so that what was read out can follow: `fold` does that, and
// `gradient` makes the features' gradient of what was read out.
//
// Logits are fp32 (fp64 for fp64 operands), a row's state is fp64. Sums within a chunk have a fixed
// order per device, so products have the same results twice, for any number of threads. CPU and
// CUDA differ by rounding: they take exponentials in different ways.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DHCL_HOST_DEVICE __host__ __device__
#else
#define DHCL_HOST_DEVICE
#endif

namespace dhcl {

enum class ContrastiveDtype : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };
enum class Aggregation : int32_t { kEach, kSum, kMean };

// Columns of the state [B, 6], the counts [B, 3] and the coefficients [B, 9] of a row.
enum StateColumn { kMax, kMass, kNorm, kSquares, kPositiveMax, kPositiveMass, kStateColumns };
enum CountColumn { kNegatives, kPositives, kHardest, kCountColumns };
enum RowColumn {
  kAlpha,     // weight of e^((1+beta)(s-m)) in the slope of a negative
  kGamma,     // weight of e^(beta(s-m)) in it
  kSlope,     // -(derivative with respect to r)
  kPositive,  // log of the sum of e^s over the positives
  kLogMass,   // log R
  kLogKappa,
  kLogKeep,  // log(1 - kappa / M)
  kFloor,    // log M - 1 / temperature
  kClamped,
  kRowColumns
};

// Which proxies are positive to a row, which are negative, and which are neither. A row's positive
// is column labels[i], or with proxy_labels every column of that label. Equal groups >= 0 and
// listed columns are neither, unless they are positive.
struct ContrastiveRoles {
  const int64_t* labels;         // [B]
  const int64_t* proxy_labels;   // [>= start + n] or null
  const int64_t* row_groups;     // [B] or null
  const int64_t* column_groups;  // [>= start + n] or null
  const int64_t* excluded;       // [B, E] or null, padded with -1
  int64_t num_excluded;          // E
};

// fp32 rows as sums of fp16 numbers, of which products are made where fp32 ones would be slow. Row
// i is units[i] * (high + low): units[i] is the power of two that brings its largest element into
// [2^13, 2^14), high is what fp16 makes of it and low, in fp16, of what that left. A product's
// terms take one piece each, which lie side by side, so that one matrix product sums them all. The
// bound is in dhcl_ops/_products.py, which is the same in PyTorch.
struct ContrastiveSplitParams {
  void* operand;           // [n, t * d] fp16 <- the pieces that the terms take
  float* units;            // [n] <- the rows' units
  const void* rows;        // [n, d]
  int64_t num_rows;        // n
  int64_t dim;             // d
  int32_t terms;           // t
  uint32_t low_terms;      // bit i: term i takes the low piece
  ContrastiveDtype dtype;  // of rows: any but double
};

// Negatives that count by a weight w: log w / scale is added to their products, which come to log w
// in the logit, before they are streamed. Row i has list rows[i] of the CSR lists; of a list each
// column occurs once at most. With members an entry is a class and its columns are members[j], j
// from member_offsets[k] up to member_offsets[k + 1].
struct ContrastiveListed {
  const int64_t* rows;            // [B]; null: there are no lists
  const int64_t* offsets;         // [R + 1]
  const int64_t* entries;         // [E] columns or classes
  const float* logs;              // [E] log w, -inf for a column that is no negative
  const int64_t* members;         // [N] or null
  const int64_t* member_offsets;  // [K + 1] or null
  int64_t num_lists;              // R
  int64_t num_entries;            // E
  int64_t num_members;            // N
  int64_t num_classes;            // K
};

struct ContrastiveWeighParams {
  void* products;  // [B, n] similarities; a row's listed columns are changed, but for its positives
  ContrastiveRoles roles;
  ContrastiveListed listed;
  const float* row_units;     // as of ContrastiveStreamParams
  const float* column_units;  // [n]
  int64_t num_rows;           // B
  int64_t num_cols;           // n
  int64_t start;              // column of the first product
  double scale;
  ContrastiveDtype dtype;  // of products: float or double
};

struct ContrastiveStreamParams {
  double* state;      // [B, 6]
  int64_t* counts;    // [B, 3]
  double* positives;  // [B, P] or null: the positives' logits, in ascending order of columns
  void* products;     // [B, n] similarities, float or double; overwritten
  void* weights;      // [B, n] or null <- weight_scale e^((1+beta)(s-m)), 0 if not negative
  void* factors;      // [B] or null <- e^((1+beta)(m_before - m)), in the products' dtype
  // Of products made of pieces, or null. Weight j is then taken in the largest column unit over its
  // own, since the proxies that it will be multiplied with are in units of their own.
  const float* row_units;     // [B] products are in row_units[i] * column_units[j]
  const float* column_units;  // [n]
  void* low_weights;          // [B, n] or null <- what rounding took from the weights
  float* largest_units;       // [B] or null <- the largest column unit
  ContrastiveRoles roles;
  int64_t num_rows;   // B
  int64_t num_cols;   // n
  int64_t num_slots;  // P
  int64_t start;      // column of the first product
  int64_t pitch;  // elements from row to row of products and weights; 0: n. Weights past n are 0.
  double scale;   // s = scale * product
  double beta;
  double weight_scale;
  bool fresh;                     // the first chunk: state and counts begin here
  ContrastiveDtype dtype;         // of products
  ContrastiveDtype weight_dtype;  // of weights
};

struct ContrastiveFoldParams {
  void* sums;              // [B, d] what was read out <- factors * sums (+ part)
  const void* part;        // [B, d] or null
  const void* factors;     // [B]
  int64_t num_rows;        // B
  int64_t dim;             // d
  ContrastiveDtype dtype;  // of all three: float or double
};

// The same where the chunk was read out in pieces: part by the weights' high piece, with each of
// the proxies' pieces, and low_part by their low one.
struct ContrastiveFoldPiecesParams {
  float* sums;            // [B, d] <- factors * sums + units * (part + low_part)
  const float* part;      // [B, pieces * d]
  const float* low_part;  // [B, d]
  const float* factors;   // [B]
  const float* units;     // [B]
  int64_t num_rows;       // B
  int64_t dim;            // d
  int32_t pieces;         // 1 or 2
  bool fresh;             // the first chunk: sums begin here
};

struct ContrastiveGradientParams {
  void* gradient;         // [B, d] in: unit * sum e^((1+beta)(s-m)) c, out: d loss[i] / d f[i]
  const double* rows;     // [B, 9]
  const void* proxies;    // [K, d]
  const int64_t* labels;  // [B] column of the positive; null: row i of proxies is that of row i
  int64_t num_rows;       // B
  int64_t num_proxies;    // K
  int64_t dim;            // d
  double unit;
  double temperature;
  ContrastiveDtype dtype;        // of gradient: float or double
  ContrastiveDtype proxy_dtype;  // any
};

struct ContrastiveFinishParams {
  double* loss;             // [B]
  double* rows;             // [B, 9]
  const double* state;      // [B, 6]
  const int64_t* counts;    // [B, 3]
  const double* positives;  // [B, P], for kEach
  const double* kappa;      // [B]; with prior it is kappa / M
  int64_t num_rows;         // B
  int64_t num_slots;        // P
  double temperature;
  double beta;
  Aggregation aggregation;
  bool prior;
  bool through;
};

struct ContrastiveSlopesParams {
  void* products;         // [B, n] in: similarities, out: grad[i] * d loss[i] / d s
  const double* rows;     // [B, 9]
  const double* state;    // [B, 6]
  const int64_t* counts;  // [B, 3]
  const double* grad;     // [B]
  ContrastiveRoles roles;
  int64_t num_rows;  // B
  int64_t num_cols;  // n
  int64_t start;
  double scale;
  double beta;
  Aggregation aggregation;
  ContrastiveDtype dtype;  // of products
};

// What is added to the product of column j (of the chunk) in row i.
template <typename T>
DHCL_HOST_DEVICE inline T contrastive_shift(const ContrastiveWeighParams& p, int64_t i, int64_t j,
                                            float log_weight) {
  double scale = p.scale;
  if (p.column_units != nullptr) scale *= static_cast<double>(p.row_units[i]) * p.column_units[j];
  return static_cast<T>(static_cast<double>(log_weight) / scale);
}

// The loss for one positive logit r, the scale g of the negatives' slopes, and -(d loss / d r).
struct ContrastiveTerm {
  double loss;
  double scale;
  double slope;
  double clamped;
};

DHCL_HOST_DEVICE inline ContrastiveTerm contrastive_term(double r, const double* row) {
  const double gap = row[kLogKappa] + r - row[kLogMass];
  const double debiased = gap >= 0.0 ? -HUGE_VAL : row[kLogMass] + log(-expm1(gap)) - row[kLogKeep];
  const bool clamped = debiased <= row[kFloor];
  const double x = (clamped ? row[kFloor] : debiased) - r;
  ContrastiveTerm term;
  term.loss = x > 0.0 ? x + log1p(exp(-x)) : log1p(exp(x));
  term.scale = clamped ? 0.0 : exp(row[kLogMass] - row[kLogKeep] - r - term.loss);
  term.slope = clamped ? 1.0 / (1.0 + exp(-x)) : term.scale;
  term.clamped = clamped ? 1.0 : 0.0;
  return term;
}

// Row i of `finish`. kappa must be smaller than the number of negatives.
DHCL_HOST_DEVICE inline void contrastive_finish_row(const ContrastiveFinishParams& p, int64_t i) {
  const double* state = p.state + i * kStateColumns;
  const int64_t* counts = p.counts + i * kCountColumns;
  double* row = p.rows + i * kRowColumns;
  for (int c = 0; c < kRowColumns; ++c) row[c] = 0.0;
  p.loss[i] = 0.0;
  if (counts[kNegatives] == 0) return;
  const double negatives = static_cast<double>(counts[kNegatives]);
  const double kappa = p.prior ? p.kappa[i] * negatives : p.kappa[i];
  row[kLogMass] = log(negatives) + state[kMax] + log(state[kMass] / state[kNorm]);
  row[kLogKappa] = log(kappa);
  row[kLogKeep] = log1p(-kappa / negatives);
  row[kFloor] = log(negatives) - 1.0 / p.temperature;
  row[kPositive] = state[kPositiveMax] + log(state[kPositiveMass]);
  ContrastiveTerm sum{0.0, 0.0, 0.0, 0.0};
  if (p.aggregation == Aggregation::kEach) {
    const double share = 1.0 / static_cast<double>(counts[kPositives]);
    for (int64_t k = 0; k < counts[kPositives]; ++k) {
      const ContrastiveTerm term = contrastive_term(p.positives[i * p.num_slots + k], row);
      sum.loss += term.loss * share;
      sum.scale += term.scale * share;
      sum.slope += term.slope * share;
      sum.clamped += term.clamped * share;
    }
  } else {
    const bool mean = p.aggregation == Aggregation::kMean;
    const double number = mean ? static_cast<double>(counts[kPositives]) : 1.0;
    sum = contrastive_term(row[kPositive] - log(number), row);
  }
  p.loss[i] = sum.loss;
  row[kAlpha] = sum.scale * (p.through ? 1.0 + p.beta : 1.0) / state[kMass];
  row[kGamma] = p.through ? -p.beta * sum.scale / state[kNorm] : 0.0;
  row[kSlope] = sum.slope;
  row[kClamped] = sum.clamped;
}

// -(d loss / d s) of a positive with logit s.
DHCL_HOST_DEVICE inline double contrastive_pull(double s, const double* row, int64_t positives,
                                                Aggregation aggregation) {
  if (aggregation == Aggregation::kEach)
    return contrastive_term(s, row).slope / static_cast<double>(positives);
  return row[kSlope] * exp(s - row[kPositive]);
}

// The stream is a cudaStream_t; no launcher synchronises with the host.
void launch_contrastive_stream(const ContrastiveStreamParams& p, void* stream);
void launch_contrastive_weigh(const ContrastiveWeighParams& p, void* stream);
void launch_contrastive_split(const ContrastiveSplitParams& p, void* stream);
void launch_contrastive_fold_pieces(const ContrastiveFoldPiecesParams& p, void* stream);
void launch_contrastive_fold(const ContrastiveFoldParams& p, void* stream);
void launch_contrastive_gradient(const ContrastiveGradientParams& p, void* stream);
void launch_contrastive_finish(const ContrastiveFinishParams& p, void* stream);
void launch_contrastive_slopes(const ContrastiveSlopesParams& p, void* stream);

}  // namespace dhcl
