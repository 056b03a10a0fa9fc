// Nearest neighbours on the CPU, and the glue that registers the CPU and CUDA kernels with torch.
// The order of summation is that of knn.h; the CUDA kernels are in knn.cu.
#include "knn.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
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
  const float* x = p.tile + r * p.tile_stride;
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
    const float* x = p.tile + r * p.tile_stride;
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

void run_knn_select_both(const KnnSelectParams& p) {
  run_knn_select(p);
  KnnSelectParams mirrored = p;
  const int64_t first = first_mirrored_column(p);
  mirrored.mirror = true;
  mirrored.tile += first;
  mirrored.tile_cols -= first;
  mirrored.col_start += first;
  run_knn_select(mirrored);
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

void rank_row(const KnnRankParams& p, int64_t row) {
  thread_local std::vector<uint64_t> keys;
  const int64_t others = p.k - p.self_search;
  const int64_t count = p.counts[row];
  const int64_t kept = std::min(count, p.keep);
  check(count >= others && count <= p.capacity, "knn_rank_: a row needs ", others, " to ",
        p.capacity, " candidates (got ", count, ")");
  keys.resize(count);
  for (int64_t i = 0; i < count; ++i)
    keys[i] = sort_key(p.values[row * p.capacity + i], p.indices[row * p.capacity + i]);
  std::partial_sort(keys.begin(), keys.begin() + kept, keys.end());
  const double lowest = value_of(keys[kept - 1]) * p.unscale;
  const double floor = p.floor == nullptr ? kNone : p.floor[row];
  const double reach =
      std::max(value_of(keys[others - 1]) * p.unscale - 2 * p.bound[row], floor - p.bound[row]);
  const float* query = p.queries + row * p.dim;
  int64_t scored = 0;
  for (; scored < kept && value_of(keys[scored]) * p.unscale >= reach; ++scored) {
    const auto index = static_cast<int32_t>(static_cast<uint32_t>(keys[scored]));
    check(index >= 0 && index < p.num_features, "knn_rank_: indices must be in [0, ",
          p.num_features, ") (got ", index, " in row ", row, ")");
    keys[scored] = sort_key(dot(query, p.features + index * p.dim, p.dim), index);
  }
  for (; scored < others; ++scored) keys[scored] = sort_key(kNone, -1);
  std::partial_sort(keys.begin(), keys.begin() + others, keys.begin() + scored);
  float* similarities = p.similarities + row * p.k;
  int64_t* neighbours = p.neighbours + row * p.k;
  if (p.self_search) {
    *similarities++ = dot(query, query, p.dim);
    *neighbours++ = p.row_start + row;
  }
  for (int64_t i = 0; i < others; ++i) {
    similarities[i] = value_of(keys[i]);
    neighbours[i] = static_cast<int32_t>(static_cast<uint32_t>(keys[i]));
  }
  const double last = std::max<double>(similarities[others - 1], floor);
  p.certified[row] = p.complete || last > lowest + p.bound[row];
}

void run_knn_rank(const KnnRankParams& p) {
  parallel_tasks(p.num_rows, 8, p.num_rows * p.k * p.dim, [&](int64_t row) { rank_row(p, row); });
}

void run_knn_halves(const KnnHalvesParams& p) {
  Half* halves = static_cast<Half*>(p.halves);
  parallel_rows(p.height, 1, p.height * p.width, [&](int64_t row) {
    Half* half = halves + row * p.width;
    const int64_t dim = row < p.num_rows ? p.dim : 0;
    std::fill(half + dim, half + p.width, Half(0.0f));
    thread_local std::vector<float> errors;
    errors.resize(dim);
    for (int64_t j = 0; j < dim; ++j) {
      const float scaled = p.rows[row * p.dim + j] * p.scale;
      half[j] = Half(scaled);
      errors[j] = scaled - static_cast<float>(half[j]);
    }
    if (row < p.num_rows) p.squares[row] = dot(errors.data(), errors.data(), dim);
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

// A tile whose rows lie anywhere, each of them whole: as it is, else copied.
Tensor tile_of(const char* op, const Tensor& tile) {
  check_rank(op, "tile", tile, 2);
  check_float(op, "tile", tile);
  const bool whole = tile.size(1) <= 1 || tile.stride(1) == 1;
  return whole && tile.stride(0) >= tile.size(1) ? tile : torch::stable::contiguous(tile);
}

// The parameters of both ops of selection, checked as far as both need it.
template <typename Device>
KnnSelectParams select_params(const char* op, const Tensor& values, const Tensor& indices,
                              const Tensor& counts, const Tensor& thresholds, const Tensor& tile,
                              int64_t keep) {
  check_state(op, values, indices, counts, thresholds);
  if constexpr (Device::kCuda)
    check(values.size(1) <= kMaxCapacity, op, ": at most ", kMaxCapacity,
          " candidates a row on CUDA (got ", values.size(1), ")");
  KnnSelectParams p{};
  p.values = float_out(values);
  p.indices = int32_out(indices);
  p.counts = int32_out(counts);
  p.thresholds = float_out(thresholds);
  p.tile = float_data(tile);
  p.tile_stride = tile.stride(0);
  p.num_rows = values.size(0);
  p.capacity = values.size(1);
  p.tile_rows = tile.size(0);
  p.tile_cols = tile.size(1);
  p.keep = keep;
  check(keep > 0 && keep < p.capacity, op, ": keep must be in [1, ", p.capacity, ") (got ", keep,
        ")");
  return p;
}

void check_range(const char* op, const char* what, int64_t first, int64_t count, int64_t rows) {
  check(first >= 0 && first + count <= rows, op, ": the tile's ", what, " must be in [0, ", rows,
        ") (got ", first, " to ", first + count, ")");
}

template <typename Device>
void knn_select(const Tensor& values, const Tensor& indices, const Tensor& counts,
                const Tensor& thresholds, const Tensor& tile_in, int64_t row_start,
                int64_t col_start, int64_t keep, bool mirror, bool self_search) {
  constexpr const char* op = "knn_select_";
  const Tensor tile = tile_of(op, tile_in);
  KnnSelectParams p = select_params<Device>(op, values, indices, counts, thresholds, tile, keep);
  p.row_start = row_start;
  p.col_start = col_start;
  p.mirror = mirror;
  p.self_search = self_search;
  if (mirror)
    check_range(op, "rows", col_start, p.tile_cols, p.num_rows);
  else
    check_range(op, "rows", row_start, p.tile_rows, p.num_rows);
  const int64_t features = mirror ? row_start + p.tile_rows : col_start + p.tile_cols;
  check(features <= std::numeric_limits<int32_t>::max(), op, ": at most 2147483647 features (got ",
        features, ")");
  if (p.tile_rows == 0 || p.tile_cols == 0) return;
  Device::template run<run_knn_select, launch_knn_select>(values, p);
}

template <typename Device>
void knn_select_both(const Tensor& values, const Tensor& indices, const Tensor& counts,
                     const Tensor& thresholds, const Tensor& tile_in, int64_t row_start,
                     int64_t col_start, int64_t keep) {
  constexpr const char* op = "knn_select_both_";
  const Tensor tile = tile_of(op, tile_in);
  KnnSelectParams p = select_params<Device>(op, values, indices, counts, thresholds, tile, keep);
  p.row_start = row_start;
  p.col_start = col_start;
  p.self_search = true;
  check_range(op, "rows", row_start, p.tile_rows, p.num_rows);
  check_range(op, "columns", col_start, p.tile_cols, p.num_rows);
  if (p.tile_rows == 0 || p.tile_cols == 0) return;
  Device::template run<run_knn_select_both, launch_knn_select_both>(values, p);
}

void check_rank_shapes(const char* op, const Tensor& similarities, const Tensor& neighbours,
                       const Tensor& certified, const Tensor& queries, const Tensor& features,
                       const Tensor& values, const Tensor& indices, const Tensor& counts,
                       const Tensor& bound) {
  const int64_t rows = queries.size(0);
  check_rank(op, "similarities", similarities, 2);
  check_rank(op, "neighbours", neighbours, 2);
  check_rank(op, "values", values, 2);
  check_rank(op, "indices", indices, 2);
  check_float(op, "similarities", similarities);
  check_int64(op, "neighbours", neighbours);
  check_float(op, "queries", queries);
  check_float(op, "features", features);
  check_float(op, "values", values);
  check_int32(op, "indices", indices);
  check_int32(op, "counts", counts);
  check(certified.scalar_type() == ScalarType::Bool, op, ": certified must be bool");
  check(bound.scalar_type() == ScalarType::Double, op, ": bound must be float64");
  check_contiguous(op, "similarities", similarities);
  check_contiguous(op, "neighbours", neighbours);
  check_contiguous(op, "certified", certified);
  check(similarities.size(0) == rows && neighbours.size(0) == rows &&
            neighbours.size(1) == similarities.size(1) && certified.numel() == rows &&
            values.size(0) == rows && indices.size(0) == rows &&
            indices.size(1) == values.size(1) && counts.numel() == rows && bound.numel() == rows,
        op, ": all but the features must belong to the same ", rows, " rows");
  check(queries.size(1) == features.size(1), op, ": queries must have ", features.size(1),
        " columns (got ", queries.size(1), ")");
}

template <typename Device>
void knn_rank(const Tensor& similarities, const Tensor& neighbours, const Tensor& certified,
              const Tensor& queries_in, const Tensor& features_in, const Tensor& values_in,
              const Tensor& indices_in, const Tensor& counts_in, const Tensor& bound_in,
              const std::optional<Tensor>& floor_in, int64_t row_start, int64_t keep,
              double unscale, bool self_search, bool complete) {
  constexpr const char* op = "knn_rank_";
  check_rank(op, "queries", queries_in, 2);
  check_rank(op, "features", features_in, 2);
  check_rank_shapes(op, similarities, neighbours, certified, queries_in, features_in, values_in,
                    indices_in, counts_in, bound_in);
  const Tensor queries = torch::stable::contiguous(queries_in);
  const Tensor features = torch::stable::contiguous(features_in);
  const Tensor values = torch::stable::contiguous(values_in);
  const Tensor indices = torch::stable::contiguous(indices_in);
  const Tensor counts = torch::stable::contiguous(counts_in);
  const Tensor bound = torch::stable::contiguous(bound_in);
  const Tensor floor = torch::stable::contiguous(floor_in.value_or(similarities));
  if (floor_in.has_value()) {
    check_float(op, "floor", floor);
    check(floor.numel() == queries.size(0), op, ": floor must have ", queries.size(0), " elements");
  }
  KnnRankParams p{};
  p.similarities = float_out(similarities);
  p.neighbours = int64_out(neighbours);
  p.certified = certified.mutable_data_ptr<bool>();
  p.queries = float_data(queries);
  p.features = float_data(features);
  p.values = float_data(values);
  p.indices = int32_data(indices);
  p.counts = int32_data(counts);
  p.bound = bound.const_data_ptr<double>();
  p.floor = floor_in.has_value() ? float_data(floor) : nullptr;
  p.unscale = unscale;
  p.num_rows = queries.size(0);
  p.num_features = features.size(0);
  p.dim = features.size(1);
  p.k = similarities.size(1);
  p.capacity = values.size(1);
  p.row_start = row_start;
  p.keep = keep;
  p.self_search = self_search;
  p.complete = complete;
  check(p.k > self_search && keep >= p.k - self_search, op, ": k must be in [", 1 + self_search,
        ", ", keep + self_search, "] (got ", p.k, ")");
  if constexpr (Device::kCuda)
    check(p.capacity <= kMaxCapacity, op, ": at most ", kMaxCapacity,
          " candidates a row on CUDA (got ", p.capacity, ")");
  Device::template run<run_knn_rank, launch_knn_rank>(queries, p);
}

template <typename Device>
std::tuple<Tensor, Tensor> knn_halves(const Tensor& rows_in, double scale, int64_t height,
                                      int64_t width) {
  constexpr const char* op = "knn_halves";
  check_rank(op, "rows", rows_in, 2);
  check_float(op, "rows", rows_in);
  const Tensor rows = torch::stable::contiguous(rows_in);
  check(height >= rows.size(0) && width >= rows.size(1) && width % 8 == 0, op, ": ", rows.size(0),
        " x ", rows.size(1), " values need a greater size, the width a multiple of 8 (got ", height,
        " x ", width, ")");
  const Tensor halves = torch::stable::new_empty(rows, {height, width}, ScalarType::Half);
  const Tensor squares = new_float(rows, rows.size(0));
  KnnHalvesParams p{};
  p.halves = halves.mutable_data_ptr();
  p.squares = float_out(squares);
  p.rows = float_data(rows);
  p.scale = static_cast<float>(scale);
  p.num_rows = rows.size(0);
  p.dim = rows.size(1);
  p.height = height;
  p.width = width;
  Device::template run<run_knn_halves, launch_knn_halves>(rows, p);
  return {halves, squares};
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
  m.impl("knn_select_both_", TORCH_BOX(&knn_select_both<Device>));
  m.impl("knn_rank_", TORCH_BOX(&knn_rank<Device>));
  m.impl("knn_scores", TORCH_BOX(&knn_scores<Device>));
  m.impl("knn_halves", TORCH_BOX(&knn_halves<Device>));
}

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) { dhcl::register_ops<dhcl::Cpu>(m); }

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) { dhcl::register_ops<dhcl::Cuda>(m); }
#endif
