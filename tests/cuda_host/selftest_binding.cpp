#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>

#include "cuda_host.h"
#include "selftest.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Extent = std::array<unsigned, 3>;

Extent extent(const py::tuple& t) {
  return {t[0].cast<unsigned>(), t[1].cast<unsigned>(), t[2].cast<unsigned>()};
}

unsigned volume(const Extent& e) { return e[0] * e[1] * e[2]; }

template <typename T>
Array<T> filled(std::vector<py::ssize_t> shape, T value) {
  Array<T> array(std::move(shape));
  std::fill_n(array.mutable_data(), array.size(), value);
  return array;
}

template <typename T>
py::tuple atomics(Array<T> cells, Array<T> values) {
  Array<T> result = filled<T>({8}, 0);
  std::copy_n(cells.data(), 8, result.mutable_data());
  Array<T> old = filled<T>({values.size()}, 0);
  selftest::atomics(result.mutable_data(), values.data(), old.mutable_data(),
                    static_cast<int>(values.size()));
  return py::make_tuple(result, old);
}

void def_warps(py::module_& m) {
  using selftest::WarpOp;
  py::enum_<WarpOp>(m, "WarpOp")
      .value("shfl", WarpOp::kShfl)
      .value("shfl_up", WarpOp::kShflUp)
      .value("shfl_down", WarpOp::kShflDown)
      .value("shfl_xor", WarpOp::kShflXor)
      .value("ballot", WarpOp::kBallot)
      .value("any", WarpOp::kAny)
      .value("all", WarpOp::kAll)
      .value("match_any", WarpOp::kMatchAny)
      .value("match_all", WarpOp::kMatchAll)
      .value("reduce_add", WarpOp::kReduceAdd)
      .value("reduce_min", WarpOp::kReduceMin)
      .value("reduce_max", WarpOp::kReduceMax)
      .value("reduce_and", WarpOp::kReduceAnd)
      .value("reduce_or", WarpOp::kReduceOr)
      .value("reduce_xor", WarpOp::kReduceXor);

  m.def("warp_op",
        [](WarpOp op, Array<unsigned> mask, Array<int> value, Array<int> arg, int width) {
          Array<int> out = filled<int>({mask.size()}, -1);
          selftest::warp_op(op, mask.data(), value.data(), arg.data(), width, out.mutable_data(),
                            static_cast<int>(mask.size()));
          return out;
        });
  m.def("shuffle_types", [](Array<int> value) {
    Array<double> out = filled<double>({value.size(), 10}, -1);
    selftest::shuffle_types(value.data(), out.mutable_data(), static_cast<int>(value.size()));
    return out;
  });
}

void def_blocks(py::module_& m) {
  m.def("row_sums", [](Array<float> x, int threads) {
    Array<float> by_tree = filled<float>({x.shape(0)}, -1),
                 by_shuffle = filled<float>({x.shape(0)}, -1);
    const float* in = x.data();
    float* tree = by_tree.mutable_data();
    float* shuffle = by_shuffle.mutable_data();
    const int rows = static_cast<int>(x.shape(0)), columns = static_cast<int>(x.shape(1));
    {
      const py::gil_scoped_release release;  // several host threads may be in a launch at once
      selftest::row_sums(in, tree, shuffle, rows, columns, threads);
    }
    return py::make_tuple(by_tree, by_shuffle);
  });
  m.def("block_votes", [](Array<int> predicate) {
    Array<int> out = filled<int>({predicate.size(), 4}, -1);
    selftest::block_votes(predicate.data(), out.mutable_data(), static_cast<int>(predicate.size()));
    return out;
  });
  m.def("ring", [](int n, int stay, bool barrier) {
    Array<int> out = filled<int>({n}, -1);
    selftest::ring(out.mutable_data(), n, stay, barrier);
    return out;
  });
  m.def("record_order", [](int blocks, int threads) {
    Array<int> out = filled<int>({2 * blocks * threads, 3}, -1);
    selftest::record_order(out.mutable_data(), blocks, threads);
    return out;
  });
  m.def("coordinates", [](py::tuple grid, py::tuple block) {
    const Extent g = extent(grid), b = extent(block);
    Array<unsigned> out = filled<unsigned>({volume(g) * volume(b), 6}, ~0u);
    selftest::coordinates(out.mutable_data(), g.data(), b.data());
    return out;
  });
}

