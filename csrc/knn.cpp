// Nearest neighbours on the CPU, and the glue that registers the CPU and CUDA kernels with torch.
// The order of summation is that of knn.h; the CUDA kernels are in knn.cu.
#include "knn.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
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
  return sum_of_products(x, y, d);
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

// Checks the candidates of the rows, which the op changes in place.
void check_state(const char* op, const Tensor& values, const Tensor& indices, const Tensor& counts,
                 const Tensor& thresholds) {
  check_rank(op, "values", values, 2);
  check_rank(op, "indices", indices, 2);
  check_rank(op, "counts", counts, 1);
  check_rank(op, "thresholds", thresholds, 1);
  check_float(op, "values", values);
  check_int32(op, "indices", indices);
  check_int32(op, "counts", counts);
  check_float(op, "thresholds", thresholds);
  check_contiguous(op, "values", values);
  check_contiguous(op, "indices", indices);
  check_contiguous(op, "counts", counts);
  check_contiguous(op, "thresholds", thresholds);
  const int64_t rows = values.size(0);
  check(indices.size(0) == rows && indices.size(1) == values.size(1) && counts.size(0) == rows &&
            thresholds.size(0) == rows,
        op, ": values, indices, counts and thresholds must belong to the same rows");
}

template <typename Device>
void knn_select(const Tensor& values, const Tensor& indices, const Tensor& counts,
                const Tensor& thresholds, const Tensor& tile_in, int64_t row_start,
                int64_t col_start, int64_t keep, bool mirror, bool self_search) {
  constexpr const char* op = "knn_select_";
  check_state(op, values, indices, counts, thresholds);
  check_rank(op, "tile", tile_in, 2);
  check_float(op, "tile", tile_in);
  Tensor tile = tile_in;
  if constexpr (Device::kCuda) {
    check(values.size(1) <= kMaxCapacity, op, ": at most ", kMaxCapacity,
          " candidates a row on CUDA (got ", values.size(1), ")");
    // The kernel reads along rows; a transposed copy costs far less than the product it saves.
    if (mirror) {
      tile = torch::stable::transpose(tile, 0, 1);
      std::swap(row_start, col_start);
      mirror = false;
    }
  }
  tile = torch::stable::contiguous(tile);
  KnnSelectParams p{};
  p.values = float_out(values);
  p.indices = int32_out(indices);
  p.counts = int32_out(counts);
  p.thresholds = float_out(thresholds);
  p.tile = float_data(tile);
  p.num_rows = values.size(0);
  p.capacity = values.size(1);
  p.tile_rows = tile.size(0);
  p.tile_cols = tile.size(1);
  p.row_start = row_start;
  p.col_start = col_start;
  p.keep = keep;
  p.mirror = mirror;
  p.self_search = self_search;
  check(keep > 0 && keep < p.capacity, op, ": keep must be in [1, ", p.capacity, ") (got ", keep,
        ")");
  const int64_t first = mirror ? col_start : row_start;
  const int64_t end = first + (mirror ? p.tile_cols : p.tile_rows);
  check(first >= 0 && end <= p.num_rows, op, ": the tile's rows must be in [0, ", p.num_rows,
        ") (got ", first, " to ", end, ")");
  const int64_t features = mirror ? row_start + p.tile_rows : col_start + p.tile_cols;
  check(features <= std::numeric_limits<int32_t>::max(), op, ": at most 2147483647 features (got ",
        features, ")");
  if (p.tile_rows == 0 || p.tile_cols == 0) return;
  Device::template run<run_knn_select, launch_knn_select>(values, p);
}

template <typename Device>
Tensor knn_scores(const Tensor& queries_in, const Tensor& features_in,
                  const Tensor& candidates_in) {
  constexpr const char* op = "knn_scores";
  check_rank(op, "queries", queries_in, 2);
  check_rank(op, "features", features_in, 2);
  check_rank(op, "candidates", candidates_in, 2);
  check_float(op, "queries", queries_in);
  check_float(op, "features", features_in);
  check_int64(op, "candidates", candidates_in);
  check(queries_in.size(0) == candidates_in.size(0), op, ": candidates must have ",
        queries_in.size(0), " rows (got ", candidates_in.size(0), ")");
  check(queries_in.size(1) == features_in.size(1), op, ": queries must have ", features_in.size(1),
        " columns (got ", queries_in.size(1), ")");
  const Tensor queries = torch::stable::contiguous(queries_in);
  const Tensor features = torch::stable::contiguous(features_in);
  const Tensor candidates = torch::stable::contiguous(candidates_in);
  const Tensor scores = torch::stable::new_empty(queries, {candidates.size(0), candidates.size(1)});
  KnnScoresParams p{};
  p.scores = float_out(scores);
  p.queries = float_data(queries);
  p.features = float_data(features);
  p.candidates = int64_data(candidates);
  p.num_rows = candidates.size(0);
  p.num_candidates = candidates.size(1);
  p.num_features = features.size(0);
  p.dim = features.size(1);
  Device::template run<run_knn_scores, launch_knn_scores>(queries, p);
  return scores;
}

template <typename Device, typename Library>
void register_ops(Library& m) {
  m.impl("knn_select_", TORCH_BOX(&knn_select<Device>));
  m.impl("knn_scores", TORCH_BOX(&knn_scores<Device>));
}

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) { dhcl::register_ops<dhcl::Cpu>(m); }

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) { dhcl::register_ops<dhcl::Cuda>(m); }
#endif
