// What bindings of families with rows of lists share: arrays, scratch memory, and the making of
// rows as csrc/common/csr_glue.h does it. The size of the pool and of the tables can be set, so
// that small inputs reach the paths for rows that do not fit.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "common/csr.h"
#include "cuda_host.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;
using Long = Array<int64_t>;
using Int = Array<int32_t>;
using Short = Array<int16_t>;
using Float = Array<float>;

// How often each path was taken since the last reset.
int64_t large_rows = 0, wide_rows = 0, second_pools = 0;

template <typename T>
std::vector<T> scratch(int64_t n) {
  // What a kernel reads before it writes must show.
  return std::vector<T>(n, static_cast<T>(0x5a5a5a5a5a5a5a5aull));
}

template <typename Params>
py::tuple make_lines(Params p, int64_t begin, int64_t end, int64_t capacity, int64_t cells,
                     int64_t large_cells, bool valued, void (*launch)(const Params&, void*)) {
  const int64_t rows = end - begin;
  Long offsets(rows + 1);
  std::vector<int64_t> starts = scratch<int64_t>(rows);
  std::vector<uint64_t> pool;
  std::vector<int32_t> wide;
  std::vector<int64_t> left = scratch<int64_t>(2 * rows);
  int64_t state[3] = {0, 0, 0};
  p.lines.offsets = offsets.mutable_data();
  p.lines.starts = starts.data();
  p.lines.state = state;
  p.lines.left = left.data();
  p.lines.begin = begin;
  p.lines.rows = rows;
  p.table.cells = cells;
  // By default a row that a near table does not hold is one for a wide table.
  p.table.large_cells = large_cells > 0 ? large_cells : cells;
  for (;;) {
    pool = scratch<uint64_t>(capacity);
    p.lines.pool = pool.data();
    p.lines.capacity = capacity;
    p.table.wide = nullptr;
    launch(p, nullptr);
    large_rows += state[1] - state[2];
    wide_rows += state[2];
    if (state[2] > 0) {
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

// Binds what every such module has.
inline void def_common(py::module_& m) {
  m.def("set_schedule", &cuda_host::set_schedule);
  m.def("paths", [] {
    const py::tuple taken = py::make_tuple(wide_rows, second_pools);
    wide_rows = second_pools = 0;
    return taken;
  });
  m.def("large_rows", [] { return std::exchange(large_rows, 0); });
}

}  // namespace
