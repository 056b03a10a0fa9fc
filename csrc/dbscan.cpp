// DBSCAN on the CPU, and the glue that registers the CPU and CUDA kernels with torch. What the
// labels are is in dbscan.h; the CUDA kernels are in dbscan.cu.
#include "dbscan.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/csr_glue.h"

namespace dhcl {
namespace {

// Which rows are core, after a look at every entry.
std::vector<uint8_t> core_rows(const DbscanParams& p) {
  std::vector<uint8_t> core(p.num_rows, 0);
  parallel_rows(p.num_rows, 16, p.offsets[p.num_rows], [&](int64_t i) {
    int64_t degree = 0;
    for (int64_t e = p.offsets[i]; e < p.offsets[i + 1]; ++e) {
      check(p.columns[e] >= 0 && p.columns[e] < p.num_rows, "dbscan: columns must be in [0, ",
            p.num_rows, ") (got ", p.columns[e], " in row ", i, ")");
      degree += p.values[e] <= p.eps;
    }
    core[i] = degree >= p.min_samples;
  });
  return core;
}

// Components of the core rows. The root of one is its smallest row, so that clusters are numbered
// by their roots.
class Components {
 public:
  explicit Components(int64_t n) : parent_(n) { std::iota(parent_.begin(), parent_.end(), 0); }
  int64_t root(int64_t i) {
    while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
    return i;
  }
  void unite(int64_t i, int64_t j) {
    const int64_t a = root(i), b = root(j);
    parent_[std::max(a, b)] = std::min(a, b);
  }

 private:
  std::vector<int64_t> parent_;
};

void run_dbscan(const DbscanParams& p) {
  const std::vector<uint8_t> core = core_rows(p);
  const auto joins = [&](int64_t e) { return p.values[e] <= p.eps && core[p.columns[e]]; };
  Components components(p.num_rows);
  for (int64_t i = 0; i < p.num_rows; ++i) {
    if (!core[i]) continue;
    for (int64_t e = p.offsets[i]; e < p.offsets[i + 1] && p.columns[e] < i; ++e)
      if (joins(e)) components.unite(i, p.columns[e]);
  }
  int64_t clusters = 0;
  for (int64_t i = 0; i < p.num_rows; ++i) {
    p.labels[i] = -1;
    if (!core[i]) continue;
    const int64_t root = components.root(i);
    p.labels[i] = root == i ? clusters++ : p.labels[root];
  }
  parallel_rows(p.num_rows, 16, p.offsets[p.num_rows], [&](int64_t i) {
    if (core[i]) return;
    int64_t lowest = -1;
    for (int64_t e = p.offsets[i]; e < p.offsets[i + 1]; ++e) {
      if (!joins(e)) continue;
      const int64_t label = p.labels[p.columns[e]];
      lowest = lowest < 0 ? label : std::min(lowest, label);
    }
    p.labels[i] = lowest;
  });
}

template <typename Device>
Tensor dbscan(const Tensor& offsets_in, const Tensor& columns_in, const Tensor& values_in,
              double eps, int64_t min_samples) {
  constexpr const char* op = "dbscan";
  check_offsets(op, offsets_in);
  check_int64(op, "columns", columns_in);
  check_float(op, "values", values_in);
  const Tensor offsets = torch::stable::contiguous(offsets_in);
  const Tensor columns = torch::stable::contiguous(columns_in);
  const Tensor values = torch::stable::contiguous(values_in);
  check_length(op, "values", values, columns.size(0));
  check_lists<Device>(op, "offsets", offsets, columns.size(0));
  const int64_t n = offsets.size(0) - 1;
  const Tensor labels = new_int64(offsets, n);
  // The kernels' scratch; the CPU code needs none of it.
  const auto scratch = [&](int64_t size) { return new_int64(offsets, Device::kCuda ? size : 0); };
  const Tensor parent = scratch(n), number = scratch(n + 1), tiles = scratch(scan_tiles(n));
  DbscanParams p{};
  p.labels = int64_out(labels);
  p.parent = int64_out(parent);
  p.number = int64_out(number);
  p.tiles = int64_out(tiles);
  p.offsets = int64_data(offsets);
  p.columns = int64_data(columns);
  p.values = float_data(values);
  p.num_rows = n;
  p.min_samples = min_samples;
  p.eps = static_cast<float>(eps);
  Device::template run<run_dbscan, launch_dbscan>(offsets, p);
  return labels;
}

template <typename Device, typename Library>
void register_ops(Library& m) {
  m.impl("dbscan", TORCH_BOX(&dbscan<Device>));
}

}  // namespace
}  // namespace dhcl

STABLE_TORCH_LIBRARY_IMPL(dhcl, CPU, m) { dhcl::register_ops<dhcl::Cpu>(m); }

#ifdef DHCL_CUDA
STABLE_TORCH_LIBRARY_IMPL(dhcl, CUDA, m) { dhcl::register_ops<dhcl::Cuda>(m); }
#endif
