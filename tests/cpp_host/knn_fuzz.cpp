// The largest products of a row against sorting, and scores of any candidates.
// clang-format off: the harness comes first
#include "harness.h"
#include "knn.cpp"
// clang-format on

namespace {

void select(FuzzedDataProvider& in) {
  // More rows than one thread takes, where there are threads.
  const int64_t most = dhcl::kParallelElements == 0 ? 40 : 4;
  const int64_t rows = in.ConsumeIntegralInRange<int64_t>(1, most);
  const int64_t columns = in.ConsumeIntegralInRange<int64_t>(1, 150);
  const int64_t keep = in.ConsumeIntegralInRange<int64_t>(1, 8);
  const int64_t capacity = keep + in.ConsumeIntegralInRange<int64_t>(1, 20);
  const bool mirror = in.ConsumeBool(), self_search = in.ConsumeBool();
  const int64_t stride = columns + in.ConsumeIntegralInRange<int64_t>(0, 7);
  std::vector<float> tile = harness::some_floats(in, rows * stride);
  // Features are finite and their norms bounded, so products are finite.
  for (float& x : tile)
    if (!std::isfinite(x)) x = 3.0f;
  const int64_t state = mirror ? columns : rows, others = mirror ? rows : columns;
  const float none = -std::numeric_limits<float>::infinity();
  std::vector<float> values(state * capacity, none), thresholds(state, none);
  std::vector<int32_t> indices(state * capacity, -1), counts(state, 0);
  dhcl::KnnSelectParams p{};
  p.values = values.data();
  p.indices = indices.data();
  p.counts = counts.data();
  p.thresholds = thresholds.data();
  p.tile = tile.data();
  p.tile_stride = stride;
  p.num_rows = state;
  p.capacity = capacity;
  p.tile_rows = rows;
  p.tile_cols = columns;
  p.keep = keep;
  p.mirror = mirror;
  p.self_search = self_search;
  dhcl::run_knn_select(p);
  for (int64_t r = 0; r < state; ++r) {
    std::vector<float> all, kept;
    for (int64_t c = 0; c < others; ++c)
      if (!self_search || c != r)
        all.push_back(mirror ? tile[c * stride + r] : tile[r * stride + c]);
    for (int64_t i = 0; i < counts[r]; ++i) kept.push_back(values[r * capacity + i]);
    std::sort(all.rbegin(), all.rend());
    std::sort(kept.rbegin(), kept.rend());
    const size_t wanted = std::min<size_t>(all.size(), keep);
    harness::require(kept.size() >= wanted, "enough candidates are kept");
    for (size_t i = 0; i < wanted; ++i) harness::require(kept[i] == all[i], "the largest are kept");
  }
}

void scores(FuzzedDataProvider& in) {
  const int64_t rows = in.ConsumeIntegralInRange<int64_t>(0, 20);
  const int64_t features = in.ConsumeIntegralInRange<int64_t>(1, 10);
  const int64_t width = in.ConsumeIntegralInRange<int64_t>(0, 4);
  const int64_t dim = in.ConsumeIntegralInRange<int64_t>(0, 150);
  const std::vector<float> x = harness::some_floats(in, rows * dim);
  const std::vector<float> y = harness::some_floats(in, features * dim);
  std::vector<int64_t> candidates(rows * width);
  for (int64_t& c : candidates) c = in.ConsumeIntegralInRange<int64_t>(-2, features);
  std::vector<float> out(rows * width);
  dhcl::KnnScoresParams p{};
  p.scores = out.data();
  p.queries = x.data();
  p.features = y.data();
  p.candidates = candidates.data();
  p.num_rows = rows;
  p.num_candidates = width;
  p.num_features = features;
  p.dim = dim;
  harness::error_of([&] { dhcl::run_knn_scores(p); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  FuzzedDataProvider in(data, size);
  in.ConsumeBool() ? select(in) : scores(in);
  return 0;
}
