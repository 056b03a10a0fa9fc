// Binds the launcher of csrc/dbscan.cu, built for the host, to NumPy.
#include "csr_binding.h"
#include "dbscan.h"

namespace {

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

PYBIND11_MODULE(dbscan_host, m) {
  def_common(m);
  m.def("dbscan", &dbscan);
}
