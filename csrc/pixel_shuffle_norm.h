#pragma once

#include <cstdint>

#include "numeric.h"

namespace mmrm {

// I tiles of 1 + G * G tokens (CLS first) of C channels; N = I * (G / 2)^2 rows of 4C channels.
struct PixelShuffle {
  int64_t num_tiles, grid, channels;  // I, G, C

  int64_t half() const { return grid / 2; }
  int64_t num_rows() const { return num_tiles * half() * half(); }
  int64_t row_size() const { return 4 * channels; }
  int64_t tile_size() const { return (1 + grid * grid) * channels; }

  // Where a row's first half begins; the second half begins `grid * channels` later. Each is 2C values.
  int64_t offset(int64_t row) const {
    const int64_t tile = row / (half() * half()), y = row / half() % half(), x = row % half();
    return tile * tile_size() + (1 + 2 * y * grid + 2 * x) * channels;
  }
};

// The meaning is that of pixel_shuffle_norm_ref and _bwd_ref in mmrm_fast/ops/pixel_shuffle_norm.py.
template <typename T>
struct PixelShuffleNormFwd {
  const T* hidden;             // [I, 1 + G * G, C]
  const compute_t<T>* weight;  // [4C]
  const compute_t<T>* bias;    // [4C]
  double eps;
  T* out;              // [N, 4C]
  compute_t<T>* mean;  // [N]
  compute_t<T>* rstd;  // [N]
};

template <typename T>
void pixel_shuffle_norm_fwd_cpu(const PixelShuffle& shape, const PixelShuffleNormFwd<T>& args, int num_threads);

template <typename T>
struct PixelShuffleNormBwd {
  const T* grad;               // [N, 4C]
  const T* hidden;             // [I, 1 + G * G, C]
  const compute_t<T>* weight;  // [4C]
  const compute_t<T>* mean;    // [N]
  const compute_t<T>* rstd;    // [N]
  T* grad_hidden;              // [I, 1 + G * G, C], null where it is not needed
  compute_t<T>* grad_weight;   // [4C]
  compute_t<T>* grad_bias;     // [4C]
};

// The same bits for any num_threads.
template <typename T>
void pixel_shuffle_norm_bwd_cpu(const PixelShuffle& shape, const PixelShuffleNormBwd<T>& args, int num_threads);

}  // namespace mmrm
