// The eps-graph of any weighted sets, through index and join, against all pairs in full.
// clang-format off: the harness comes first
#include "harness.h"
#include "jaccard.cpp"
// clang-format on

namespace {

// Rows of weights, as lists and in full.
struct Weights {
  int64_t rows;
  std::vector<int64_t> offsets{0};
  std::vector<int32_t> columns;
  std::vector<float> values, dense;
  int64_t nnz() const { return offsets.back(); }

  explicit Weights(FuzzedDataProvider& in) {
    // More rows than one task holds, where there are threads.
    rows = in.ConsumeIntegralInRange<int64_t>(0, dhcl::kParallelElements == 0 ? 150 : 20);
    const int64_t one_in = in.ConsumeIntegralInRange<int64_t>(1, 6);
    const int hub = in.ConsumeIntegralInRange<int>(0, 3);
    const bool equal = in.ConsumeBool(), unit = !in.ConsumeBool();
    uint32_t state = in.ConsumeIntegral<uint32_t>();
    const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
    dense.assign(rows * rows, 0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      float sum = 0.0f;
      for (int64_t j = 0; j < rows; ++j) {
        if (j >= hub && next() % one_in != 0) continue;
        columns.push_back(static_cast<int32_t>(j));
        const uint32_t bits = next();
        values.push_back(equal ? 1.0f
                               : std::ldexp(static_cast<float>(bits % 64), -6 - (bits >> 6) % 40));
        sum += values.back();
      }
      offsets.push_back(static_cast<int64_t>(columns.size()));
      for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
        // A row adds to 1, or holds single weights of up to 1 and adds to no more.
        if (sum > 0.0f && (unit || equal || sum > 1.0f)) values[e] /= sum;
        dense[i * rows + columns[e]] = values[e];
      }
    }
  }

  float distance(int64_t i, int64_t j) const {
    float shared = 0.0f;
    for (int64_t c = 0; c < rows; ++c) shared += std::min(dense[i * rows + c], dense[j * rows + c]);
    return std::max(1.0f - shared / (2.0f - shared), 0.0f);
  }
};

// What the ops make of the weights, in arrays of their lengths.
struct Index {
  std::vector<int32_t> order, prefix, list_rows;
  std::vector<int64_t> list_offsets, list_split;
  std::vector<float> list_values;
  std::string error;

  Index(const Weights& w, float eps)
      : order(w.nnz()),
        prefix(w.rows),
        list_rows(w.nnz()),
        list_offsets(w.rows + 1),
        list_split(w.rows),
        list_values(w.nnz()) {
    dhcl::IndexParams p{};
    p.order = order.data();
    p.prefix = prefix.data();
    p.list_offsets = list_offsets.data();
    p.list_split = list_split.data();
    p.list_rows = list_rows.data();
    p.list_values = list_values.data();
    p.offsets = w.offsets.data();
    p.columns = w.columns.data();
    p.values = w.values.data();
    p.num_rows = w.rows;
    p.nnz = w.nnz();
    p.eps = eps;
    error = harness::error_of([&] { dhcl::run_inverted_index(p); });
  }
};

// Rows [begin, end) of the upper triangle.
dhcl::NewRows join(const Weights& w, const Index& index, float eps, int64_t begin, int64_t end) {
  dhcl::JoinParams p{};
  p.lines.begin = begin;
  p.lines.rows = end - begin;
  p.offsets = w.offsets.data();
  p.columns = w.columns.data();
  p.values = w.values.data();
  p.order = index.order.data();
  p.prefix = index.prefix.data();
  p.list_offsets = index.list_offsets.data();
  p.list_split = index.list_split.data();
  p.list_rows = index.list_rows.data();
  p.list_values = index.list_values.data();
  p.num_rows = w.rows;
  p.mean_row = w.rows == 0 ? 0 : w.nnz() / w.rows + 1;
  p.eps = eps;
  return dhcl::jaccard_join_rows(harness::some_tensor(), p);
}

