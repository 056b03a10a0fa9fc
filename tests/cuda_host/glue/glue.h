// What the glue of a family needs to be built for the host as ops of the namespace dhcl_glue, which
// run on CPU tensors: the CUDA half is registered for the CPU, and the CPU's own is left out.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) static_cast<void>(call)
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) DHCL_GLUE_##key(m)
#define DHCL_GLUE_CPU(m) \
  [[maybe_unused]] static void left_out(torch::stable::detail::StableLibrary& m)
#define DHCL_GLUE_CUDA(m) _STABLE_TORCH_LIBRARY_IMPL(dhcl_glue, CPU, m, C10_UID)
