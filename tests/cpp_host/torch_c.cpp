// The few functions of torch's C interface that the C++ half needs besides tensors. Threads are
// std::thread's: ThreadSanitizer follows these, and not OpenMP's.
#include <torch/csrc/stable/c/shim.h>

#include <thread>
#include <vector>

namespace {
constexpr uint32_t kPool = 4;
}

extern "C" uint64_t aoti_torch_abi_version() { return TORCH_TARGET_VERSION; }

extern "C" AOTITorchError torch_get_num_threads(uint32_t* out_num_threads) {
  *out_num_threads = kPool;
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc func,
                                             void* ctx) {
  std::vector<std::thread> pool;
  for (int64_t i = begin; i < end; ++i) pool.emplace_back(func, i, i + 1, ctx);
  for (std::thread& thread : pool) thread.join();
  return AOTI_TORCH_SUCCESS;
}
