// Binds the launchers of csrc/contrastive.cu, built for the host, to NumPy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "contrastive.h"
#include "cuda_host.h"

namespace py = pybind11;
using dhcl::ContrastiveDtype;

namespace {

// An array's data, or null for None. 16-bit formats travel as uint16.
template <typename T>
T* data(const py::object& o) {
  return o.is_none() ? nullptr : static_cast<T*>(o.cast<py::array>().mutable_data());
}
int64_t columns(const py::object& o) { return o.is_none() ? 0 : o.cast<py::array>().shape(1); }

dhcl::ContrastiveRoles roles_of(const py::tuple& t) {
  dhcl::ContrastiveRoles roles{};
  roles.labels = data<int64_t>(t[0]);
  roles.proxy_labels = data<int64_t>(t[1]);
  roles.row_groups = data<int64_t>(t[2]);
  roles.column_groups = data<int64_t>(t[3]);
  roles.excluded = data<int64_t>(t[4]);
  roles.num_excluded = columns(t[4]);
  return roles;
}

void stream(const py::object& state, const py::object& counts, const py::object& positives,
            const py::array& products, const py::object& weights, const py::object& factors,
            const py::tuple& roles, int64_t start, double scale, double beta, double weight_scale,
            int dtype, int weight_dtype, bool fresh) {
  dhcl::ContrastiveStreamParams p{};
  p.state = data<double>(state);
  p.counts = data<int64_t>(counts);
  p.positives = data<double>(positives);
  p.products = data<void>(products);
  p.weights = data<void>(weights);
  p.factors = data<void>(factors);
  p.roles = roles_of(roles);
  p.num_rows = products.shape(0);
  p.num_cols = products.shape(1);
  p.num_slots = columns(positives);
  p.start = start;
  p.scale = scale;
  p.beta = beta;
  p.weight_scale = weight_scale;
  p.fresh = fresh;
  p.dtype = static_cast<ContrastiveDtype>(dtype);
  p.weight_dtype = static_cast<ContrastiveDtype>(weight_dtype);
  dhcl::launch_contrastive_stream(p, nullptr);
}

void finish(const py::array& loss, const py::array& rows, const py::array& state,
            const py::array& counts, const py::object& positives, const py::array& kappa,
            bool prior, int aggregation, double temperature, double beta, bool through) {
  dhcl::ContrastiveFinishParams p{};
  p.loss = data<double>(loss);
  p.rows = data<double>(rows);
  p.state = data<double>(state);
  p.counts = data<int64_t>(counts);
  p.positives = data<double>(positives);
  p.kappa = data<double>(kappa);
  p.num_rows = state.shape(0);
  p.num_slots = columns(positives);
  p.temperature = temperature;
  p.beta = beta;
  p.aggregation = static_cast<dhcl::Aggregation>(aggregation);
  p.prior = prior;
  p.through = through;
  dhcl::launch_contrastive_finish(p, nullptr);
}

void slopes(const py::array& products, const py::array& rows, const py::array& state,
            const py::array& counts, const py::array& grad, const py::tuple& roles, int64_t start,
            double scale, double beta, int aggregation, int dtype) {
  dhcl::ContrastiveSlopesParams p{};
  p.products = data<void>(products);
  p.rows = data<double>(rows);
  p.state = data<double>(state);
  p.counts = data<int64_t>(counts);
  p.grad = data<double>(grad);
  p.roles = roles_of(roles);
  p.num_rows = products.shape(0);
  p.num_cols = products.shape(1);
  p.start = start;
  p.scale = scale;
  p.beta = beta;
  p.aggregation = static_cast<dhcl::Aggregation>(aggregation);
  p.dtype = static_cast<ContrastiveDtype>(dtype);
  dhcl::launch_contrastive_slopes(p, nullptr);
}

void fold(const py::array& sums, const py::object& part, const py::array& factors, int dtype) {
  dhcl::ContrastiveFoldParams p{};
  p.sums = data<void>(sums);
  p.part = data<void>(part);
  p.factors = data<void>(factors);
  p.num_rows = sums.shape(0);
  p.dim = sums.shape(1);
  p.dtype = static_cast<ContrastiveDtype>(dtype);
  dhcl::launch_contrastive_fold(p, nullptr);
}

void gradient(const py::array& sums, const py::array& rows, const py::array& proxies,
              const py::object& labels, double unit, double temperature, int dtype,
              int proxy_dtype) {
  dhcl::ContrastiveGradientParams p{};
  p.gradient = data<void>(sums);
  p.rows = data<double>(rows);
  p.proxies = data<void>(proxies);
  p.labels = data<int64_t>(labels);
  p.num_rows = sums.shape(0);
  p.num_proxies = proxies.shape(0);
  p.dim = sums.shape(1);
  p.unit = unit;
  p.temperature = temperature;
  p.dtype = static_cast<ContrastiveDtype>(dtype);
  p.proxy_dtype = static_cast<ContrastiveDtype>(proxy_dtype);
  dhcl::launch_contrastive_gradient(p, nullptr);
}

}  // namespace

PYBIND11_MODULE(contrastive_host, m) {
  m.def("set_schedule", &cuda_host::set_schedule);
  m.def("stream", &stream);
  m.def("fold", &fold);
  m.def("gradient", &gradient);
  m.def("finish", &finish);
  m.def("slopes", &slopes);
}
