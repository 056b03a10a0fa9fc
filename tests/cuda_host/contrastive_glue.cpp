// The CUDA half of csrc/contrastive.cpp on emulated kernels and the CPU's products.
#include "glue.h"
// After what changes its macros.
#include "contrastive.cpp"