void graph(const Weights& w, const Index& index, float eps, int64_t begin, int64_t end) {
  const auto [offsets, columns, values] = join(w, index, eps, begin, end);
  std::vector<int64_t> starts{0};
  std::vector<int32_t> near;
  std::vector<float> distances;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = i; j < w.rows; ++j) {
      if (w.distance(i, j) > eps) continue;
      near.push_back(static_cast<int32_t>(j));
      distances.push_back(w.distance(i, j));
    }
    starts.push_back(static_cast<int64_t>(near.size()));
  }
  harness::require(harness::holds(offsets, starts) && harness::holds(columns, near) &&
                       harness::holds(values, distances),
                   "all pairs within eps, in full");
}

void mirror(FuzzedDataProvider& in, const Weights& w, const Index& index, float eps) {
  const auto [offsets, columns_in, values] = join(w, index, eps, 0, w.rows);
  std::vector<int32_t> columns(columns_in.const_data_ptr<int32_t>(),
                               columns_in.const_data_ptr<int32_t>() + columns_in.numel());
  const bool wild = !columns.empty() && in.ConsumeProbability<float>() < 0.1f;
  if (wild)
    columns[in.ConsumeIntegralInRange<size_t>(0, columns.size() - 1)] =
        in.ConsumeIntegral<int32_t>();
  std::vector<int64_t> full(w.rows + 1, -7);
  dhcl::MirrorParams p{};
  p.full_offsets = full.data();
  p.offsets = offsets.const_data_ptr<int64_t>();
  p.columns = columns.data();
  p.values = values.const_data_ptr<float>();
  p.num_rows = w.rows;
  const std::string error = harness::error_of([&] { dhcl::run_mirror_count(p); });
  harness::require(error.empty() || wild, "the upper triangle is good");
  if (!error.empty()) return;
  std::vector<int64_t> column_out(full.back());
  std::vector<float> value_out(full.back());
  dhcl::run_mirror_fill(p, column_out.data(), value_out.data());
  for (int64_t i = 0, e = 0; i < w.rows && !wild; ++i)
    for (int64_t j = 0; j < w.rows; ++j)
      if (w.distance(std::min(i, j), std::max(i, j)) <= eps) {
        harness::require(e < full[i + 1] && column_out[e] == j, "the graph is whole and ordered");
        harness::require(value_out[e++] == w.distance(std::min(i, j), std::max(i, j)),
                         "distances are those of the triangle");
      }
}

void full_rows(const Weights& w, const Index& index, int64_t begin, int64_t end) {
  std::vector<float> distances((end - begin) * w.rows, 7.0f);
  dhcl::JaccardRowsParams p{};
  p.distances = distances.data();
  p.offsets = w.offsets.data();
  p.columns = w.columns.data();
  p.values = w.values.data();
  p.list_offsets = index.list_offsets.data();
  p.list_rows = index.list_rows.data();
  p.list_values = index.list_values.data();
  p.num_rows = w.rows;
  p.begin = begin;
  p.rows = end - begin;
  dhcl::run_jaccard_rows(p);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < w.rows; ++j)
      harness::require(distances[(i - begin) * w.rows + j] == w.distance(i, j),
                       "a row of the full matrix");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider in(data, size);
  Weights w(in);
  const float eps = in.ConsumeFloatingPointInRange<float>(1e-6f, 0.999f);
  if (w.nnz() > 0 && in.ConsumeProbability<float>() < 0.05f) {
    w.columns[in.ConsumeIntegralInRange<size_t>(0, w.columns.size() - 1)] =
        in.ConsumeBool() ? -1 : static_cast<int32_t>(w.rows);
    harness::require(!Index(w, eps).error.empty(), "columns outside the matrix are refused");
    return 0;
  }
  const Index index(w, eps);
  harness::require(index.error.empty(), "the sets are good");
  const int64_t begin = in.ConsumeIntegralInRange<int64_t>(0, w.rows);
  const int64_t end = in.ConsumeIntegralInRange<int64_t>(begin, w.rows);
  graph(w, index, eps, begin, end);
  in.ConsumeBool() ? mirror(in, w, index, eps) : full_rows(w, Index(w, 1.0f), begin, end);
  return 0;
}
