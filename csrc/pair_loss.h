#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"
#include "numeric.h"

namespace mmrm {

enum class PairLossMode { standard, paper, reference, balanced };

// P pairs; T is float or double.
template <typename T>
struct PairLossInputs {
  const T* margin;        // [P]
  const T* proxy_margin;  // [P], null in mode standard
  const T* demand;        // [P], null for 0
  const T* weight;        // [P], null for 1
  int64_t num_pairs;
  PairLossMode mode;
  double label_smoothing;
};

enum PairLossSum { kMain, kProxy, kWeight, kWeightedSfc, kMainCorrect, kProxyCorrect, kBtMain, kNumPairLossSums };

template <typename T>
struct PairLossOutputs {
  T* sums;         // [kNumPairLossSums]
  T* sfc;          // [P]
  T* slope;        // [P], of sums[kMain] in the margins
  T* proxy_slope;  // [P], of sums[kProxy] in the proxy's; unused in mode standard
};

// The meaning is that of pair_loss_ref in mmrm_fast/ops/pair_loss.py. The same bits for any num_threads.
template <typename T>
void pair_loss_fwd_cpu(const PairLossInputs<T>& in, const PairLossOutputs<T>& out, int num_threads);

// As std::max, which device code has not.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
struct BradleyTerry {
  T loss, slope;      // -logsigmoid(x) and its derivative -sigmoid(-x)
  T inverse;          // 1 / sigmoid(x), infinite where x is far below 0
};

// From one exponential that cannot overflow.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE BradleyTerry<T> bradley_terry(T x) {
  const T e = exp_negative(-std::abs(x)), sum = T(1) + e;
  return {log1p_fraction(e) + larger(-x, T(0)), -(x < T(0) ? T(1) : e) / sum, sum / (x < T(0) ? e : T(1))};
}

// How a pair's main loss is weighted: by the Shortcut-Failure Coefficient, or by the inverse of the probability that
// the proxy gives to the label.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE T shortcut_failure(PairLossMode mode, T main_loss, const BradleyTerry<T>& proxy) {
  constexpr T kEpsilon = T(1e-7), kLeastWeight = T(0.05);
  if (mode == PairLossMode::standard) return T(1);
  if (mode == PairLossMode::balanced) {
    const T weight = kLeastWeight * proxy.inverse;
    return T(1) < weight ? T(1) : weight;
  }
  const T total = kEpsilon + main_loss + proxy.loss;
  return mode == PairLossMode::paper ? (kEpsilon / 2 + proxy.loss) / total : kEpsilon / 2 + proxy.loss / total;
}

// 1, 1/2 for a tie, 0.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE T correct(T margin) {
  return margin > T(0) ? T(1) : margin == T(0) ? T(0.5) : T(0);
}

// A branch's loss of a pair and its slope, plain, and as they are optimised: with demand and label smoothing, which
// takes (1 - s) l(x) + s l(-x), by l(-x) = l(x) + x.
template <typename T>
struct BranchLoss {
  BradleyTerry<T> plain;
  T loss, slope;

  MMRM_HOST_DEVICE MMRM_INLINE BranchLoss(T margin, T demand, bool has_demand, T smoothing)
      : plain(bradley_terry(margin)) {
    const T x = has_demand ? margin - demand : margin;
    const BradleyTerry<T> demanded = has_demand ? bradley_terry(x) : plain;
    loss = demanded.loss + smoothing * x;
    slope = demanded.slope + smoothing;
  }
};

// What one pair adds to the sums, and what is written of it.
template <typename T>
struct PairTerms {
  T sums[kNumPairLossSums];
  T sfc, slope, proxy_slope;
};

// The proxy's margin is not used in mode standard, the demand not without one. A loop vectorises where `mode` and
// `has_demand` are constants.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE PairTerms<T> pair_terms(PairLossMode mode, T margin, T proxy_margin, T demand,
                                                     bool has_demand, T weight, T smoothing) {
  const bool has_proxy = mode != PairLossMode::standard;
  const BranchLoss<T> main(margin, demand, has_demand, smoothing);
  const BranchLoss<T> proxy(has_proxy ? proxy_margin : T(0), demand, has_demand, smoothing);
  const T sfc = shortcut_failure(mode, main.plain.loss, proxy.plain);
  PairTerms<T> terms;
  terms.sums[kMain] = weight * sfc * main.loss;
  terms.sums[kProxy] = has_proxy ? weight * proxy.loss : T(0);
  terms.sums[kWeight] = weight;
  terms.sums[kWeightedSfc] = weight * sfc;
  terms.sums[kMainCorrect] = correct(margin);
  terms.sums[kProxyCorrect] = has_proxy ? correct(proxy_margin) : T(0);
  terms.sums[kBtMain] = weight * main.plain.loss;
  terms.sfc = sfc;
  terms.slope = weight * sfc * main.slope;
  terms.proxy_slope = weight * proxy.slope;
  return terms;
}

}  // namespace mmrm
