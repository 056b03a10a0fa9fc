// What a .cu file includes first. Under nvcc it is the CUDA runtime; under a host compiler it is
// the stand-in of tests/cuda_host, so that the same kernels run on a machine without a GPU.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
// A failed device check must be seen in release builds too.
#undef NDEBUG
#include <cuda_runtime.h>

#include <cassert>
#include <cstdio>
#define DHCL_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  kernel<<<grid, block, smem_bytes, stream>>>(__VA_ARGS__)
#define DHCL_DYNAMIC_SHARED(type, name)                           \
  extern __shared__ __align__(16) unsigned char name##_storage[]; \
  type* name = reinterpret_cast<type*>(name##_storage)
// Reports like PyTorch's own indexing does: a message on stderr, then cudaErrorAssert at the next
// synchronisation. Nothing on the host waits for it.
#define DHCL_DEVICE_ASSERT(condition, ...) \
  do {                                     \
    if (!(condition)) {                    \
      printf(__VA_ARGS__);                 \
      assert(condition);                   \
    }                                      \
  } while (0)
#else
#include "cuda_host.h"
#endif
