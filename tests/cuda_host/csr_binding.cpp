// Binds the launchers of csrc/common/csr.cu, built for the host, to NumPy.
#include "csr_binding.h"

namespace {

Long scan(const Long& counts) {
  const int64_t n = counts.shape(0);
  Long values(n + 1);
  std::copy_n(counts.data(), n, values.mutable_data() + 1);
  std::vector<int64_t> tiles = scratch<int64_t>(dhcl::scan_tiles(n));
  dhcl::launch_scan({values.mutable_data(), tiles.data(), n}, nullptr);
  return values;
}

}  // namespace

PYBIND11_MODULE(csr_host, m) {
  def_common(m);
  m.def("scan", &scan);
}
