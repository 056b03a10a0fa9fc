// k-reciprocal encoding on the CPU, and the glue that registers the CPU and CUDA kernels with
// torch. What the stages promise is in reciprocal.h; the CUDA kernels are in reciprocal.cu. A stage
// that makes rows takes a range of them, so that a caller can report progress and be interrupted
// between ranges; ranges do not show in the result.
#include "reciprocal.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/csr_glue.h"

namespace dhcl {
namespace {

void check_ranks(const char* op, const Tensor& ranks) {
  check_rank(op, "ranks", ranks, 2);
  check_int32(op, "ranks", ranks);
}

// ---- reciprocal neighbours ----------------------------------------------------------------------

// Where row id stands in its own neighbour's list; -1 if nowhere.
DHCL_CLONES int32_t find(const int32_t* list, int64_t width, int32_t id) {
  int32_t position = -1;
  for (int32_t q = 0; q < static_cast<int32_t>(width); ++q)
    position = list[q] == id ? std::max(position, q) : position;
  return position;
}

void run_reciprocal_positions(const ReciprocalParams& p) {
  parallel_rows(p.num_rows, 1, p.num_rows * p.width * p.width, [&](int64_t i) {
    for (int64_t q = i * p.width; q < (i + 1) * p.width; ++q) {
      const int64_t j = p.ranks[q];
      check(j >= 0 && j < p.num_rows, "reciprocal_positions: ranks must be in [0, ", p.num_rows,
            ") (got ", j, " in row ", i, ")");
      p.positions[q] =
          static_cast<int16_t>(find(p.ranks + j * p.width, p.width, static_cast<int32_t>(i)));
    }
  });
}

template <typename Device>
Tensor reciprocal_positions(const Tensor& ranks_in) {
  constexpr const char* op = "reciprocal_positions";
  check_ranks(op, ranks_in);
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  const int64_t n = ranks.size(0), width = ranks.size(1);
  check(width <= std::numeric_limits<int16_t>::max(), op, ": ranks must have at most 32767 columns",
        " (got ", width, ")");
  Tensor positions = torch::stable::new_empty(ranks, {n, width}, ScalarType::Short);
  const ReciprocalParams p{positions.mutable_data_ptr<int16_t>(), int32_data(ranks), n, width};
  Device::template run<run_reciprocal_positions, launch_reciprocal_positions>(ranks, p);
  return positions;
}

struct Marks {
  std::vector<uint8_t> mark;  // [N], all zero between rows
};

// Appends what the mutual neighbour c brings: its own close mutual neighbours, if more than two
// thirds of them are members already.
void expand(const KReciprocalParams& p, int64_t c, uint8_t* mark, std::vector<int32_t>& out) {
  const int32_t* near = p.ranks + c * p.width;
  const int16_t* near_back = p.positions + c * p.width;
  int64_t size = 0, shared = 0;
  for (int64_t q = 0; q < p.half; ++q) {
    const bool mutual = near_back[q] >= 0 && near_back[q] < p.half;
    size += mutual;
    shared += mutual && mark[near[q]] == 1;
  }
  // As an integer test: equal to the published one in doubles.
  if (3 * shared <= 2 * size) return;
  for (int64_t q = 0; q < p.half; ++q) {
    if (near_back[q] < 0 || near_back[q] >= p.half || mark[near[q]] != 0) continue;
    mark[near[q]] = 2;
    out.push_back(near[q]);
  }
}

NewRows k_reciprocal_rows(const Tensor& like, const KReciprocalParams& p) {
  const auto make = [&p] { return Marks{std::vector<uint8_t>(p.num_rows, 0)}; };
  const auto row = [&p](Marks& scratch, int64_t i, Lines& lines) {
    uint8_t* mark = scratch.mark.data();
    std::vector<int32_t>& out = lines.columns;
    const size_t start = out.size();
    for (int64_t q = 0; q < p.k; ++q) {
      const int16_t back = p.positions[i * p.width + q];
      if (back < 0 || back >= p.k) continue;
      const int32_t j = p.ranks[i * p.width + q];
      if (mark[j] == 0) out.push_back(j);
      mark[j] = 1;
    }
    const size_t members = out.size();
    for (size_t m = start; m < members; ++m) expand(p, out[m], mark, out);
    for (size_t m = start; m < out.size(); ++m) mark[out[m]] = 0;
    std::sort(out.begin() + static_cast<int64_t>(start), out.end());
  };
  return make_rows<Marks>(like, p.lines, false, p.lines.rows * p.k * p.half, make, row);
}

template <typename Device>
std::tuple<Tensor, Tensor> k_reciprocal(const Tensor& ranks_in, const Tensor& positions_in,
                                        int64_t k, int64_t half, int64_t begin, int64_t end) {
  constexpr const char* op = "k_reciprocal";
  check_ranks(op, ranks_in);
  check(positions_in.scalar_type() == ScalarType::Short && positions_in.dim() == 2 &&
            positions_in.size(0) == ranks_in.size(0) && positions_in.size(1) == ranks_in.size(1),
        op, ": positions must be int16, of the shape of ranks");
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  const Tensor positions = torch::stable::contiguous(positions_in);
  KReciprocalParams p{};
  p.lines.begin = begin;
  p.lines.rows = end - begin;
  p.table.cells = kSetCells;
  p.table.large_cells = kLargeCells;
  p.ranks = int32_data(ranks);
  p.positions = positions.const_data_ptr<int16_t>();
  p.num_rows = ranks.size(0);
  p.width = ranks.size(1);
  p.k = k;
  p.half = half;
  check(k <= p.width && half <= p.width, op, ": k and half must be at most ", p.width, " (got ", k,
        " and ", half, ")");
  check_range(op, begin, end, p.num_rows);
  auto [offsets, columns, values] =
      make_rows_on<Device, k_reciprocal_rows, launch_k_reciprocal>(ranks, p, false);
  return {offsets, columns};
}

// ---- weights ------------------------------------------------------------------------------------

DHCL_CLONES float dot(const float* x, const float* y, int64_t d) {
  return sum_of_products(x, y, d);
}

// The dot products of row begin + r with the rows its line of the CSR matrix names. Where the
// neighbour list holds the column, its similarity is taken from there.
void run_pair_dots(const PairDotsParams& p) {
  const int64_t nnz = p.offsets[p.rows];
  parallel_rows(p.rows, 1, nnz * (p.dim + p.width), [&](int64_t r) {
    const int64_t i = p.begin + r;
    for (int64_t e = p.offsets[r]; e < p.offsets[r + 1]; ++e) {
      const int32_t place =
          p.similarities == nullptr ? -1 : find(p.ranks + i * p.width, p.width, p.columns[e]);
      p.dots[e] = place >= 0
                      ? p.similarities[i * p.width + place]
                      : dot(p.features + i * p.dim, p.features + p.columns[e] * p.dim, p.dim);
    }
  });
}

template <typename Device>
Tensor pair_dots(const Tensor& features_in, const Tensor& ranks_in,
                 const std::optional<Tensor>& similarities_in, const Tensor& offsets,
                 const Tensor& columns, int64_t begin) {
  constexpr const char* op = "pair_dots";
  check_rank(op, "features", features_in, 2);
  check_float(op, "features", features_in);
  check_ranks(op, ranks_in);
  const Pattern sets(Device(), op, offsets, columns);
  const Tensor features = torch::stable::contiguous(features_in);
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  std::optional<Tensor> similarities;
  if (similarities_in.has_value()) {
    check_float(op, "similarities", *similarities_in);
    check(similarities_in->dim() == 2 && similarities_in->size(0) == ranks.size(0) &&
              similarities_in->size(1) == ranks.size(1),
          op, ": similarities must have the shape of ranks");
    check(ranks.size(0) == features.size(0), op, ": ranks must have ", features.size(0),
          " rows (got ", ranks.size(0), ")");
    similarities = torch::stable::contiguous(*similarities_in);
  }
  const Tensor dots = new_float(features, sets.nnz());
  PairDotsParams p{};
  p.dots = float_out(dots);
  p.features = float_data(features);
  p.ranks = int32_data(ranks);
  p.similarities = similarities.has_value() ? float_data(*similarities) : nullptr;
  p.offsets = int64_data(sets.offsets);
  p.columns = int32_data(sets.columns);
  p.num_rows = features.size(0);
  p.dim = features.size(1);
  p.width = ranks.size(1);
  p.begin = begin;
  p.rows = sets.rows();
  check_range(op, begin, begin + p.rows, p.num_rows);
  Device::template run<run_pair_dots, launch_pair_dots>(features, p);
  return dots;
}

void run_softmax_rows(const SoftmaxParams& p) {
  parallel_rows(p.rows, 1, 16 * p.offsets[p.rows], [&](int64_t r) {
    thread_local std::vector<double> exps;
    const int64_t size = p.offsets[r + 1] - p.offsets[r];
    if (size == 0) return;
    const float* logits = p.logits + p.offsets[r];
    float* weights = p.weights + p.offsets[r];
    exps.resize(size);
    const double top = *std::max_element(logits, logits + size);
    double sum = 0.0;
    for (int64_t e = 0; e < size; ++e) {
      exps[e] = std::exp(static_cast<double>(logits[e]) - top);
      sum += exps[e];
    }
    for (int64_t e = 0; e < size; ++e) weights[e] = static_cast<float>(exps[e] / sum);
  });
}

template <typename Device>
Tensor softmax_rows(const Tensor& offsets_in, const Tensor& logits_in) {
  constexpr const char* op = "softmax_rows";
  check_offsets(op, offsets_in);
  check_rank(op, "logits", logits_in, 1);
  check_float(op, "logits", logits_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor logits = torch::stable::contiguous(logits_in);
  check_lists<Device>(op, "offsets", offsets, logits.size(0));
  const Tensor weights = new_float(logits, logits.size(0));
  const SoftmaxParams p{float_out(weights), float_data(logits), int64_data(offsets),
                        offsets.size(0) - 1};
  Device::template run<run_softmax_rows, launch_softmax_rows>(logits, p);
  return weights;
}

// ---- query expansion ----------------------------------------------------------------------------

// A hash table of columns, free between rows, and which places are taken.
struct Sums {
  std::vector<int32_t> keys;  // -1 where free
  std::vector<float> sums;
  std::vector<uint64_t> found;  // column << 32 | place in the table

  // Room for twice the entries of a row, so that probes stay short.
  void make_room(int64_t entries) {
    found.clear();
    if (static_cast<int64_t>(keys.size()) >= 2 * entries) return;
    size_t capacity = 256;
    while (static_cast<int64_t>(capacity) < 2 * entries) capacity *= 2;
    keys.assign(capacity, -1);
    sums.assign(capacity, 0.0f);
  }
  void add_row(const Csr& rows, int64_t i) {
    int32_t* const key = keys.data();
    float* const sum = sums.data();
    const uint32_t mask = static_cast<uint32_t>(keys.size()) - 1;
    for (int64_t e = rows.begin(i); e < rows.end(i); ++e) {
      const int32_t c = rows.columns[e];
      uint32_t place = static_cast<uint32_t>(c) * 2654435769u >> 7 & mask;
      while (key[place] != c && key[place] >= 0) place = (place + 1) & mask;
      if (key[place] < 0) {
        key[place] = c;
        sum[place] = rows.values[e];
        found.push_back(static_cast<uint64_t>(c) << 32 | place);
      } else {
        sum[place] += rows.values[e];
      }
    }
  }
};

NewRows query_expand_rows(const Tensor& like, const QueryExpandParams& p) {
  const Csr v{p.offsets, p.columns, p.values};
  const float count = static_cast<float>(p.k2);
  const auto make = [] { return Sums(); };
  const auto row = [&](Sums& s, int64_t i, Lines& lines) {
    const int32_t* near = p.ranks + i * p.width;
    int64_t entries = 0;
    for (int64_t q = 0; q < p.k2; ++q) {
      check(near[q] >= 0 && near[q] < p.num_rows, "query_expand: ranks must be in [0, ", p.num_rows,
            ") (got ", near[q], " in row ", i, ")");
      entries += v.size(near[q]);
    }
    s.make_room(entries);
    for (int64_t q = 0; q < p.k2; ++q) s.add_row(v, near[q]);
    std::sort(s.found.begin(), s.found.end());
    for (const uint64_t f : s.found) {
      const uint32_t place = static_cast<uint32_t>(f);
      lines.columns.push_back(s.keys[place]);
      lines.values.push_back(s.sums[place] / count);
      s.keys[place] = -1;
    }
  };
  return make_rows<Sums>(like, p.lines, true, p.lines.rows * p.k2 * 64, make, row);
}

template <typename Device>
NewRows query_expand(const Tensor& ranks_in, const Tensor& offsets, const Tensor& columns,
                     const Tensor& values, int64_t k2, int64_t begin, int64_t end) {
  constexpr const char* op = "query_expand";
  check_ranks(op, ranks_in);
  const Matrix weights(Device(), op, offsets, columns, values);
  const Tensor ranks = torch::stable::contiguous(ranks_in);
  QueryExpandParams p{};
  p.lines.begin = begin;
  p.lines.rows = end - begin;
  p.table.cells = kSetCells;
  p.table.large_cells = kLargeCells;
  weights.give_to(p);
  p.ranks = int32_data(ranks);
  p.num_rows = weights.rows();
  p.width = ranks.size(1);
  p.k2 = k2;
  check(k2 >= 1 && k2 <= p.width, op, ": k2 must be in [1, ", p.width, "] (got ", k2, ")");
  check_range(op, begin, end, ranks.size(0));
  return make_rows_on<Device, query_expand_rows, launch_query_expand>(ranks, p, true);
}

template <typename Device, typename Library>
void register_ops(Library& m) {
  m.impl("reciprocal_positions", TORCH_BOX(&reciprocal_positions<Device>));
  m.impl("k_reciprocal", TORCH_BOX(&k_reciprocal<Device>));
  m.impl("pair_dots", TORCH_BOX(&pair_dots<Device>));
  m.impl("softmax_rows", TORCH_BOX(&softmax_rows<Device>));
  m.impl("query_expand", TORCH_BOX(&query_expand<Device>));
}

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) { dhcl::register_ops<dhcl::Cpu>(m); }

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) { dhcl::register_ops<dhcl::Cuda>(m); }
#endif
