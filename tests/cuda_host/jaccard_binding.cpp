// Binds the launchers of csrc/jaccard.cu, built for the host, to NumPy.
#include "csr_binding.h"
#include "jaccard.h"

namespace {

py::tuple inverted_index(const Long& offsets, const Int& columns, const Float& values, double eps) {
  const int64_t n = offsets.shape(0) - 1, nnz = columns.shape(0);
  Int order(nnz), prefix(n), list_rows(nnz);
  Long list_offsets(n + 1), list_split(n);
  Float list_values(nnz);
  std::vector<uint64_t> pool = scratch<uint64_t>(nnz);
  std::vector<int64_t> next = scratch<int64_t>(n);
  std::vector<int64_t> tiles = scratch<int64_t>(dhcl::scan_tiles(n));
  int64_t longest = 12345;
  dhcl::IndexParams p{};
  p.order = order.mutable_data();
  p.prefix = prefix.mutable_data();
  p.list_offsets = list_offsets.mutable_data();
  p.list_split = list_split.mutable_data();
  p.list_rows = list_rows.mutable_data();
  p.list_values = list_values.mutable_data();
  p.offsets = offsets.data();
  p.columns = columns.data();
  p.values = values.data();
  p.pool = pool.data();
  p.next = next.data();
  p.tiles = tiles.data();
  p.longest = &longest;
  p.num_rows = n;
  p.nnz = nnz;
  p.eps = static_cast<float>(eps);
  dhcl::launch_inverted_index(p, nullptr);
  return py::make_tuple(order, prefix, list_offsets, list_split, list_rows, list_values);
}

py::tuple jaccard_join(const Long& offsets, const Int& columns, const Float& values,
                       const Int& order, const Int& prefix, const Long& list_offsets,
                       const Long& list_split, const Int& list_rows, const Float& list_values,
                       double eps, int64_t begin, int64_t end, int64_t capacity, int64_t cells,
                       int64_t large_cells) {
  int64_t longest = 12345;
  dhcl::JoinParams p{};
  p.offsets = offsets.data();
  p.columns = columns.data();
  p.values = values.data();
  p.order = order.data();
  p.prefix = prefix.data();
  p.list_offsets = list_offsets.data();
  p.list_split = list_split.data();
  p.list_rows = list_rows.data();
  p.list_values = list_values.data();
  p.longest = &longest;
  p.num_rows = offsets.shape(0) - 1;
  p.mean_row = p.num_rows == 0 ? 0 : columns.shape(0) / p.num_rows + 1;
  p.eps = static_cast<float>(eps);
  return make_lines(p, begin, end, capacity, cells, large_cells, true, dhcl::launch_jaccard_join);
}

py::tuple mirror_csr(const Long& offsets, const Int& columns, const Float& values) {
  const int64_t n = offsets.shape(0) - 1;
  Long full_offsets(n + 1);
  std::vector<int64_t> next = scratch<int64_t>(n);
  std::vector<int64_t> tiles = scratch<int64_t>(dhcl::scan_tiles(n));
  dhcl::MirrorParams p{};
  p.full_offsets = full_offsets.mutable_data();
  p.next = next.data();
  p.offsets = offsets.data();
  p.columns = columns.data();
  p.values = values.data();
  p.num_rows = n;
  dhcl::launch_mirror_count(p, nullptr);
  dhcl::launch_scan({p.full_offsets, tiles.data(), n}, nullptr);
  const int64_t nnz = full_offsets.at(n);
  std::vector<uint64_t> pool = scratch<uint64_t>(nnz);
  p.pool = pool.data();
  dhcl::launch_mirror_fill(p, nullptr);
  Long full_columns(nnz);
  Float full_values(nnz);
  dhcl::GatherParams g{};
  g.offsets = g.starts = full_offsets.data();
  g.pool = pool.data();
  g.columns64 = full_columns.mutable_data();
  g.values = full_values.mutable_data();
  g.rows = n;
  dhcl::launch_gather_lines(g, nullptr);
  return py::make_tuple(full_offsets, full_columns, full_values);
}

Float jaccard_rows(const Long& offsets, const Int& columns, const Float& values,
                   const Long& list_offsets, const Int& list_rows, const Float& list_values,
                   int64_t begin, int64_t end) {
  const int64_t n = offsets.shape(0) - 1;
  Float distances({end - begin, n});
  dhcl::launch_jaccard_rows(
      {distances.mutable_data(), offsets.data(), columns.data(), values.data(), list_offsets.data(),
       list_rows.data(), list_values.data(), n, begin, end - begin},
      nullptr);
  return distances;
}

}  // namespace

PYBIND11_MODULE(jaccard_host, m) {
  def_common(m);
  const auto capacity = py::arg("capacity") = 1024, cells = py::arg("cells") = dhcl::kTableCells,
             large_cells = py::arg("large_cells") = 0;
  const auto a = [](const char* name) { return py::arg(name); };
  m.def("inverted_index", &inverted_index);
  m.def("jaccard_join", &jaccard_join, a("offsets"), a("columns"), a("values"), a("order"),
        a("prefix"), a("list_offsets"), a("list_split"), a("list_rows"), a("list_values"), a("eps"),
        a("begin"), a("end"), capacity, cells, large_cells);
  m.def("mirror_csr", &mirror_csr);
  m.def("jaccard_rows", &jaccard_rows);
}