void def_numbers(py::module_& m) {
  m.def("atomics_int", &atomics<int>);
  m.def("atomics_unsigned", &atomics<unsigned>);
  m.def("atomics_unsigned_long_long", &atomics<unsigned long long>);
  m.def("floating_atomics", [](int n) {
    float f = 0;
    double d = 0;
    int counters[2] = {0, 0};
    selftest::floating_atomics(&f, &d, counters, n);
    return py::make_tuple(f, d, counters[0], counters[1]);
  });
  m.def("half_bits", [](Array<float> in) {
    Array<uint16_t> half = filled<uint16_t>({in.size()}, 1),
                    bfloat16 = filled<uint16_t>({in.size()}, 1);
    selftest::half_bits(in.data(), half.mutable_data(), bfloat16.mutable_data(), in.size());
    return py::make_tuple(half, bfloat16);
  });
  m.def("half_values", [](Array<uint16_t> in) {
    Array<float> half = filled<float>({in.size()}, -1), bfloat16 = filled<float>({in.size()}, -1);
    selftest::half_values(in.data(), half.mutable_data(), bfloat16.mutable_data(), in.size());
    return py::make_tuple(half, bfloat16);
  });
  m.def("bits", [](Array<uint64_t> in) {
    Array<int64_t> out = filled<int64_t>({in.size(), 12}, -1);
    selftest::bits(in.data(), out.mutable_data(), static_cast<int>(in.size()));
    return out;
  });
  m.def("rounding", [](Array<float> a, Array<float> b, Array<float> c) {
    Array<float> out = filled<float>({a.size(), 8}, -1);
    selftest::rounding(a.data(), b.data(), c.data(), out.mutable_data(),
                       static_cast<int>(a.size()));
    return out;
  });
  m.def("to_integers", [](Array<float> in) {
    Array<int64_t> out = filled<int64_t>({in.size(), 6}, -7);
    selftest::to_integers(in.data(), out.mutable_data(), static_cast<int>(in.size()));
    return out;
  });
  m.def("mixed_min_max", [] {
    Array<double> out = filled<double>({6}, 99);
    selftest::mixed_min_max(out.mutable_data());
    return out;
  });
}

void def_memory(py::module_& m) {
  m.def("vectors", [](Array<float> in) {
    Array<float> out = filled<float>({in.size()}, -1);
    selftest::vectors(in.data(), out.mutable_data(), static_cast<int>(in.size()));
    return out;
  });
  m.def("fresh_shared", [](int blocks, int bytes) {
    Array<unsigned char> out = filled<unsigned char>({blocks, bytes}, 0);
    selftest::fresh_shared(out.mutable_data(), blocks, bytes);
    return out;
  });
  m.def("fill_shared", [](int room, int count) {
    Array<int> out = filled<int>({32}, -1);
    selftest::fill_shared(out.mutable_data(), room, count);
    return out;
  });
  m.def("spin", [](int threads) {
    Array<int> out = filled<int>({threads}, -1);
    selftest::spin(out.mutable_data(), threads);
    return out;
  });
  m.def("empty", [](py::tuple grid, py::tuple block, uint64_t shared_bytes) {
    selftest::empty(extent(grid).data(), extent(block).data(), shared_bytes);
  });
  m.def("opt_in", &selftest::opt_in);
}

void def_failures(py::module_& m) {
  // The counter outlives the exception, so that the test can read it afterwards.
  static int live_objects = 0;
  m.def("live_objects", [] { return live_objects; });
  m.def("diverge", [](const std::string& how, int threads) {
    selftest::diverge(how, threads, &live_objects);
  });
  m.def("fail", [](const std::string& how, int thread, int blocks, int threads) {
    selftest::fail(how, thread, blocks, threads, &live_objects);
  });
}

}  // namespace

PYBIND11_MODULE(cuda_host_selftest, m) {
  m.def("set_schedule", &cuda_host::set_schedule);
  def_warps(m);
  def_blocks(m);
  def_numbers(m);
  def_memory(m);
  def_failures(m);
}
