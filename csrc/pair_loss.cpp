#include "pair_loss.h"

#include <array>
#include <vector>

namespace mmrm {
namespace {

constexpr int64_t kChunk = 1024;             // pairs summed in a row; fixed, so that sums do not depend on threads
constexpr int64_t kParallelPairs = 1 << 13;  // below this, starting threads costs more than it saves

// float64 for both types: free beside the exponentials, and a long row of equal fp32 terms drifts by 1e-5.
using Sums = std::array<double, kNumPairLossSums>;

// Gradients of sums[kMain] and sums[kProxy] per end of a pair: index pair * 2 + (0 chosen | 1 rejected).
template <typename T>
struct EndGradients {
  std::vector<T> main, proxy;  // [2P]
};

template <typename T>
class PairLoss {
 public:
  PairLoss(const PairLossInputs<T>& in, const PairLossOptions& options, const PairLossOutputs<T>& out)
      : in_(in), options_(options), out_(out) {
    ends_.main.resize(2 * in.num_pairs);
    if (in.proxy_rewards) ends_.proxy.resize(2 * in.num_pairs);
  }

  void run([[maybe_unused]] int num_threads) {
    const int64_t num_chunks = (in_.num_pairs + kChunk - 1) / kChunk;
    std::vector<Sums> chunk_sums(num_chunks);
#pragma omp parallel num_threads(num_threads) if (in_.num_pairs >= kParallelPairs)
    {
#pragma omp for
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) chunk_sums[chunk] = run_chunk(chunk);
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
  Sums run_chunk(int64_t chunk) {
    Sums sums{};
    const int64_t end = std::min((chunk + 1) * kChunk, in_.num_pairs);
    for (int64_t pair = chunk * kChunk; pair < end; ++pair) run_pair(pair, sums);
    return sums;
  }

  void run_pair(int64_t pair, Sums& sums) {
    const T weight = in_.weight ? in_.weight[pair] : T(1);
    const T chosen = in_.rewards[in_.chosen[pair]];
    const T rejected = in_.rewards[in_.rejected[pair]];
    const T margin = chosen - rejected;
    const T total = chosen + rejected;
    const LossAndSlope<T> plain = bradley_terry(margin);
    const T proxy_loss = in_.proxy_rewards ? run_proxy(pair, weight, sums) : T(0);
    const T sfc = shortcut_failure(plain.loss, proxy_loss, options_);
    const LossAndSlope<T> loss = optimised(pair, margin, plain);
    const T centering = T(options_.centering);

    out_.sfc[pair] = sfc;
    sums[kMain] += weight * (sfc * loss.loss + centering * total * total);
    sums[kWeight] += weight;
    sums[kWeightedSfc] += weight * sfc;
    sums[kMainCorrect] += correct(margin);
    sums[kBtMain] += weight * plain.loss;
    const T slope = weight * sfc * loss.slope;
    const T pull = 2 * weight * centering * total;
    ends_.main[2 * pair] = pull + slope;
    ends_.main[2 * pair + 1] = pull - slope;
  }

  // Returns the plain loss of the proxy.
  T run_proxy(int64_t pair, T weight, Sums& sums) {
    const T margin = in_.proxy_rewards[in_.chosen[pair]] - in_.proxy_rewards[in_.rejected[pair]];
    const LossAndSlope<T> plain = bradley_terry(margin);
    const LossAndSlope<T> loss = optimised(pair, margin, plain);
    sums[kProxy] += weight * loss.loss;
    sums[kProxyCorrect] += correct(margin);
    ends_.proxy[2 * pair] = weight * loss.slope;
    ends_.proxy[2 * pair + 1] = -weight * loss.slope;
    return plain.loss;
  }

  // The loss with the pair's margin and label smoothing.
  LossAndSlope<T> optimised(int64_t pair, T margin, const LossAndSlope<T>& plain) const {
    const T smoothing = T(options_.label_smoothing);
    if (!in_.margin) return smoothed(plain, margin, smoothing);
    const T x = margin - in_.margin[pair];
    return smoothed(bradley_terry(x), x, smoothing);
  }

  void gather_row(int64_t row) {
    T main = 0, proxy = 0;
    for (int64_t i = in_.row_ptr[row]; i < in_.row_ptr[row + 1]; ++i) {
      main += ends_.main[in_.row_entry[i]];
      if (in_.proxy_rewards) proxy += ends_.proxy[in_.row_entry[i]];
    }
    out_.grad_rewards[row] = main;
    if (in_.proxy_rewards) out_.grad_proxy[row] = proxy;
  }

  const PairLossInputs<T>& in_;
  const PairLossOptions& options_;
  const PairLossOutputs<T>& out_;
  EndGradients<T> ends_;
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
