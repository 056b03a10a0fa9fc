// Binds the launchers of csrc/memory.cu, built for the host, to NumPy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda_host.h"
#include "memory.h"

namespace py = pybind11;
using dhcl::Dtype;

namespace {

// 16-bit formats travel as uint16; the dtype comes as a number beside the array.
const int64_t* int64s(const py::array& a) { return static_cast<const int64_t*>(a.data()); }

void momentum_update(py::array bank, const py::array& features, const py::array& indices,
                     float momentum, float one_minus_momentum, float eps, py::object skipped,
                     int bank_dtype, int feature_dtype) {
  dhcl::MomentumParams p{};
  p.bank = bank.mutable_data();
  p.features = features.data();
  p.indices = int64s(indices);
  if (!skipped.is_none())
    p.skipped = static_cast<int64_t*>(skipped.cast<py::array>().mutable_data());
  p.num_rows = bank.shape(0);
  p.batch = indices.shape(0);
  p.dim = bank.shape(1);
  p.momentum = momentum;
  p.one_minus_momentum = one_minus_momentum;
  p.eps = eps;
  p.bank_dtype = static_cast<Dtype>(bank_dtype);
  p.feature_dtype = static_cast<Dtype>(feature_dtype);
  dhcl::launch_momentum_update(p, nullptr);
}

void segment_mean(py::array means, const py::array& rows, const py::array& members,
                  const py::array& offsets, py::object classes, bool normalize, int dtype,
                  py::object class_of) {
  dhcl::SegmentMeanParams p{};
  p.means = means.mutable_data();
  p.rows = rows.data();
  p.members = int64s(members);
  p.offsets = int64s(offsets);
  p.num_rows = rows.shape(0);
  p.num_classes = offsets.shape(0) - 1;
  if (!classes.is_none()) {
    const auto listed = classes.cast<py::array>();
    p.listed = int64s(listed);
    p.num_listed = listed.shape(0);
  }
  if (!class_of.is_none()) p.class_of = int64s(class_of.cast<py::array>());
  p.dim = rows.shape(1);
  p.normalize = normalize;
  p.dtype = static_cast<Dtype>(dtype);
  dhcl::launch_segment_mean(p, nullptr);
}

void segment_mean_backward(py::array grad_rows, const py::array& grad, const py::array& members,
                           const py::array& offsets, int dtype) {
  dhcl::SegmentMeanBackwardParams p{};
  p.grad_rows = grad_rows.mutable_data();
  p.grad = grad.data();
  p.members = int64s(members);
  p.offsets = int64s(offsets);
  p.num_rows = members.shape(0);
  p.num_classes = offsets.shape(0) - 1;
  p.dim = grad.shape(1);
  p.dtype = static_cast<Dtype>(dtype);
  dhcl::launch_segment_mean_backward(p, nullptr);
}

}  // namespace

PYBIND11_MODULE(memory_host, m) {
  m.def("set_schedule", &cuda_host::set_schedule);
  m.def("momentum_update", &momentum_update);
  const auto a = [](const char* name) { return py::arg(name); };
  m.def("segment_mean", &segment_mean, a("means"), a("rows"), a("members"), a("offsets"),
        a("classes"), a("normalize"), a("dtype"), a("class_of") = py::none());
  m.def("segment_mean_backward", &segment_mean_backward);
}
