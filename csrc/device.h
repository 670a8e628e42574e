#pragma once

// What the .cu files need of CUDA: the toolkit, or, to run them on the CPU in tests, its emulation.
#ifdef MMRM_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

#ifdef __CUDACC__
// A block's shared array `name` of `size` elements.
#define MMRM_SHARED(type, name, size) __shared__ type name[size]
// `kernel` in parentheses where its template arguments have commas.
#define MMRM_LAUNCH(kernel, num_blocks, num_threads, stream, ...) \
  kernel<<<num_blocks, num_threads, 0, stream>>>(__VA_ARGS__)
#endif
