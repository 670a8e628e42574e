#include "pair_loss.h"

#include <algorithm>
#include <array>
#include <vector>

namespace mmrm {
namespace {

constexpr int64_t kChunk = 256;              // pairs summed in a row; fixed, so that sums do not depend on threads
constexpr int64_t kLanes = 32;               // partial sums of a chunk, likewise
constexpr int64_t kParallelPairs = 1 << 14;  // below this, starting threads costs more than it saves

// float64 for both types, but for the few terms of a lane: a long row of equal fp32 terms drifts by 1e-5.
using Sums = std::array<double, kNumPairLossSums>;

// What the terms of a chunk's pairs are computed from.
template <typename T>
struct Columns {
  using Column = std::array<T, kChunk>;
  Column difference, total, proxy_difference, margin, weight;

  MMRM_INLINE PairValues<T> operator[](int64_t i) const {
    return {difference[i], total[i], proxy_difference[i], margin[i], weight[i]};
  }
};

// A pair's gradients at one of its two rewards, in both branches.
template <typename T>
struct End {
  T main, proxy;
};

// Pairs [first, first + size). By itself, for it gains nothing from the gather instructions of newer CPUs.
template <typename T>
void load_pairs(const PairLossInputs<T>& in, int64_t first, int64_t size, Columns<T>& out) {
  const T *rewards = in.rewards, *proxy_rewards = in.proxy_rewards ? in.proxy_rewards : in.rewards;
  const int64_t *chosen = in.chosen + first, *rejected = in.rejected + first;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t c = chosen[i], r = rejected[i];
    out.difference[i] = rewards[c] - rewards[r];
    out.total[i] = rewards[c] + rewards[r];
    out.proxy_difference[i] = proxy_rewards[c] - proxy_rewards[r];
  }
  if (in.margin) std::copy_n(in.margin + first, size, out.margin.begin());
  in.weight ? std::copy_n(in.weight + first, size, out.weight.begin()) : std::fill_n(out.weight.begin(), size, T(1));
}

template <typename T>
MMRM_INLINE double lane_sum(const std::array<T, kLanes>& values) {
  double lanes[kLanes];
  std::copy(values.begin(), values.end(), lanes);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// The sums of a chunk's pairs; of each pair its SFC and both ends.
template <bool has_proxy, bool has_margin, typename T>
MMRM_CLONES Sums run_chunk(const Columns<T>& pairs, const PairLossOptions options, int64_t size, T* __restrict sfc,
                           End<T>* __restrict ends) {
  alignas(64) std::array<T, kLanes> lanes[kNumPairLossSums] = {};
  const ShortcutFailure<T> shortcut_failure(options);
  const auto run = [&](int64_t i, int64_t lane) MMRM_ALWAYS_INLINE {
    const PairTerms<T> terms = pair_terms(pairs[i], has_proxy, has_margin, options, shortcut_failure);
    for (int sum = 0; sum < kNumPairLossSums; ++sum) lanes[sum][lane] += terms.sums[sum];
    sfc[i] = terms.sfc;
    ends[2 * i] = {terms.pull + terms.slope, terms.proxy_slope};
    ends[2 * i + 1] = {terms.pull - terms.slope, -terms.proxy_slope};
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) run(i + lane, lane);
  }
  for (int64_t lane = 0; i < size; ++i, ++lane) run(i, lane);
  Sums sums;
  for (int sum = 0; sum < kNumPairLossSums; ++sum) sums[sum] = lane_sum(lanes[sum]);
  return sums;
}

// Chunk number `chunk` of the pairs.
template <typename T>
Sums run_pairs(const PairLossInputs<T>& in, const PairLossOptions& options, int64_t chunk, T* sfc, End<T>* ends) {
  const int64_t first = chunk * kChunk, size = std::min(kChunk, in.num_pairs - first);
  alignas(64) Columns<T> pairs;
  load_pairs(in, first, size, pairs);
  const auto run = in.proxy_rewards ? (in.margin ? run_chunk<true, true, T> : run_chunk<true, false, T>)
                                    : (in.margin ? run_chunk<false, true, T> : run_chunk<false, false, T>);
  return run(pairs, options, size, sfc + first, ends + 2 * first);
}

// Gradients of rewards [first, last): the sums over the ends of pairs that they are.
template <bool has_proxy, typename T>
void gather_rows(const PairLossInputs<T>& in, const End<T>* ends, int64_t first, int64_t last,
                 const PairLossOutputs<T>& out) {
  int64_t i = in.row_ptr[first];
  for (int64_t row = first; row < last; ++row) {
    T main = 0, proxy = 0;
    for (const int64_t end = in.row_ptr[row + 1]; i < end; ++i) {
      const End<T>& entry = ends[in.row_entry[i]];
      main += entry.main;
      if (has_proxy) proxy += entry.proxy;
    }
    out.grad_rewards[row] = main;
    if (has_proxy) out.grad_proxy[row] = proxy;
  }
}

}  // namespace

template <typename T>
void pair_loss_fwd_cpu(const PairLossInputs<T>& in, const PairLossOptions& options, const PairLossOutputs<T>& out,
                       [[maybe_unused]] int num_threads) {
  const int64_t num_chunks = (in.num_pairs + kChunk - 1) / kChunk;
  const int64_t num_blocks = (in.num_rewards + kChunk - 1) / kChunk;
  std::vector<Sums> chunk_sums(num_chunks);
  // Kept for the next step: at these sizes fresh pages cost more than the arithmetic.
  static thread_local std::vector<End<T>> memory;
  if (memory.size() < size_t(2 * in.num_pairs)) memory.resize(2 * in.num_pairs);
  End<T>* const ends = memory.data();
#pragma omp parallel num_threads(num_threads) if (in.num_pairs >= kParallelPairs)
  {
#pragma omp for
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      chunk_sums[chunk] = run_pairs(in, options, chunk, out.sfc, ends);
    }
#pragma omp for
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t first = block * kChunk, last = std::min(first + kChunk, in.num_rewards);
      const auto gather = in.proxy_rewards ? gather_rows<true, T> : gather_rows<false, T>;
      gather(in, ends, first, last, out);
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
