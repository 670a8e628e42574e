#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

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

// -logsigmoid(x) and its derivative -sigmoid(-x), from one exponential that cannot overflow.
template <typename T>
inline LossAndSlope<T> bradley_terry(T x) {
  const T e = std::exp(-std::abs(x));
  return {std::log1p(e) + std::max(-x, T(0)), -(x < T(0) ? T(1) : e) / (T(1) + e)};
}

// (1 - s) l(x) + s l(-x), by l(-x) = l(x) + x.
template <typename T>
inline LossAndSlope<T> smoothed(LossAndSlope<T> plain, T x, T smoothing) {
  return {plain.loss + smoothing * x, plain.slope + smoothing};
}

// Shortcut-Failure Coefficient from the plain losses of the main model and the proxy.
template <typename T>
inline T shortcut_failure(T main_loss, T proxy_loss, const PairLossOptions& options) {
  if (options.mode == SfcMode::standard) return T(1);
  if (options.warmup) return T(0.5);
  const T epsilon = T(1e-7);
  const T total = epsilon + main_loss + proxy_loss;
  const T sfc = options.mode == SfcMode::paper ? (epsilon / 2 + proxy_loss) / total : epsilon / 2 + proxy_loss / total;
  return std::max(sfc, T(options.floor));
}

// 1, 1/2 for a tie, 0.
template <typename T>
inline T correct(T margin) {
  return margin > T(0) ? T(1) : margin == T(0) ? T(0.5) : T(0);
}

}  // namespace mmrm
