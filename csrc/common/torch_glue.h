// The only file that knows LibTorch's stable ABI by name: tensors in and out of plain pointers,
// the device guard, the current stream, and checks worded like the Python side's.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef DHCL_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace dhcl {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError with the message alone; STD_TORCH_CHECK would put a source line before it.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check_rank(const char* op, const char* name, const Tensor& t, int64_t rank) {
  check(t.dim() == rank, op, ": ", name, " must be ", rank, "-D (got ", t.dim(), "-D)");
}

inline void check_int64(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64");
}

inline void check_int32(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32");
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  check(t.is_contiguous(), op, ": ", name, " is changed in place and must be contiguous");
}

inline const int64_t* int64_data(const Tensor& t) { return t.const_data_ptr<int64_t>(); }
inline const int32_t* int32_data(const Tensor& t) { return t.const_data_ptr<int32_t>(); }
inline const float* float_data(const Tensor& t) { return t.const_data_ptr<float>(); }
inline int64_t* int64_out(const Tensor& t) { return t.mutable_data_ptr<int64_t>(); }
inline int32_t* int32_out(const Tensor& t) { return t.mutable_data_ptr<int32_t>(); }
inline float* float_out(const Tensor& t) { return t.mutable_data_ptr<float>(); }

// Whether two contiguous tensors share memory.
inline bool overlap(const Tensor& a, const Tensor& b) {
  const auto bytes = [](const Tensor& t) {
    const char* begin = static_cast<const char*>(t.const_data_ptr());
    return std::pair(begin, begin + t.numel() * static_cast<int64_t>(t.element_size()));
  };
  const auto [a_begin, a_end] = bytes(a);
  const auto [b_begin, b_end] = bytes(b);
  return a_begin < b_end && b_begin < a_end;
}

// New tensors on the device of another one.
inline Tensor new_int64(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {n}, ScalarType::Long);
}
inline Tensor new_int32(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {n}, ScalarType::Int);
}
inline Tensor new_float(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {n}, ScalarType::Float);
}

// Where an op runs. Its glue is one template over it, registered for both: the glue checks, fills
// the parameters, and has run call the CPU function or the launcher of the kernels.
struct Cpu {
  static constexpr bool kCuda = false;
  template <auto kRun, auto kLaunch, typename Params>
  static void run(const Tensor&, const Params& p) {
    kRun(p);
  }
};

// Checks offsets of lists, contiguous and one more than lists, against the number of entries. What
// they hold is looked at on the CPU alone: on CUDA that would wait for the device.
template <typename Device>
void check_lists(const char* op, const char* name, const Tensor& offsets, int64_t entries) {
  if constexpr (!Device::kCuda) {
    const int64_t* offset = int64_data(offsets);
    const int64_t lists = offsets.size(0) - 1;
    bool ascend = offset[0] >= 0;
    for (int64_t i = 0; i < lists; ++i) ascend &= offset[i] <= offset[i + 1];
    check(ascend && offset[lists] <= entries, op, ": ", name,
          " must ascend from 0 up to the number of entries, ", entries, " (got ", offset[lists],
          " at the end)");
  }
}

#ifdef DHCL_CUDA
// Makes the tensor's device current for the scope and holds PyTorch's current stream on it.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }
  // Call after a launch; raises what the launch itself reported, without synchronising.
  void check_launch() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }
  // Copies numbers from the device and waits for them. Only for sizes that depend on data.
  void read_back(int64_t* to, const int64_t* from, int64_t count) const {
    const auto s = static_cast<cudaStream_t>(stream_);
    STD_CUDA_CHECK(cudaMemcpyAsync(to, from, count * sizeof(int64_t), cudaMemcpyDeviceToHost, s));
    STD_CUDA_CHECK(cudaStreamSynchronize(s));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

struct Cuda {
  static constexpr bool kCuda = true;
  template <auto kRun, auto kLaunch, typename Params>
  static void run(const Tensor& on, const Params& p) {
    const CudaScope scope(on);
    kLaunch(p, scope.stream());
    scope.check_launch();
  }
};
#endif

// ---- torch's products ---------------------------------------------------------------------------

// Raises what torch raised, as RuntimeError; before torch 2.13 its headers can't pass the message
// on.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define DHCL_TORCH_CALL STABLE_TORCH_ERROR_CODE_CHECK
#else
#define DHCL_TORCH_CALL TORCH_ERROR_CODE_CHECK
#endif

// Keeps torch's fp32 products at full precision while it lives, whatever the process allows for
// others. The settings are out of the stable ABI's reach, so Python's guard is called, which counts
// those inside (dhcl_ops/_precision.py).
class IeeeProducts {
 public:
  IeeeProducts() : entered_(call(true)) {}
  IeeeProducts(const IeeeProducts&) = delete;
  IeeeProducts& operator=(const IeeeProducts&) = delete;
  ~IeeeProducts() {
    if (entered_) call(false);
  }

 private:
  static bool call(bool begin) {
    using torch::stable::detail::from;
    std::array<StableIValue, 1> stack{from(begin)};
    DHCL_TORCH_CALL(
        torch_call_dispatcher("dhcl::ieee_products", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<bool>(stack[0]);
  }
  bool entered_;
};

// Rows [start, start + count) of a tensor, as a view.
inline Tensor rows_of(const Tensor& t, int64_t start, int64_t count) {
  AtenTensorHandle view = nullptr;
  DHCL_TORCH_CALL(aoti_torch_aten_narrow(t.get(), 0, start, count, &view));
  return Tensor(view);
}

// out = a b. Where out is wider than the factors (fp32 and 16-bit ones, on CUDA), so are the sums.
template <typename Device>
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (a.scalar_type() != out.scalar_type()) {
    using torch::stable::detail::from;
    std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
    DHCL_TORCH_CALL(
        torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
    return;
  }
#ifdef DHCL_CUDA
  if constexpr (Device::kCuda) {
    DHCL_TORCH_CALL(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
    return;
  }
#endif
  DHCL_TORCH_CALL(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// sums += a b, all of one dtype.
template <typename Device>
void multiply_add(const Tensor& a, const Tensor& b, const Tensor& sums) {
#ifdef DHCL_CUDA
  if constexpr (Device::kCuda) {
    DHCL_TORCH_CALL(aoti_torch_cuda_addmm_out(sums.get(), sums.get(), a.get(), b.get(), 1.0, 1.0));
    return;
  }
#endif
  DHCL_TORCH_CALL(aoti_torch_cpu_addmm_out(sums.get(), sums.get(), a.get(), b.get(), 1.0, 1.0));
}

// How often each of the values of an int64 tensor occurs, in no order that matters.
inline Tensor value_counts(const Tensor& t) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(t), from(true), from(false), from(true)};
  DHCL_TORCH_CALL(torch_call_dispatcher("aten::_unique2", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor values = to<Tensor>(stack[0]);
  const Tensor inverse = to<Tensor>(stack[1]);
  return to<Tensor>(stack[2]);
}

// The rows of t that int64 indices name, as a copy.
inline Tensor gather_rows(const Tensor& t, const Tensor& indices) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(t), from(int64_t{0}), from(indices)};
  DHCL_TORCH_CALL(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// out = scale * t, rounded to out's dtype.
inline void multiply_by(const Tensor& t, double scale, const Tensor& out) {
  using torch::stable::detail::from;
  const Tensor factor = torch::stable::full({}, scale, ScalarType::Float);
  std::array<StableIValue, 3> stack{from(t), from(factor), from(out)};
  DHCL_TORCH_CALL(torch_call_dispatcher("aten::mul", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace dhcl
