// Binds the launchers of csrc/jaccard.cu, built for the host, to NumPy. Each function allocates and
// launches as the glue in csrc/jaccard.cpp does; the size of the pool and of the tables can be set,
// so that small inputs reach the paths for rows that do not fit.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "cuda_host.h"
#include "jaccard.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using Long = Array<int64_t>;
using Int = Array<int32_t>;
using Short = Array<int16_t>;
using Float = Array<float>;

// How often each path was taken since the last reset.
int64_t wide_rows = 0, second_pools = 0;

template <typename T>
std::vector<T> scratch(int64_t n) {
  // What a kernel reads before it writes must show.
  return std::vector<T>(n, static_cast<T>(0x5a5a5a5a5a5a5a5aull));
}

template <typename Params>
py::tuple make_lines(Params p, int64_t begin, int64_t end, int64_t capacity, int64_t cells,
                     bool valued, void (*launch)(const Params&, void*)) {
  const int64_t rows = end - begin;
  Long offsets(rows + 1);
  std::vector<int64_t> starts = scratch<int64_t>(rows);
  std::vector<uint64_t> pool;
  std::vector<int32_t> wide;
  int64_t state[2] = {0, 0};
  p.lines.offsets = offsets.mutable_data();
  p.lines.starts = starts.data();
  p.lines.state = state;
  p.lines.begin = begin;
  p.lines.rows = rows;
  p.table.cells = cells;
  for (;;) {
    pool = scratch<uint64_t>(capacity);
    p.lines.pool = pool.data();
    p.lines.capacity = capacity;
    p.table.wide = nullptr;
    launch(p, nullptr);
    wide_rows += state[1];
    if (state[1] > 0) {
      p.table.slices = 2;
      wide = scratch<int32_t>(p.table.slices * 2 * p.num_rows);
      p.table.wide = wide.data();
      launch(p, nullptr);
    }
    if (state[0] <= capacity) break;
    capacity = state[0];
    ++second_pools;
  }
  std::vector<int64_t> tiles = scratch<int64_t>(dhcl::scan_tiles(rows));
  dhcl::launch_scan({offsets.mutable_data(), tiles.data(), rows}, nullptr);
  Int columns(state[0]);
  Float values(valued ? state[0] : 0);
  dhcl::GatherParams g{};
  g.offsets = offsets.data();
  g.starts = starts.data();
  g.pool = pool.data();
  g.columns = columns.mutable_data();
  g.values = valued ? values.mutable_data() : nullptr;
  g.rows = rows;
  dhcl::launch_gather_lines(g, nullptr);
  return py::make_tuple(offsets, columns, values);
}

Long scan(const Long& counts) {
  const int64_t n = counts.shape(0);
  Long values(n + 1);
  std::copy_n(counts.data(), n, values.mutable_data() + 1);
  std::vector<int64_t> tiles = scratch<int64_t>(dhcl::scan_tiles(n));
  dhcl::launch_scan({values.mutable_data(), tiles.data(), n}, nullptr);
  return values;
}

Short reciprocal_positions(const Int& ranks) {
  Short positions({ranks.shape(0), ranks.shape(1)});
  dhcl::launch_reciprocal_positions(
      {positions.mutable_data(), ranks.data(), ranks.shape(0), ranks.shape(1)}, nullptr);
  return positions;
}

py::tuple k_reciprocal(const Int& ranks, const Short& positions, int64_t k, int64_t half,
                       int64_t begin, int64_t end, int64_t capacity, int64_t cells) {
  dhcl::KReciprocalParams p{};
  p.ranks = ranks.data();
  p.positions = positions.data();
  p.num_rows = ranks.shape(0);
  p.width = ranks.shape(1);
  p.k = k;
  p.half = half;
  return make_lines(p, begin, end, capacity, cells, false, dhcl::launch_k_reciprocal);
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
                       int64_t capacity, int64_t cells) {
  dhcl::QueryExpandParams p{};
  p.ranks = ranks.data();
  p.offsets = offsets.data();
  p.columns = columns.data();
  p.values = values.data();
  p.num_rows = offsets.shape(0) - 1;
  p.width = ranks.shape(1);
  p.k2 = k2;
  return make_lines(p, begin, end, capacity, cells, true, dhcl::launch_query_expand);
}

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
                       double eps, int64_t begin, int64_t end, int64_t capacity, int64_t cells) {
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
  return make_lines(p, begin, end, capacity, cells, true, dhcl::launch_jaccard_join);
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

Long dbscan(const Long& offsets, const Long& columns, const Float& values, double eps,
            int64_t min_samples) {
  const int64_t n = offsets.shape(0) - 1;
  Long labels(n);
  std::vector<int64_t> parent = scratch<int64_t>(n), number = scratch<int64_t>(n + 1);
  std::vector<int64_t> tiles = scratch<int64_t>(dhcl::scan_tiles(n));
  dhcl::launch_dbscan(
      {labels.mutable_data(), parent.data(), number.data(), tiles.data(), offsets.data(),
       columns.data(), values.data(), n, min_samples, static_cast<float>(eps)},
      nullptr);
  return labels;
}

}  // namespace

PYBIND11_MODULE(jaccard_host, m) {
  m.def("set_schedule", &cuda_host::set_schedule);
  m.def("paths", [] {
    const py::tuple taken = py::make_tuple(wide_rows, second_pools);
    wide_rows = second_pools = 0;
    return taken;
  });
  const auto capacity = py::arg("capacity") = 1024, cells = py::arg("cells") = dhcl::kTableCells;
  const auto a = [](const char* name) { return py::arg(name); };
  m.def("scan", &scan);
  m.def("reciprocal_positions", &reciprocal_positions);
  m.def("k_reciprocal", &k_reciprocal, a("ranks"), a("positions"), a("k"), a("half"), a("begin"),
        a("end"), capacity, cells);
  m.def("pair_dots", &pair_dots);
  m.def("softmax_rows", &softmax_rows);
  m.def("query_expand", &query_expand, a("ranks"), a("offsets"), a("columns"), a("values"), a("k2"),
        a("begin"), a("end"), capacity, cells);
  m.def("inverted_index", &inverted_index);
  m.def("jaccard_join", &jaccard_join, a("offsets"), a("columns"), a("values"), a("order"),
        a("prefix"), a("list_offsets"), a("list_split"), a("list_rows"), a("list_values"), a("eps"),
        a("begin"), a("end"), capacity, cells);
  m.def("mirror_csr", &mirror_csr);
  m.def("jaccard_rows", &jaccard_rows);
  m.def("dbscan", &dbscan);
}
