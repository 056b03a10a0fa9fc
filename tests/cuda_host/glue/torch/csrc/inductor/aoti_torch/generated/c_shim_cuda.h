// Stands in for torch's products on CUDA: those on the CPU.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
inline AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle a,
                                             AtenTensorHandle b) {
  return aoti_torch_cpu_mm_out(out, a, b);
}
inline AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle sums,
                                                AtenTensorHandle a, AtenTensorHandle b, double beta,
                                                double alpha) {
  return aoti_torch_cpu_addmm_out(out, sums, a, b, beta, alpha);
}
