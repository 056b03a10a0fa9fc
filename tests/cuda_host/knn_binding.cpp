// Binds the launchers of csrc/knn.cu, built for the host, to NumPy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cuda_host.h"
#include "knn.h"

namespace py = pybind11;

namespace {

// The tile's rows may lie further apart than they are long.
dhcl::KnnSelectParams select_params(py::array_t<float>& values, py::array_t<int32_t>& indices,
                                    py::array_t<int32_t>& counts, py::array_t<float>& thresholds,
                                    const py::array_t<float>& tile, int64_t row_start,
                                    int64_t col_start, int64_t keep) {
  dhcl::KnnSelectParams p{};
  p.values = values.mutable_data();
  p.indices = indices.mutable_data();
  p.counts = counts.mutable_data();
  p.thresholds = thresholds.mutable_data();
  p.tile = tile.data();
  p.tile_stride = tile.strides(0) / static_cast<int64_t>(sizeof(float));
  p.num_rows = values.shape(0);
  p.capacity = values.shape(1);
  p.tile_rows = tile.shape(0);
  p.tile_cols = tile.shape(1);
  p.row_start = row_start;
  p.col_start = col_start;
  p.keep = keep;
  return p;
}

void knn_select(py::array_t<float> values, py::array_t<int32_t> indices,
                py::array_t<int32_t> counts, py::array_t<float> thresholds,
                const py::array_t<float>& tile, int64_t row_start, int64_t col_start, int64_t keep,
                bool mirror, bool self_search) {
  auto p = select_params(values, indices, counts, thresholds, tile, row_start, col_start, keep);
  p.mirror = mirror;
  p.self_search = self_search;
  dhcl::launch_knn_select(p, nullptr);
}

void knn_select_both(py::array_t<float> values, py::array_t<int32_t> indices,
                     py::array_t<int32_t> counts, py::array_t<float> thresholds,
                     const py::array_t<float>& tile, int64_t row_start, int64_t col_start,
                     int64_t keep) {
  auto p = select_params(values, indices, counts, thresholds, tile, row_start, col_start, keep);
  p.self_search = true;
  dhcl::launch_knn_select_both(p, nullptr);
}

void knn_rank(py::array_t<float> similarities, py::array_t<int64_t> neighbours,
              py::array_t<bool> certified, const py::array_t<float>& queries,
              const py::array_t<float>& features, const py::array_t<float>& values,
              const py::array_t<int32_t>& indices, const py::array_t<int32_t>& counts,
              const py::array_t<double>& bound, const std::optional<py::array_t<float>>& floor,
              int64_t row_start, int64_t keep, double unscale, bool self_search, bool complete) {
  dhcl::KnnRankParams p{};
  p.similarities = similarities.mutable_data();
  p.neighbours = neighbours.mutable_data();
  p.certified = certified.mutable_data();
  p.queries = queries.data();
  p.features = features.data();
  p.values = values.data();
  p.indices = indices.data();
  p.counts = counts.data();
  p.bound = bound.data();
  p.floor = floor.has_value() ? floor->data() : nullptr;
  p.unscale = unscale;
  p.num_rows = queries.shape(0);
  p.num_features = features.shape(0);
  p.dim = features.shape(1);
  p.k = similarities.shape(1);
  p.capacity = values.shape(1);
  p.row_start = row_start;
  p.keep = keep;
  p.self_search = self_search;
  p.complete = complete;
  dhcl::launch_knn_rank(p, nullptr);
}

void knn_scores(py::array_t<float> scores, const py::array_t<float>& queries,
                const py::array_t<float>& features, const py::array_t<int64_t>& candidates) {
  dhcl::KnnScoresParams p{};
  p.scores = scores.mutable_data();
  p.queries = queries.data();
  p.features = features.data();
  p.candidates = candidates.data();
  p.num_rows = candidates.shape(0);
  p.num_candidates = candidates.shape(1);
  p.num_features = features.shape(0);
  p.dim = features.shape(1);
  dhcl::launch_knn_scores(p, nullptr);
}

void knn_halves(py::array_t<uint16_t> halves, py::array_t<float> squares,
                const py::array_t<float>& rows, double scale) {
  dhcl::KnnHalvesParams p{};
  p.halves = halves.mutable_data();
  p.squares = squares.mutable_data();
  p.rows = rows.data();
  p.scale = static_cast<float>(scale);
  p.num_rows = rows.shape(0);
  p.dim = rows.shape(1);
  p.height = halves.shape(0);
  p.width = halves.shape(1);
  dhcl::launch_knn_halves(p, nullptr);
}

}  // namespace

PYBIND11_MODULE(knn_host, m) {
  m.def("set_schedule", &cuda_host::set_schedule);
  m.def("knn_select", &knn_select);
  m.def("knn_select_both", &knn_select_both);
  m.def("knn_rank", &knn_rank);
  m.def("knn_scores", &knn_scores);
  m.def("knn_halves", &knn_halves);
}
