// Binds the launchers of csrc/knn.cu, built for the host, to NumPy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda_host.h"
#include "knn.h"

namespace py = pybind11;

namespace {

void knn_select(py::array_t<float> values, py::array_t<int32_t> indices,
                py::array_t<int32_t> counts, py::array_t<float> thresholds,
                const py::array_t<float>& tile, int64_t row_start, int64_t col_start, int64_t keep,
                bool self_search) {
  dhcl::KnnSelectParams p{};
  p.values = values.mutable_data();
  p.indices = indices.mutable_data();
  p.counts = counts.mutable_data();
  p.thresholds = thresholds.mutable_data();
  p.tile = tile.data();
  p.num_rows = values.shape(0);
  p.capacity = values.shape(1);
  p.tile_rows = tile.shape(0);
  p.tile_cols = tile.shape(1);
  p.row_start = row_start;
  p.col_start = col_start;
  p.keep = keep;
  p.self_search = self_search;
  dhcl::launch_knn_select(p, nullptr);
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

}  // namespace

PYBIND11_MODULE(knn_host, m) {
  m.def("set_schedule", &cuda_host::set_schedule);
  m.def("knn_select", &knn_select);
  m.def("knn_scores", &knn_scores);
}
