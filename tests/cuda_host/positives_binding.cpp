// Binds the launcher of csrc/positives.cu, built for the host, to NumPy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda_host.h"
#include "positives.h"

namespace py = pybind11;

namespace {

const int64_t* int64s(const py::array& a) { return static_cast<const int64_t*>(a.data()); }

// 16-bit banks travel as integers; the dtype comes as a number beside the array.
py::array_t<int64_t> hardest_positive(const py::array& features, const py::array& bank,
                                      const py::array& indices, const py::array& class_of,
                                      const py::array& members, const py::array& offsets,
                                      py::object cameras, int dtype) {
  py::array_t<int64_t> rows(indices.shape(0));
  dhcl::HardestPositiveParams p{};
  p.rows = rows.mutable_data();
  p.features = static_cast<const float*>(features.data());
  p.bank = bank.data();
  p.indices = int64s(indices);
  p.class_of = int64s(class_of);
  p.members = int64s(members);
  p.offsets = int64s(offsets);
  if (!cameras.is_none()) p.cameras = int64s(cameras.cast<py::array>());
  p.batch = indices.shape(0);
  p.num_rows = bank.shape(0);
  p.num_classes = offsets.shape(0) - 1;
  p.dim = bank.shape(1);
  p.dtype = static_cast<dhcl::BankDtype>(dtype);
  dhcl::launch_hardest_positive(p, nullptr);
  return rows;
}

}  // namespace

PYBIND11_MODULE(positives_host, m) {
  m.def("set_schedule", &cuda_host::set_schedule);
  m.def("hardest_positive", &hardest_positive);
}
