// Binds the launchers of csrc/reciprocal.cu, built for the host, to NumPy.
#include "csr_binding.h"
#include "reciprocal.h"

namespace {

Short reciprocal_positions(const Int& ranks) {
  Short positions({ranks.shape(0), ranks.shape(1)});
  dhcl::launch_reciprocal_positions(
      {positions.mutable_data(), ranks.data(), ranks.shape(0), ranks.shape(1)}, nullptr);
  return positions;
}

py::tuple k_reciprocal(const Int& ranks, const Short& positions, int64_t k, int64_t half,
                       int64_t begin, int64_t end, int64_t capacity, int64_t cells,
                       int64_t large_cells) {
  dhcl::KReciprocalParams p{};
  p.ranks = ranks.data();
  p.positions = positions.data();
  p.num_rows = ranks.shape(0);
  p.width = ranks.shape(1);
  p.k = k;
  p.half = half;
  return make_lines(p, begin, end, capacity, cells, large_cells, false, dhcl::launch_k_reciprocal);
}

Float pair_dots(const Float& features, const Int& ranks, py::object similarities,
                const Long& offsets, const Int& columns, int64_t begin) {
  Float dots(columns.shape(0));
  dhcl::PairDotsParams p{};
  p.dots = dots.mutable_data();
  p.features = features.data();
  p.ranks = ranks.data();
  if (!similarities.is_none()) p.similarities = similarities.cast<Float>().data();
  p.offsets = offsets.data();
  p.columns = columns.data();
  p.num_rows = features.shape(0);
  p.dim = features.shape(1);
  p.width = ranks.shape(1);
  p.begin = begin;
  p.rows = offsets.shape(0) - 1;
  dhcl::launch_pair_dots(p, nullptr);
  return dots;
}

Float softmax_rows(const Long& offsets, const Float& logits) {
  Float weights(logits.shape(0));
  dhcl::launch_softmax_rows(
      {weights.mutable_data(), logits.data(), offsets.data(), offsets.shape(0) - 1}, nullptr);
  return weights;
}

py::tuple query_expand(const Int& ranks, const Long& offsets, const Int& columns,
                       const Float& values, int64_t k2, int64_t begin, int64_t end,
                       int64_t capacity, int64_t cells, int64_t large_cells) {
  dhcl::QueryExpandParams p{};
  p.ranks = ranks.data();
  p.offsets = offsets.data();
  p.columns = columns.data();
  p.values = values.data();
  p.num_rows = offsets.shape(0) - 1;
  p.width = ranks.shape(1);
  p.k2 = k2;
  return make_lines(p, begin, end, capacity, cells, large_cells, true, dhcl::launch_query_expand);
}

}  // namespace

PYBIND11_MODULE(reciprocal_host, m) {
  def_common(m);
  const auto capacity = py::arg("capacity") = 1024, cells = py::arg("cells") = dhcl::kTableCells,
             large_cells = py::arg("large_cells") = 0;
  const auto a = [](const char* name) { return py::arg(name); };
  m.def("reciprocal_positions", &reciprocal_positions);
  m.def("k_reciprocal", &k_reciprocal, a("ranks"), a("positions"), a("k"), a("half"), a("begin"),
        a("end"), capacity, cells, large_cells);
  m.def("pair_dots", &pair_dots);
  m.def("softmax_rows", &softmax_rows);
  m.def("query_expand", &query_expand, a("ranks"), a("offsets"), a("columns"), a("values"), a("k2"),
        a("begin"), a("end"), capacity, cells, large_cells);
}
