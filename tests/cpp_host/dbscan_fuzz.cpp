// Clusters of any sparse matrix: numbered without gaps, and core rows that touch are together.
// clang-format off: the harness comes first
#include "harness.h"
#include "dbscan.cpp"
// clang-format on

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider in(data, size);
  const int64_t rows = in.ConsumeIntegralInRange<int64_t>(0, 24);
  const bool wild = in.ConsumeProbability<float>() < 0.1f;
  // Symmetric, columns ascending, unless a column is spoiled below.
  std::vector<float> dense(rows * rows, 9.0f);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j <= i; ++j)
      dense[i * rows + j] = dense[j * rows + i] =
          i == j ? 0.0f : static_cast<float>(in.ConsumeIntegralInRange<int>(0, 9));
  std::vector<int64_t> offsets(rows + 1, 0), columns;
  std::vector<float> values;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < rows; ++j)
      if (dense[i * rows + j] < 6.0f) {
        columns.push_back(j);
        values.push_back(dense[i * rows + j]);
      }
    offsets[i + 1] = static_cast<int64_t>(columns.size());
  }
  if (wild && !columns.empty())
    columns[in.ConsumeIntegralInRange<size_t>(0, columns.size() - 1)] =
        in.ConsumeIntegral<int64_t>();
  std::vector<int64_t> labels(rows, -7);
  dhcl::DbscanParams p{};
  p.labels = labels.data();
  p.offsets = offsets.data();
  p.columns = columns.data();
  p.values = values.data();
  p.num_rows = rows;
  p.min_samples = in.ConsumeIntegralInRange<int64_t>(1, 5);
  p.eps = static_cast<float>(in.ConsumeIntegralInRange<int>(0, 6));
  const std::string error = harness::error_of([&] { dhcl::run_dbscan(p); });
  if (wild) return 0;
  harness::require(error.empty(), "the graph is good");
  std::vector<bool> core(rows);
  int64_t clusters = 0;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t degree = 0;
    for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) degree += values[e] <= p.eps;
    core[i] = degree >= p.min_samples;
    harness::require(labels[i] >= -1 && (!core[i] || labels[i] >= 0), "a core row has a cluster");
    if (core[i] && labels[i] >= clusters) {
      harness::require(labels[i] == clusters, "numbers follow the smallest core rows");
      ++clusters;
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e)
      if (core[i] && core[columns[e]] && values[e] <= p.eps)
        harness::require(labels[i] == labels[columns[e]], "core rows that touch are together");
  return 0;
}
