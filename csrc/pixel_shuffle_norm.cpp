#include "pixel_shuffle_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "memory.h"

namespace mmrm {
namespace {

constexpr int64_t kLanes = 32;             // partial sums of a row; fixed, so that the bits are the same on every CPU
constexpr int64_t kBlockRows = 4;          // rows that share a trip of weights and of their gradients through the cache
constexpr int64_t kColumns = 256;          // columns that stay in the first-level cache meanwhile
constexpr int64_t kChunkRows = 64;         // rows whose weight gradients are summed in turn, at least
constexpr int64_t kMaxChunks = 256;        // bounds the memory of their sums
constexpr int64_t kParallelSize = 1 << 15;  // values; below this, starting threads costs more than it saves

template <typename A>
struct LaneSums {
  A first[kLanes] = {}, second[kLanes] = {};

  // Adds value(0), ..., value(size - 1) to both sums, in a fixed order that vectorises.
  template <typename F>
  MMRM_INLINE void add(int64_t size, F value) {
    LaneSums<A> sums = *this;  // in registers
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) value(i + lane, sums.first[lane], sums.second[lane]);
    }
    for (int64_t lane = 0; i < size; ++i, ++lane) value(i, sums.first[lane], sums.second[lane]);
    *this = sums;
  }

  MMRM_INLINE static A total(A* lanes) {
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
  }
};

template <typename A>
struct Statistics {
  A mean, rstd;
};

template <typename T>
MMRM_INLINE Statistics<compute_t<T>> row_statistics(const T* const* halves, int64_t half, double eps) {
  using A = compute_t<T>;
  const A size = A(2 * half);
  LaneSums<A> sums;
  for (int part = 0; part < 2; ++part) {
    const T* x = halves[part];
    sums.add(half, [=](int64_t k, A& sum, A&) MMRM_ALWAYS_INLINE { sum += convert<A>(x[k]); });
  }
  const A mean = sums.total(sums.first) / size;
  for (int part = 0; part < 2; ++part) {
    const T* x = halves[part];
    sums.add(half, [=](int64_t k, A&, A& sum) MMRM_ALWAYS_INLINE {
      const A centered = convert<A>(x[k]) - mean;
      sum += centered * centered;
    });
  }
  return {mean, 1 / std::sqrt(sums.total(sums.second) / size + A(eps))};
}

// Rows [first, last), at most kBlockRows.
template <typename T>
MMRM_CLONES void fwd_rows(const PixelShuffle& shape, const PixelShuffleNormFwd<T>& args, int64_t first, int64_t last) {
  using A = compute_t<T>;
  const int64_t half = 2 * shape.channels;
  for (int64_t row = first; row < last; ++row) {
    const T* x = args.hidden + shape.offset(row);
    const T* const halves[] = {x, x + shape.grid * shape.channels};
    const Statistics<A> found = row_statistics(halves, half, args.eps);
    args.mean[row] = found.mean;
    args.rstd[row] = found.rstd;
  }
  for (int part = 0; part < 2; ++part) {
    for (int64_t column = 0; column < half; column += kColumns) {
      const int64_t size = std::min(kColumns, half - column), place = part * half + column;
      const A *weight = args.weight + place, *bias = args.bias + place;
      for (int64_t row = first; row < last; ++row) {
        const A mean = args.mean[row], rstd = args.rstd[row];
        const T* x = args.hidden + shape.offset(row) + part * shape.grid * shape.channels + column;
        T* __restrict out = args.out + row * 2 * half + place;
        for (int64_t k = 0; k < size; ++k) out[k] = convert<T>((convert<A>(x[k]) - mean) * rstd * weight[k] + bias[k]);
      }
    }
  }
}

// Adds the rows' shares to the sums [4C] and writes their gradients: rows [first, last), at most kBlockRows.
template <typename T>
MMRM_CLONES void bwd_rows(const PixelShuffle& shape, const PixelShuffleNormBwd<T>& args, int64_t first, int64_t last,
                          compute_t<T>* grad_weight, compute_t<T>* grad_bias) {
  using A = compute_t<T>;
  const int64_t size = shape.row_size(), half = size / 2;
  LaneSums<A> sums[kBlockRows];
  for (int part = 0; part < 2; ++part) {
    for (int64_t column = 0; column < half; column += kColumns) {
      const int64_t count = std::min(kColumns, half - column), place = part * half + column;
      const A* weight = args.weight + place;
      A *__restrict weight_sums = grad_weight + place, *__restrict bias_sums = grad_bias + place;
      for (int64_t row = first; row < last; ++row) {
        const A mean = args.mean[row], rstd = args.rstd[row];
        const T* hidden = args.hidden + shape.offset(row) + part * shape.grid * shape.channels + column;
        const T* grad = args.grad + row * size + place;
        sums[row - first].add(count, [=](int64_t k, A& slope_sum, A& along_sum) MMRM_ALWAYS_INLINE {
          const A g = convert<A>(grad[k]), normal = (convert<A>(hidden[k]) - mean) * rstd, slope = g * weight[k];
          weight_sums[k] += g * normal;
          bias_sums[k] += g;
          slope_sum += slope;
          along_sum += slope * normal;
        });
      }
    }
  }
  if (!args.grad_hidden) return;
  for (int64_t row = first; row < last; ++row) {
    const A mean = args.mean[row], rstd = args.rstd[row];
    LaneSums<A>& row_sums = sums[row - first];
    const A slope_mean = row_sums.total(row_sums.first) / size, along_mean = row_sums.total(row_sums.second) / size;
    for (int part = 0; part < 2; ++part) {
      const int64_t offset = shape.offset(row) + part * shape.grid * shape.channels;
      const T *hidden = args.hidden + offset, *grad = args.grad + row * size + part * half;
      const A* weight = args.weight + part * half;
      T* __restrict out = args.grad_hidden + offset;
      for (int64_t k = 0; k < half; ++k) {
        const A normal = (convert<A>(hidden[k]) - mean) * rstd;
        out[k] = convert<T>(rstd * (convert<A>(grad[k]) * weight[k] - slope_mean - normal * along_mean));
      }
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
#pragma omp parallel for num_threads(num_threads) if (num_rows * shape.row_size() >= kParallelSize)
  for (int64_t row = 0; row < num_rows; row += kBlockRows) {
    fwd_rows(shape, args, row, std::min(row + kBlockRows, num_rows));
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
      for (int64_t row = chunk * chunk_rows; row < end; row += kBlockRows) {
        bwd_rows(shape, args, row, std::min(row + kBlockRows, end), grad_weight, grad_weight + size);
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
