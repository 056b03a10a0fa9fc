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

void weigh(const py::array& products, const py::tuple& roles, const py::tuple& listed,
           int64_t start, double scale, int dtype, const py::tuple& units) {
  dhcl::ContrastiveWeighParams p{};
  p.products = data<void>(products);
  p.roles = roles_of(roles);
  p.listed.rows = data<int64_t>(listed[0]);
  p.listed.offsets = data<int64_t>(listed[1]);
  p.listed.entries = data<int64_t>(listed[2]);
  p.listed.logs = data<float>(listed[3]);
  p.listed.members = data<int64_t>(listed[4]);
  p.listed.member_offsets = data<int64_t>(listed[5]);
  p.listed.num_lists = listed[1].cast<py::array>().shape(0) - 1;
  p.row_units = data<float>(units[0]);
  p.column_units = data<float>(units[1]);
  p.num_rows = products.shape(0);
  p.num_cols = products.shape(1);
  p.start = start;
  p.scale = scale;
  p.dtype = static_cast<ContrastiveDtype>(dtype);
  dhcl::launch_contrastive_weigh(p, nullptr);
}

void stream(const py::object& state, const py::object& counts, const py::object& positives,
            const py::array& products, const py::object& weights, const py::object& factors,
            const py::tuple& roles, int64_t start, double scale, double beta, double weight_scale,
            int dtype, int weight_dtype, bool fresh, const py::tuple& pieces) {
  dhcl::ContrastiveStreamParams p{};
  p.state = data<double>(state);
  p.counts = data<int64_t>(counts);
  p.positives = data<double>(positives);
  p.products = data<void>(products);
  p.weights = data<void>(weights);
  p.factors = data<void>(factors);
  p.row_units = data<float>(pieces[0]);
  p.column_units = data<float>(pieces[1]);
  p.low_weights = data<void>(pieces[2]);
  p.largest_units = data<float>(pieces[3]);
  p.roles = roles_of(roles);
  p.num_rows = products.shape(0);
  p.num_cols = pieces[1].is_none() ? products.shape(1) : pieces[1].cast<py::array>().shape(0);
  p.pitch = products.shape(1);
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

void split(const py::array& operand, const py::array& units, const py::array& rows, int terms,
           unsigned low_terms, int dtype) {
  dhcl::ContrastiveSplitParams p{};
  p.operand = data<void>(operand);
  p.units = data<float>(units);
  p.rows = data<void>(rows);
  p.num_rows = rows.shape(0);
  p.dim = rows.shape(1);
  p.terms = terms;
  p.low_terms = low_terms;
  p.dtype = static_cast<ContrastiveDtype>(dtype);
  dhcl::launch_contrastive_split(p, nullptr);
}

void fold_pieces(const py::array& sums, const py::array& part, const py::array& low_part,
                 const py::array& factors, const py::array& units, bool fresh) {
  dhcl::ContrastiveFoldPiecesParams p{};
  p.sums = data<float>(sums);
  p.part = data<float>(part);
  p.low_part = data<float>(low_part);
  p.factors = data<float>(factors);
  p.units = data<float>(units);
  p.num_rows = sums.shape(0);
  p.dim = sums.shape(1);
  p.pieces = sums.shape(1) == 0 ? 1 : static_cast<int>(part.shape(1) / sums.shape(1));
  p.fresh = fresh;
  dhcl::launch_contrastive_fold_pieces(p, nullptr);
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
  m.def("weigh", &weigh);
  m.def("stream", &stream);
  m.def("split", &split);
  m.def("fold_pieces", &fold_pieces);
  m.def("fold", &fold);
  m.def("gradient", &gradient);
  m.def("finish", &finish);
  m.def("slopes", &slopes);
}
