#include "pair_loss.h"

#include <algorithm>
#include <array>
#include <vector>

namespace mmrm {
namespace {

constexpr int64_t kChunk = 256;              // pairs summed in a row; fixed, so that sums do not depend on threads
constexpr int64_t kLanes = 32;               // partial sums of a chunk, likewise
constexpr int64_t kParallelPairs = 1 << 14;  // below this, starting threads costs more than it saves

// float64 for both types: free beside the exponentials, and a long row of equal fp32 terms drifts by 1e-5.
using Sums = std::array<double, kNumPairLossSums>;

// One value a pair of a chunk; every loop over them vectorises.
template <typename T>
using Column = std::array<T, kChunk>;

template <typename T>
struct LossColumns {
  Column<T> difference, plain_loss, plain_slope, loss, slope;

  LossAndSlope<T> plain(int64_t i) const { return {plain_loss[i], plain_slope[i]}; }
  LossAndSlope<T> optimised(int64_t i) const { return {loss[i], slope[i]}; }
};

// Of every pair, [P], see PairTerms.
template <typename T>
struct PairGradients {
  T *pull, *slope, *proxy_slope;
};

// The losses of the differences; `in` begins with the first pair.
template <typename T>
MMRM_INLINE void fill_losses(const PairLossInputs<T>& in, const PairLossOptions& options, int64_t size,
                             LossColumns<T>& out) {
  const T smoothing = T(options.label_smoothing);
  for (int64_t i = 0; i < size; ++i) {
    const LossAndSlope<T> plain = bradley_terry(out.difference[i]);
    out.plain_loss[i] = plain.loss;
    out.plain_slope[i] = plain.slope;
  }
  if (in.margin) {
    for (int64_t i = 0; i < size; ++i) {
      const T x = out.difference[i] - in.margin[i];
      const LossAndSlope<T> optimised = smoothed(bradley_terry(x), x, smoothing);
      out.loss[i] = optimised.loss;
      out.slope[i] = optimised.slope;
    }
  } else {
    for (int64_t i = 0; i < size; ++i) {
      const LossAndSlope<T> optimised = smoothed(out.plain(i), out.difference[i], smoothing);
      out.loss[i] = optimised.loss;
      out.slope[i] = optimised.slope;
    }
  }
}

template <typename T>
MMRM_INLINE double column_sum(const Column<T>& column, int64_t size) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += double(column[i + lane]);
  }
  for (int64_t lane = 0; i < size; ++i, ++lane) lanes[lane] += double(column[i]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// Differences and sums of both rewards of the pairs; the proxy's columns are zero without one.
template <typename T>
MMRM_INLINE void load_rewards(const PairLossInputs<T>& in, int64_t size, LossColumns<T>& main, Column<T>& total,
                              LossColumns<T>& proxy) {
  const T *rewards = in.rewards, *proxy_rewards = in.proxy_rewards ? in.proxy_rewards : in.rewards;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t c = in.chosen[i], r = in.rejected[i];
    main.difference[i] = rewards[c] - rewards[r];
    total[i] = rewards[c] + rewards[r];
    proxy.difference[i] = proxy_rewards[c] - proxy_rewards[r];
  }
  if (in.proxy_rewards) return;
  for (Column<T>* column : {&proxy.difference, &proxy.plain_loss, &proxy.plain_slope, &proxy.loss, &proxy.slope}) {
    column->fill(T(0));
  }
}

// Pairs [0, size) of `in`.
template <typename T>
MMRM_CLONES Sums run_chunk(const PairLossInputs<T>& in, const PairLossOptions options, int64_t size, T* __restrict sfc,
                           T* __restrict pull, T* __restrict slope, T* __restrict proxy_slope) {
  alignas(64) Column<T> weight, total;
  alignas(64) LossColumns<T> main, proxy;
  alignas(64) std::array<Column<T>, kNumPairLossSums> terms;
  const bool has_proxy = in.proxy_rewards != nullptr;
  load_rewards(in, size, main, total, proxy);
  for (int64_t i = 0; i < size; ++i) weight[i] = in.weight ? in.weight[i] : T(1);
  fill_losses(in, options, size, main);
  if (has_proxy) fill_losses(in, options, size, proxy);
  for (int64_t i = 0; i < size; ++i) {
    const PairValues<T> values{weight[i],         main.difference[i], total[i],
                               proxy.difference[i], main.plain(i),    main.optimised(i),
                               proxy.plain(i),    proxy.optimised(i), has_proxy};
    const PairTerms<T> pair = combine(values, options);
    for (int sum = 0; sum < kNumPairLossSums; ++sum) terms[sum][i] = pair.sums[sum];
    sfc[i] = pair.sfc;
    pull[i] = pair.pull;
    slope[i] = pair.slope;
    proxy_slope[i] = pair.proxy_slope;
  }
  Sums sums;
  for (int sum = 0; sum < kNumPairLossSums; ++sum) sums[sum] = column_sum(terms[sum], size);
  return sums;
}

// Gradients of rewards [first, last): the sums over the pairs that they are in.
template <bool has_proxy, typename T>
void gather_rows(const PairLossInputs<T> in, const PairGradients<T> grads, int64_t first, int64_t last, T* grad_rewards,
                 T* grad_proxy) {
  int64_t i = in.row_ptr[first];
  for (int64_t row = first; row < last; ++row) {
    T main = 0, proxy = 0;
    for (const int64_t end = in.row_ptr[row + 1]; i < end; ++i) {
      const int64_t pair = in.row_entry[i] >> 1;
      const T sign = T(1 - 2 * (in.row_entry[i] & 1));
      main += grads.pull[pair] + sign * grads.slope[pair];
      if (has_proxy) proxy += sign * grads.proxy_slope[pair];
    }
    grad_rewards[row] = main;
    if (has_proxy) grad_proxy[row] = proxy;
  }
}

// The chunk that begins with pair `first`.
template <typename T>
Sums run_pairs(PairLossInputs<T> in, const PairLossOptions& options, int64_t first, T* sfc,
               const PairGradients<T>& grads) {
  in.chosen += first;
  in.rejected += first;
  if (in.margin) in.margin += first;
  if (in.weight) in.weight += first;
  return run_chunk(in, options, std::min(kChunk, in.num_pairs - first), sfc + first, grads.pull + first,
                   grads.slope + first, grads.proxy_slope + first);
}

}  // namespace

