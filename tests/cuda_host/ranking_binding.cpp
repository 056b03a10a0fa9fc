// Binds the launcher of csrc/ranking.cu, built for the host, to NumPy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda_host.h"
#include "ranking.h"

namespace py = pybind11;

namespace {

const int64_t* int64s(const py::array& a) { return static_cast<const int64_t*>(a.data()); }

void match_ranks(py::array_t<int64_t> ranks, const py::array& distance, const py::array& members,
                 const py::array& begin, const py::array& offsets, py::object query_cameras,
                 py::object gallery_cameras, bool is_double) {
  dhcl::MatchRanksParams p{};
  p.ranks = ranks.mutable_data();
  p.distance = distance.data();
  p.members = int64s(members);
  p.begin = int64s(begin);
  p.offsets = int64s(offsets);
  if (!query_cameras.is_none()) {
    p.query_cameras = int64s(query_cameras.cast<py::array>());
    p.gallery_cameras = int64s(gallery_cameras.cast<py::array>());
  }
  p.num_queries = distance.shape(0);
  p.num_gallery = distance.shape(1);
  p.is_double = is_double;
  dhcl::launch_match_ranks(p, nullptr);
}

}  // namespace

PYBIND11_MODULE(ranking_host, m) {
  m.def("set_schedule", &cuda_host::set_schedule);
  m.def("match_ranks", &match_ranks);
}
