#include "pixel_shuffle_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "memory.h"

namespace mmrm {
namespace {

constexpr int64_t kLanes = 64;             // partial sums of a row; fixed, so that the bits are the same on every CPU
constexpr int64_t kChunkRows = 64;         // rows whose weight gradients are summed in turn, at least
constexpr int64_t kMaxChunks = 256;        // bounds the memory of their sums
constexpr int64_t kParallelSize = 1 << 15;  // values; below this, starting threads costs more than it saves

template <typename A>
struct LaneSums {
  A first, second;
};

// Sums of value(0), ..., value(size - 1) in a fixed order that vectorises.
template <typename A, typename F>
MMRM_INLINE LaneSums<A> lane_sums(int64_t size, F value) {
  A first[kLanes] = {}, second[kLanes] = {};
  const auto add = [&](int64_t lane, int64_t i) MMRM_ALWAYS_INLINE {
    const LaneSums<A> term = value(i);
    first[lane] += term.first;
    second[lane] += term.second;
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(lane, i + lane);
  }
  for (int64_t lane = 0; i < size; ++i, ++lane) add(lane, i);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) {
      first[lane] += first[lane + width];
      second[lane] += second[lane + width];
    }
  }
  return {first[0], second[0]};
}

// A row's values from the two halves of its block.
template <typename T>
MMRM_INLINE void load_row(const PixelShuffle& shape, const T* hidden, int64_t row, compute_t<T>* values) {
  const T* first = hidden + shape.offset(row);
  const T* second = first + shape.grid * shape.channels;
  const int64_t half = 2 * shape.channels;
  for (int64_t k = 0; k < half; ++k) values[k] = convert<compute_t<T>>(first[k]);
  for (int64_t k = 0; k < half; ++k) values[half + k] = convert<compute_t<T>>(second[k]);
}

// `x` [4C] is scratch.
template <typename T>
MMRM_CLONES void fwd_row(const PixelShuffle& shape, const PixelShuffleNormFwd<T>& args, int64_t row,
                         compute_t<T>* x) {
  using A = compute_t<T>;
  const int64_t size = shape.row_size();
  load_row(shape, args.hidden, row, x);
  const A mean = lane_sums<A>(size, [=](int64_t k) MMRM_ALWAYS_INLINE { return LaneSums<A>{x[k], 0}; }).first / size;
  const A variance =
      lane_sums<A>(size, [=](int64_t k) MMRM_ALWAYS_INLINE { return LaneSums<A>{(x[k] - mean) * (x[k] - mean), 0}; }).first / size;
  const A rstd = 1 / std::sqrt(variance + A(args.eps));
  args.mean[row] = mean;
  args.rstd[row] = rstd;
  const A *weight = args.weight, *bias = args.bias;
  T* out = args.out + row * size;
  for (int64_t k = 0; k < size; ++k) out[k] = convert<T>((x[k] - mean) * rstd * weight[k] + bias[k]);
}

// Adds the row's share to the sums [4C] and writes its gradient.
template <typename T>
MMRM_CLONES void bwd_row(const PixelShuffle& shape, const PixelShuffleNormBwd<T>& args, int64_t row,
                         compute_t<T>* grad_weight, compute_t<T>* grad_bias) {
  using A = compute_t<T>;
  const int64_t size = shape.row_size(), half = size / 2, offset = shape.offset(row);
  const int64_t offsets[] = {offset, offset + shape.grid * shape.channels};
  const A mean = args.mean[row], rstd = args.rstd[row];
  A slope_sum = 0, along_sum = 0;
  for (int part = 0; part < 2; ++part) {
    const T *hidden = args.hidden + offsets[part], *grad = args.grad + row * size + part * half;
    const A* weight = args.weight + part * half;
    A *weight_sums = grad_weight + part * half, *bias_sums = grad_bias + part * half;
    const LaneSums<A> sums = lane_sums<A>(half, [=](int64_t k) MMRM_ALWAYS_INLINE {
      const A g = convert<A>(grad[k]), normal = (convert<A>(hidden[k]) - mean) * rstd, slope = g * weight[k];
      weight_sums[k] += g * normal;
      bias_sums[k] += g;
      return LaneSums<A>{slope, slope * normal};
    });
    slope_sum += sums.first;
    along_sum += sums.second;
  }
  if (!args.grad_hidden) return;
  const A slope_mean = slope_sum / size, along_mean = along_sum / size;
  for (int part = 0; part < 2; ++part) {
    const T *hidden = args.hidden + offsets[part], *grad = args.grad + row * size + part * half;
    const A* weight = args.weight + part * half;
    T* out = args.grad_hidden + offsets[part];
    for (int64_t k = 0; k < half; ++k) {
      const A normal = (convert<A>(hidden[k]) - mean) * rstd;
      out[k] = convert<T>(rstd * (convert<A>(grad[k]) * weight[k] - slope_mean - normal * along_mean));
    }
  }
}

