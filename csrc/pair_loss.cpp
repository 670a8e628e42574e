#include "pair_loss.h"

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

namespace mmrm {
namespace {

constexpr int64_t kChunk = 256;              // pairs summed in a row; fixed, so that sums do not depend on threads
constexpr int64_t kLanes = 16;               // partial sums of a chunk, likewise
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

// Gradients of every pair, see PairTerms.
template <typename T>
struct PairGradients {
  std::unique_ptr<T[]> slope, pull, proxy_slope;  // [P], without values at first
};

// Pairs [0, size) of `in`, which begin with a chunk's first one.
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
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

template <typename T>
MMRM_CLONES void run_chunk(const PairLossInputs<T>& in, const PairLossOptions options, int64_t size,
                           T* __restrict sfc, T* __restrict slope, T* __restrict pull, T* __restrict proxy_slope,
                           Sums& sums) {
  Column<T> weight, total;
  LossColumns<T> main, proxy;
  std::array<Column<T>, kNumPairLossSums> terms;
  const bool has_proxy = in.proxy_rewards != nullptr;
  for (int64_t i = 0; i < size; ++i) {
    const T chosen = in.rewards[in.chosen[i]], rejected = in.rewards[in.rejected[i]];
    main.difference[i] = chosen - rejected;
    total[i] = chosen + rejected;
  }
  for (int64_t i = 0; i < size; ++i) weight[i] = in.weight ? in.weight[i] : T(1);
  fill_losses(in, options, size, main);
  if (has_proxy) {
    for (int64_t i = 0; i < size; ++i) {
      proxy.difference[i] = in.proxy_rewards[in.chosen[i]] - in.proxy_rewards[in.rejected[i]];
    }
    fill_losses(in, options, size, proxy);
  } else {
    for (Column<T>* column : {&proxy.difference, &proxy.plain_loss, &proxy.plain_slope, &proxy.loss, &proxy.slope}) {
      column->fill(T(0));
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    const PairValues<T> values{weight[i],         main.difference[i], total[i],           proxy.difference[i], main.plain(i),
                               main.optimised(i), proxy.plain(i),     proxy.optimised(i), has_proxy};
    const PairTerms<T> pair = combine(values, options);
    for (int sum = 0; sum < kNumPairLossSums; ++sum) terms[sum][i] = pair.sums[sum];
    sfc[i] = pair.sfc;
    slope[i] = pair.slope;
    pull[i] = pair.pull;
    proxy_slope[i] = pair.proxy_slope;
  }
  for (int sum = 0; sum < kNumPairLossSums; ++sum) sums[sum] = column_sum(terms[sum], size);
}

template <typename T>
class PairLoss {
 public:
  PairLoss(const PairLossInputs<T>& in, const PairLossOptions& options, const PairLossOutputs<T>& out)
      : in_(in), options_(options), out_(out) {
    for (std::unique_ptr<T[]>* values : {&grads_.slope, &grads_.pull, &grads_.proxy_slope}) {
      values->reset(new T[in.num_pairs]);
    }
  }

  void run([[maybe_unused]] int num_threads) {
    const int64_t num_chunks = (in_.num_pairs + kChunk - 1) / kChunk;
    std::vector<Sums> chunk_sums(num_chunks);
#pragma omp parallel num_threads(num_threads) if (in_.num_pairs >= kParallelPairs)
    {
#pragma omp for
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) run_pairs(chunk * kChunk, chunk_sums[chunk]);
#pragma omp for
      for (int64_t row = 0; row < in_.num_rewards; ++row) gather_row(row);
    }
    Sums sums{};
    for (const Sums& chunk : chunk_sums) {
      for (int i = 0; i < kNumPairLossSums; ++i) sums[i] += chunk[i];
    }
    std::copy(sums.begin(), sums.end(), out_.sums);
  }

 private:
  // The chunk that begins with pair `first`.
  void run_pairs(int64_t first, Sums& sums) {
    PairLossInputs<T> in = in_;
    in.chosen += first;
    in.rejected += first;
    if (in.margin) in.margin += first;
    if (in.weight) in.weight += first;
    run_chunk(in, options_, std::min(kChunk, in.num_pairs - first), out_.sfc + first, grads_.slope.get() + first,
              grads_.pull.get() + first, grads_.proxy_slope.get() + first, sums);
  }

  void gather_row(int64_t row) {
    T main = 0, proxy = 0;
    for (int64_t i = in_.row_ptr[row]; i < in_.row_ptr[row + 1]; ++i) {
      const int64_t pair = in_.row_entry[i] >> 1;
      const T sign = T(1 - 2 * (in_.row_entry[i] & 1));
      main += grads_.pull[pair] + sign * grads_.slope[pair];
      if (in_.proxy_rewards) proxy += sign * grads_.proxy_slope[pair];
    }
    out_.grad_rewards[row] = main;
    if (in_.proxy_rewards) out_.grad_proxy[row] = proxy;
  }

  const PairLossInputs<T>& in_;
  const PairLossOptions& options_;
  const PairLossOutputs<T>& out_;
  PairGradients<T> grads_;
};

}  // namespace

template <typename T>
void pair_loss_fwd_cpu(const PairLossInputs<T>& in, const PairLossOptions& options, const PairLossOutputs<T>& out,
                       int num_threads) {
  PairLoss<T>(in, options, out).run(num_threads);
}

template void pair_loss_fwd_cpu(const PairLossInputs<float>&, const PairLossOptions&, const PairLossOutputs<float>&,
                                int);
template void pair_loss_fwd_cpu(const PairLossInputs<double>&, const PairLossOptions&, const PairLossOutputs<double>&,
                                int);

}  // namespace mmrm
