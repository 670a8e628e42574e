#pragma once

#include <cstdint>

#include "numeric.h"

namespace mmrm {

// The meaning is that of patchify_ref in mmrm_fast/ops/patchify.py; the side is a multiple of the patch size.
template <typename T>
struct PatchifyArgs {
  const uint8_t* tiles;            // [I, S, S, 3]
  const compute_t<T>* scale;       // [3]
  const compute_t<T>* shift;       // [3]
  T* rows;                         // [I * (S / p)^2, 3 * p * p]
  int64_t num_tiles, side, patch;  // I, S, p
};

template <typename T>
void patchify_cpu(const PatchifyArgs<T>& args, int num_threads);

}  // namespace mmrm
