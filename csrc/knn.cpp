// Nearest neighbours on the CPU, and the glue that registers the CPU and CUDA kernels with torch.
// The order of summation is that of knn.h; the CUDA kernels are in knn.cu.
#include "knn.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "common/cpu.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace dhcl {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// ---- selection ----------------------------------------------------------------------------------

// Which of 64 products exceed their threshold, as bits. Nearly always none does, and that answer
// costs four vector comparisons.
constexpr int64_t kGroup = 64;
#ifdef __AVX512F__
inline uint64_t above(const float* x, const float* thresholds, bool same) {
  uint64_t bits = 0;
  const __m512 first = _mm512_set1_ps(*thresholds);
  for (int64_t c = 0; c < kGroup; c += 16) {
    const __m512 t = same ? first : _mm512_loadu_ps(thresholds + c);
    bits |= static_cast<uint64_t>(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + c), t, _CMP_GT_OQ)) << c;
  }
  return bits;
}
#else
DHCL_CLONES bool any_above(const float* x, const float* thresholds, bool same) {
  int hits = 0;
  const float first = *thresholds;
  if (same)
    for (int64_t c = 0; c < kGroup; ++c) hits |= static_cast<int>(x[c] > first);
  else
    for (int64_t c = 0; c < kGroup; ++c) hits |= static_cast<int>(x[c] > thresholds[c]);
  return hits != 0;
}
inline uint64_t above(const float* x, const float* thresholds, bool same) {
  uint64_t bits = 0;
  if (any_above(x, thresholds, same))
    for (int64_t c = 0; c < kGroup; ++c)
      bits |= static_cast<uint64_t>(x[c] > thresholds[same ? 0 : c]) << c;
  return bits;
}
#endif