template <typename T>
void pair_loss_fwd_cpu(const PairLossInputs<T>& in, const PairLossOptions& options, const PairLossOutputs<T>& out,
                       [[maybe_unused]] int num_threads) {
  const int64_t num_chunks = (in.num_pairs + kChunk - 1) / kChunk;
  const int64_t num_blocks = (in.num_rewards + kChunk - 1) / kChunk;
  std::vector<Sums> chunk_sums(num_chunks);
  // Kept for the next step: at these sizes fresh pages cost more than the arithmetic.
  static thread_local std::vector<T> memory;
  if (memory.size() < size_t(3 * in.num_pairs)) memory.resize(3 * in.num_pairs);
  const PairGradients<T> grads{memory.data(), memory.data() + in.num_pairs, memory.data() + 2 * in.num_pairs};
#pragma omp parallel num_threads(num_threads) if (in.num_pairs >= kParallelPairs)
  {
#pragma omp for
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      chunk_sums[chunk] = run_pairs(in, options, chunk * kChunk, out.sfc, grads);
    }
#pragma omp for
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t first = block * kChunk, last = std::min(first + kChunk, in.num_rewards);
      const auto gather = in.proxy_rewards ? gather_rows<true, T> : gather_rows<false, T>;
      gather(in, grads, first, last, out.grad_rewards, out.grad_proxy);
    }
  }
  Sums sums{};
  for (const Sums& chunk : chunk_sums) {
    for (int i = 0; i < kNumPairLossSums; ++i) sums[i] += chunk[i];
  }
  std::copy(sums.begin(), sums.end(), out.sums);
}

template void pair_loss_fwd_cpu(const PairLossInputs<float>&, const PairLossOptions&, const PairLossOutputs<float>&,
                                int);
template void pair_loss_fwd_cpu(const PairLossInputs<double>&, const PairLossOptions&, const PairLossOutputs<double>&,
                                int);

}  // namespace mmrm