template <typename T>
void zero_cls(const PixelShuffle& shape, T* grad_hidden) {
  for (int64_t tile = 0; tile < shape.num_tiles; ++tile) {
    std::fill_n(grad_hidden + tile * shape.tile_size(), shape.channels, convert<T>(compute_t<T>(0)));
  }
}

}  // namespace

template <typename T>
void pixel_shuffle_norm_fwd_cpu(const PixelShuffle& shape, const PixelShuffleNormFwd<T>& args,
                                [[maybe_unused]] int num_threads) {
  const int64_t num_rows = shape.num_rows();
  use_huge_pages(args.out, num_rows * shape.row_size() * int64_t(sizeof(T)));
#pragma omp parallel num_threads(num_threads) if (num_rows * shape.row_size() >= kParallelSize)
  {
    std::vector<compute_t<T>> scratch(shape.row_size());
#pragma omp for
    for (int64_t row = 0; row < num_rows; ++row) fwd_row(shape, args, row, scratch.data());
  }
}

template <typename T>
void pixel_shuffle_norm_bwd_cpu(const PixelShuffle& shape, const PixelShuffleNormBwd<T>& args,
                                [[maybe_unused]] int num_threads) {
  using A = compute_t<T>;
  const int64_t num_rows = shape.num_rows(), size = shape.row_size();
  const int64_t chunk_rows = std::max(kChunkRows, (num_rows + kMaxChunks - 1) / kMaxChunks);
  const int64_t num_chunks = (num_rows + chunk_rows - 1) / chunk_rows;
  std::vector<A> sums(num_chunks * 2 * size);  // [chunk, weight or bias, 4C]
  if (args.grad_hidden) {
    use_huge_pages(args.grad_hidden, shape.num_tiles * shape.tile_size() * int64_t(sizeof(T)));
    zero_cls(shape, args.grad_hidden);
  }
#pragma omp parallel num_threads(num_threads) if (num_rows * size >= kParallelSize)
  {
#pragma omp for
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      A* grad_weight = sums.data() + chunk * 2 * size;
      const int64_t end = std::min((chunk + 1) * chunk_rows, num_rows);
      for (int64_t row = chunk * chunk_rows; row < end; ++row) {
        bwd_row(shape, args, row, grad_weight, grad_weight + size);
      }
    }
#pragma omp for
    for (int64_t k = 0; k < size; ++k) {
      args.grad_weight[k] = args.grad_bias[k] = 0;
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        args.grad_weight[k] += sums[chunk * 2 * size + k];
        args.grad_bias[k] += sums[(chunk * 2 + 1) * size + k];
      }
    }
  }
}

#define MMRM_INSTANTIATE(T)                                                                          \
  template void pixel_shuffle_norm_fwd_cpu(const PixelShuffle&, const PixelShuffleNormFwd<T>&, int); \
  template void pixel_shuffle_norm_bwd_cpu(const PixelShuffle&, const PixelShuffleNormBwd<T>&, int);
MMRM_INSTANTIATE(float)
MMRM_INSTANTIATE(double)
MMRM_INSTANTIATE(bf16_t)
MMRM_INSTANTIATE(fp16_t)
#undef MMRM_INSTANTIATE

}  // namespace mmrm