// A number that is smaller the better a candidate is: by value, the largest first, then by index.
inline uint64_t sort_key(float value, int32_t index) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (bits == 0x80000000u) bits = 0;  // -0 is 0
  bits = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(index);
}
inline float value_of(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits = bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Keeps the `keep` largest candidates of a row; of equal ones those of smaller index.
void compact(const KnnSelectParams& p, int64_t row) {
  thread_local std::vector<uint64_t> keys;
  float* values = p.values + row * p.capacity;
  int32_t* indices = p.indices + row * p.capacity;
  const int64_t count = p.counts[row];
  keys.resize(count);
  for (int64_t i = 0; i < count; ++i) keys[i] = sort_key(values[i], indices[i]);
  const auto last = keys.begin() + (p.keep - 1);
  std::nth_element(keys.begin(), last, keys.end());
  for (int64_t i = 0; i < p.keep; ++i) {
    values[i] = value_of(keys[i]);
    indices[i] = static_cast<int32_t>(static_cast<uint32_t>(keys[i]));
  }
  std::fill(values + p.keep, values + count, kNone);
  std::fill(indices + p.keep, indices + count, -1);
  p.counts[row] = static_cast<int32_t>(p.keep);
  p.thresholds[row] = value_of(*last);
}

inline void add_candidate(const KnnSelectParams& p, int64_t row, int64_t index, float value) {
  if (!(value > p.thresholds[row]) || (p.self_search && index == row)) return;
  const int64_t at = row * p.capacity + p.counts[row]++;
  p.values[at] = value;
  p.indices[at] = static_cast<int32_t>(index);
  if (p.counts[row] == p.capacity) compact(p, row);
}

void select_row(const KnnSelectParams& p, int64_t r) {
  const float* x = p.tile + r * p.tile_cols;
  const int64_t row = p.row_start + r;
  int64_t c = 0;
  for (; c + kGroup <= p.tile_cols; c += kGroup)
    for (uint64_t hits = above(x + c, p.thresholds + row, true); hits != 0; hits &= hits - 1) {
      const int64_t i = c + __builtin_ctzll(hits);
      add_candidate(p, row, p.col_start + i, x[i]);
    }
  for (; c < p.tile_cols; ++c) add_candidate(p, row, p.col_start + c, x[c]);
}

// A strip of columns of a mirrored tile; one task owns the state rows of its columns.
constexpr int64_t kStrip = 4 * kGroup;
void select_strip(const KnnSelectParams& p, int64_t first) {
  const int64_t end = std::min(first + kStrip, p.tile_cols);
  const float* thresholds = p.thresholds + p.col_start;
  for (int64_t r = 0; r < p.tile_rows; ++r) {
    const float* x = p.tile + r * p.tile_cols;
    const int64_t index = p.row_start + r;
    int64_t c = first;
    for (; c + kGroup <= end; c += kGroup)
      for (uint64_t hits = above(x + c, thresholds + c, false); hits != 0; hits &= hits - 1) {
        const int64_t i = c + __builtin_ctzll(hits);
        add_candidate(p, p.col_start + i, index, x[i]);
      }
    for (; c < end; ++c) add_candidate(p, p.col_start + c, index, x[c]);
  }
}

void run_knn_select(const KnnSelectParams& p) {
  const int64_t elements = p.tile_rows * p.tile_cols;
  if (p.mirror)
    parallel_tasks((p.tile_cols + kStrip - 1) / kStrip, 1, elements,
                   [&](int64_t strip) { select_strip(p, strip * kStrip); });
  else
    parallel_tasks(p.tile_rows, 16, elements, [&](int64_t r) { select_row(p, r); });
}

// ---- scores -------------------------------------------------------------------------------------

DHCL_CLONES float dot(const float* x, const float* y, int64_t d) {
  alignas(64) float columns[kDotColumns] = {};
  const int64_t whole = d / kDotColumns * kDotColumns;
  for (int64_t j = 0; j < whole; j += kDotColumns)
    for (int64_t c = 0; c < kDotColumns; ++c) columns[c] += x[j + c] * y[j + c];
  for (int64_t c = 0; c < d - whole; ++c) columns[c] += x[whole + c] * y[whole + c];
  for (int64_t half = kDotColumns / 2; half > 0; half /= 2)
    for (int64_t c = 0; c < half; ++c) columns[c] += columns[c + half];
  return columns[0];
}

void run_knn_scores(const KnnScoresParams& p) {
  parallel_tasks(p.num_rows, 8, p.num_rows * p.num_candidates * p.dim, [&](int64_t r) {
    for (int64_t c = 0; c < p.num_candidates; ++c) {
      const int64_t j = p.candidates[r * p.num_candidates + c];
      check(j >= -1 && j < p.num_features, "knn_scores: candidates must be in [-1, ",
            p.num_features, ") (got ", j, " in row ", r, ")");
      p.scores[r * p.num_candidates + c] =
          j < 0 ? kNone : dot(p.queries + r * p.dim, p.features + j * p.dim, p.dim);
    }
  });
}

// ---- glue ---------------------------------------------------------------------------------------

void check_float(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
}

void check_int32(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32");
}

template <typename Run>
void knn_select_glue(const Tensor& values, const Tensor& indices, const Tensor& counts,
                     const Tensor& thresholds, const Tensor& tile, int64_t row_start,
                     int64_t col_start, int64_t keep, bool mirror, bool self_search,
                     const Run& run) {
  constexpr const char* op = "knn_select_";
  check_rank(op, "values", values, 2);
  check_rank(op, "indices", indices, 2);
  check_rank(op, "counts", counts, 1);
  check_rank(op, "thresholds", thresholds, 1);
  check_rank(op, "tile", tile, 2);
  check_float(op, "values", values);
  check_int32(op, "indices", indices);
  check_int32(op, "counts", counts);
  check_float(op, "thresholds", thresholds);
  check_float(op, "tile", tile);
  check_contiguous(op, "values", values);
  check_contiguous(op, "indices", indices);
  check_contiguous(op, "counts", counts);
  check_contiguous(op, "thresholds", thresholds);
  const int64_t rows = values.size(0);
  const int64_t capacity = values.size(1);
  check(indices.size(0) == rows && indices.size(1) == capacity && counts.size(0) == rows &&
            thresholds.size(0) == rows,
        op, ": values, indices, counts and thresholds must belong to the same rows");
  check(keep > 0 && keep < capacity, op, ": keep must be in [1, ", capacity, ") (got ", keep, ")");
  const int64_t first = mirror ? col_start : row_start;
  const int64_t touched = tile.size(mirror ? 1 : 0);
  check(first >= 0 && first + touched <= rows, op, ": the tile's rows must be in [0, ", rows,
        ") (got ", first, " to ", first + touched, ")");
  const int64_t last_index = (mirror ? row_start : col_start) + tile.size(mirror ? 0 : 1);
  check(last_index <= std::numeric_limits<int32_t>::max(), op,
        ": at most 2147483647 features (got ", last_index, ")");
  const Tensor t = torch::stable::contiguous(tile);
  KnnSelectParams p{};
  p.values = values.mutable_data_ptr<float>();
  p.indices = indices.mutable_data_ptr<int32_t>();
  p.counts = counts.mutable_data_ptr<int32_t>();
  p.thresholds = thresholds.mutable_data_ptr<float>();
  p.tile = t.const_data_ptr<float>();
  p.num_rows = rows;
  p.capacity = capacity;
  p.tile_rows = t.size(0);
  p.tile_cols = t.size(1);
  p.row_start = row_start;
  p.col_start = col_start;
  p.keep = keep;
  p.mirror = mirror;
  p.self_search = self_search;
  if (p.tile_rows == 0 || p.tile_cols == 0) return;
  run(p);
}

template <typename Run>
Tensor knn_scores_glue(const Tensor& queries, const Tensor& features, const Tensor& candidates,
                       const Run& run) {
  constexpr const char* op = "knn_scores";
  check_rank(op, "queries", queries, 2);
  check_rank(op, "features", features, 2);
  check_rank(op, "candidates", candidates, 2);
  check_float(op, "queries", queries);
  check_float(op, "features", features);
  check_int64(op, "candidates", candidates);
  check(queries.size(0) == candidates.size(0), op, ": candidates must have ", queries.size(0),
        " rows (got ", candidates.size(0), ")");
  check(queries.size(1) == features.size(1), op, ": queries must have ", features.size(1),
        " columns (got ", queries.size(1), ")");
  const Tensor q = torch::stable::contiguous(queries);
  const Tensor f = torch::stable::contiguous(features);
  const Tensor c = torch::stable::contiguous(candidates);
  Tensor scores = torch::stable::new_empty(q, {c.size(0), c.size(1)});
  KnnScoresParams p{};
  p.scores = scores.mutable_data_ptr<float>();
  p.queries = q.const_data_ptr<float>();
  p.features = f.const_data_ptr<float>();
  p.candidates = int64_data(c);
  p.num_rows = c.size(0);
  p.num_candidates = c.size(1);
  p.num_features = f.size(0);
  p.dim = f.size(1);
  run(p);
  return scores;
}

void knn_select_cpu(const Tensor& values, const Tensor& indices, const Tensor& counts,
                    const Tensor& thresholds, const Tensor& tile, int64_t row_start,
                    int64_t col_start, int64_t keep, bool mirror, bool self_search) {
  knn_select_glue(values, indices, counts, thresholds, tile, row_start, col_start, keep, mirror,
                  self_search, run_knn_select);
}

Tensor knn_scores_cpu(const Tensor& queries, const Tensor& features, const Tensor& candidates) {
  return knn_scores_glue(queries, features, candidates, run_knn_scores);
}

#ifdef DHCL_CUDA
void knn_select_cuda(const Tensor& values, const Tensor& indices, const Tensor& counts,
                     const Tensor& thresholds, const Tensor& tile, int64_t row_start,
                     int64_t col_start, int64_t keep, bool mirror, bool self_search) {
  check(values.size(1) <= kMaxCapacity, "knn_select_: at most ", kMaxCapacity,
        " candidates a row on CUDA (got ", values.size(1), ")");
  // The kernel reads along rows; a transposed copy costs far less than the product it saves.
  const Tensor upright =
      mirror ? torch::stable::contiguous(torch::stable::transpose(tile, 0, 1)) : tile;
  knn_select_glue(values, indices, counts, thresholds, upright, mirror ? col_start : row_start,
                  mirror ? row_start : col_start, keep, false, self_search,
                  [&](const KnnSelectParams& p) {
                    const CudaScope scope(values);
                    launch_knn_select(p, scope.stream());
                    scope.check_launch();
                  });
}

Tensor knn_scores_cuda(const Tensor& queries, const Tensor& features, const Tensor& candidates) {
  return knn_scores_glue(queries, features, candidates, [&](const KnnScoresParams& p) {
    const CudaScope scope(queries);
    launch_knn_scores(p, scope.stream());
    scope.check_launch();
  });
}
#endif

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) {
  m.impl("knn_select_", TORCH_BOX(&dhcl::knn_select_cpu));
  m.impl("knn_scores", TORCH_BOX(&dhcl::knn_scores_cpu));
}

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) {
  m.impl("knn_select_", TORCH_BOX(&dhcl::knn_select_cuda));
  m.impl("knn_scores", TORCH_BOX(&dhcl::knn_scores_cuda));
}
#endif
