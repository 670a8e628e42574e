#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"
#include "numeric.h"

namespace mmrm {

enum class SfcMode { standard, paper, reference };

struct PairLossOptions {
  SfcMode mode;
  double label_smoothing;
  double centering;
  bool warmup;
  double floor;
};

// R rewards, P pairs; T is float or double.
template <typename T>
struct PairLossInputs {
  const T* rewards;          // [R]
  const T* proxy_rewards;    // [R], null in mode standard
  const int64_t* chosen;     // [P]
  const int64_t* rejected;   // [P]
  const T* margin;           // [P], null for 0
  const T* weight;           // [P], null for 1
  const int64_t* row_ptr;    // [R+1]
  const int64_t* row_entry;  // [2P], pair * 2 + (0 chosen | 1 rejected)
  int64_t num_rewards;
  int64_t num_pairs;
};

enum PairLossSum { kMain, kProxy, kWeight, kWeightedSfc, kMainCorrect, kProxyCorrect, kBtMain, kNumPairLossSums };

template <typename T>
struct PairLossOutputs {
  T* sums;          // [kNumPairLossSums]
  T* sfc;           // [P]
  T* grad_rewards;  // [R], of sums[kMain]
  T* grad_proxy;    // [R], of sums[kProxy]; unused in mode standard
};

// The meaning is that of pair_loss_ref in mmrm_fast/ops/pair_loss.py. The same bits for any num_threads.
template <typename T>
void pair_loss_fwd_cpu(const PairLossInputs<T>& in, const PairLossOptions& options, const PairLossOutputs<T>& out,
                       int num_threads);

template <typename T>
struct LossAndSlope {
  T loss, slope;
};

// As std::max, which device code has not.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

// -logsigmoid(x) and its derivative -sigmoid(-x), from one exponential that cannot overflow.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE LossAndSlope<T> bradley_terry(T x) {
  const T e = exp_negative(-std::abs(x));
  return {log1p_fraction(e) + larger(-x, T(0)), -(x < T(0) ? T(1) : e) / (T(1) + e)};
}

// (1 - s) l(x) + s l(-x), by l(-x) = l(x) + x.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE LossAndSlope<T> smoothed(LossAndSlope<T> plain, T x, T smoothing) {
  return {plain.loss + smoothing * x, plain.slope + smoothing};
}

// Shortcut-Failure Coefficient from the plain losses of the main model and the proxy. No branches: a loop of it
// vectorises.
template <typename T>
class ShortcutFailure {
 public:
  MMRM_HOST_DEVICE MMRM_INLINE explicit ShortcutFailure(const PairLossOptions& options) {
    const bool is_paper = options.mode == SfcMode::paper, is_standard = options.mode == SfcMode::standard;
    inside_ = is_paper ? kEpsilon / 2 : T(0);
    outside_ = is_paper ? T(0) : kEpsilon / 2;
    lowest_ = is_standard ? T(1) : options.warmup ? T(0.5) : T(options.floor);
    highest_ = is_standard || options.warmup ? lowest_ : T(2);  // 2: never reached
  }

  MMRM_HOST_DEVICE MMRM_INLINE T operator()(T main_loss, T proxy_loss) const {
    const T sfc = larger(outside_ + (inside_ + proxy_loss) / (kEpsilon + main_loss + proxy_loss), lowest_);
    return highest_ < sfc ? highest_ : sfc;
  }

 private:
  static constexpr T kEpsilon = T(1e-7);
  T inside_, outside_, lowest_, highest_;
};

// 1, 1/2 for a tie, 0.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE T correct(T margin) {
  return margin > T(0) ? T(1) : margin == T(0) ? T(0.5) : T(0);
}

// What a pair's terms are computed from; total: of its two rewards.
template <typename T>
struct PairValues {
  T difference, total, proxy_difference, margin, weight;
};

// A branch's loss of a pair, plain, and as it is optimised: with margin and label smoothing.
template <typename T>
struct BranchLoss {
  LossAndSlope<T> plain, optimised;

  MMRM_HOST_DEVICE MMRM_INLINE BranchLoss(T difference, T margin, bool has_margin, T smoothing)
      : plain(bradley_terry(difference)) {
    const T x = has_margin ? difference - margin : difference;
    optimised = smoothed(has_margin ? bradley_terry(x) : plain, x, smoothing);
  }
};

// What one pair adds to the sums, its SFC, and its gradients: of sums[kMain] pull + slope at the chosen reward and
// pull - slope at the rejected one, of sums[kProxy] proxy_slope and -proxy_slope.
template <typename T>
struct PairTerms {
  T sums[kNumPairLossSums];
  T sfc, slope, pull, proxy_slope;
};

// The values of the proxy and the margin are not used without them. A loop vectorises where both are constants.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE PairTerms<T> pair_terms(const PairValues<T>& pair, bool has_proxy, bool has_margin,
                                                     const PairLossOptions& options,
                                                     const ShortcutFailure<T>& shortcut_failure) {
  const T weight = pair.weight, smoothing = T(options.label_smoothing), centering = T(options.centering);
  const BranchLoss<T> main(pair.difference, pair.margin, has_margin, smoothing);
  const BranchLoss<T> proxy(has_proxy ? pair.proxy_difference : T(0), pair.margin, has_margin, smoothing);
  const T sfc = shortcut_failure(main.plain.loss, has_proxy ? proxy.plain.loss : T(0));
  PairTerms<T> terms;
  terms.sums[kMain] = weight * (sfc * main.optimised.loss + centering * pair.total * pair.total);
  terms.sums[kProxy] = has_proxy ? weight * proxy.optimised.loss : T(0);
  terms.sums[kWeight] = weight;
  terms.sums[kWeightedSfc] = weight * sfc;
  terms.sums[kMainCorrect] = correct(pair.difference);
  terms.sums[kProxyCorrect] = has_proxy ? correct(pair.proxy_difference) : T(0);
  terms.sums[kBtMain] = weight * main.plain.loss;
  terms.sfc = sfc;
  terms.slope = weight * sfc * main.optimised.slope;
  terms.pull = 2 * weight * centering * pair.total;
  terms.proxy_slope = has_proxy ? weight * proxy.optimised.slope : T(0);
  return terms;
}

}  // namespace mmrm
