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
MMRM_HOST_DEVICE MMRM_INLINE T shortcut_failure(T main_loss, T proxy_loss, const PairLossOptions& options) {
  const T epsilon = T(1e-7);
  const bool is_paper = options.mode == SfcMode::paper;
  const T inside = is_paper ? epsilon / 2 : T(0), outside = is_paper ? T(0) : epsilon / 2;
  const T sfc = larger(outside + (inside + proxy_loss) / (epsilon + main_loss + proxy_loss), T(options.floor));
  return options.mode == SfcMode::standard ? T(1) : options.warmup ? T(0.5) : sfc;
}

// 1, 1/2 for a tie, 0.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE T correct(T margin) {
  return margin > T(0) ? T(1) : margin == T(0) ? T(0.5) : T(0);
}

// The loss of a pair whose difference of rewards is `difference`, with its margin and label smoothing.
template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE LossAndSlope<T> optimised_loss(const PairLossInputs<T>& in, const PairLossOptions& options,
                                                       int64_t pair, T difference, LossAndSlope<T> plain) {
  const T smoothing = T(options.label_smoothing);
  if (!in.margin) return smoothed(plain, difference, smoothing);
  const T x = difference - in.margin[pair];
  return smoothed(bradley_terry(x), x, smoothing);
}

// What the terms of a pair are computed from.
template <typename T>
struct PairValues {
  T weight, difference, total, proxy_difference;       // total: of the two rewards
  LossAndSlope<T> plain, optimised, proxy_plain, proxy_optimised;  // the last two are zero without a proxy
  bool has_proxy;
};

// What one pair adds to the sums, its SFC, and its gradients: of sums[kMain] pull + slope at the chosen reward and
// pull - slope at the rejected one, of sums[kProxy] proxy_slope and -proxy_slope.
template <typename T>
struct PairTerms {
  T sums[kNumPairLossSums];
  T sfc, slope, pull, proxy_slope;
};

template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE PairTerms<T> combine(const PairValues<T>& pair, const PairLossOptions& options) {
  const T weight = pair.weight, centering = T(options.centering);
  const T sfc = shortcut_failure(pair.plain.loss, pair.proxy_plain.loss, options);
  PairTerms<T> terms;
  terms.sums[kMain] = weight * (sfc * pair.optimised.loss + centering * pair.total * pair.total);
  terms.sums[kProxy] = weight * pair.proxy_optimised.loss;
  terms.sums[kWeight] = weight;
  terms.sums[kWeightedSfc] = weight * sfc;
  terms.sums[kMainCorrect] = correct(pair.difference);
  terms.sums[kProxyCorrect] = pair.has_proxy ? correct(pair.proxy_difference) : T(0);
  terms.sums[kBtMain] = weight * pair.plain.loss;
  terms.sfc = sfc;
  terms.slope = weight * sfc * pair.optimised.slope;
  terms.pull = 2 * weight * centering * pair.total;
  terms.proxy_slope = weight * pair.proxy_optimised.slope;
  return terms;
}

template <typename T>
MMRM_HOST_DEVICE MMRM_INLINE PairTerms<T> pair_terms(const PairLossInputs<T>& in, const PairLossOptions& options,
                                                int64_t pair) {
  const int64_t chosen = in.chosen[pair], rejected = in.rejected[pair];
  PairValues<T> values{};
  values.weight = in.weight ? in.weight[pair] : T(1);
  values.difference = in.rewards[chosen] - in.rewards[rejected];
  values.total = in.rewards[chosen] + in.rewards[rejected];
  values.plain = bradley_terry(values.difference);
  values.optimised = optimised_loss(in, options, pair, values.difference, values.plain);
  values.has_proxy = in.proxy_rewards != nullptr;
  if (values.has_proxy) {
    values.proxy_difference = in.proxy_rewards[chosen] - in.proxy_rewards[rejected];
    values.proxy_plain = bradley_terry(values.proxy_difference);
    values.proxy_optimised = optimised_loss(in, options, pair, values.proxy_difference, values.proxy_plain);
  }
  return combine(values, options);
}

}  // namespace mmrm
