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

template <typename T>
MMRM_INLINE double lane_sum(const std::array<T, kLanes>& values) {
  double lanes[kLanes];
  std::copy(values.begin(), values.end(), lanes);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// A chunk of the inputs and outputs, whose weights are there and whose other missing inputs are not read.
template <typename T>
struct Chunk {
  const T *margin, *proxy_margin, *demand, *weight;
  T *sfc, *slope, *proxy_slope;
  int64_t size;
  T smoothing;
};

// Writes what a chunk's pairs have of their own and returns their sums.
template <PairLossMode mode, bool has_demand, typename T>
MMRM_CLONES Sums run_chunk(const Chunk<T>& chunk) {
  constexpr bool has_proxy = mode != PairLossMode::standard;
  const T *margin = chunk.margin, *proxy_margin = chunk.proxy_margin, *demand = chunk.demand, *weight = chunk.weight;
  T *__restrict sfc = chunk.sfc, *__restrict slope = chunk.slope, *__restrict proxy_slope = chunk.proxy_slope;
  const int64_t size = chunk.size;
  const T smoothing = chunk.smoothing;
  alignas(64) std::array<T, kLanes> lanes[kNumPairLossSums] = {};
  const auto run = [&](int64_t i, int64_t lane) MMRM_ALWAYS_INLINE {
    const PairTerms<T> terms = pair_terms(mode, margin[i], has_proxy ? proxy_margin[i] : T(0),
                                          has_demand ? demand[i] : T(0), has_demand, weight[i], smoothing);
    for (int sum = 0; sum < kNumPairLossSums; ++sum) lanes[sum][lane] += terms.sums[sum];
    sfc[i] = terms.sfc;
    slope[i] = terms.slope;
    if (has_proxy) proxy_slope[i] = terms.proxy_slope;
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

template <typename T>
using RunChunk = Sums (*)(const Chunk<T>&);

template <PairLossMode mode, typename T>
RunChunk<T> run_chunk_of(bool has_demand) {
  return has_demand ? run_chunk<mode, true, T> : run_chunk<mode, false, T>;
}

template <typename T>
RunChunk<T> run_chunk_of(PairLossMode mode, bool has_demand) {
  switch (mode) {
    case PairLossMode::standard: return run_chunk_of<PairLossMode::standard, T>(has_demand);
    case PairLossMode::paper: return run_chunk_of<PairLossMode::paper, T>(has_demand);
    case PairLossMode::reference: return run_chunk_of<PairLossMode::reference, T>(has_demand);
    case PairLossMode::balanced: return run_chunk_of<PairLossMode::balanced, T>(has_demand);
  }
  return nullptr;
}

template <typename T>
T* at(T* values, int64_t first) {
  return values ? values + first : nullptr;
}

}  // namespace

template <typename T>
void pair_loss_fwd_cpu(const PairLossInputs<T>& in, const PairLossOutputs<T>& out, [[maybe_unused]] int num_threads) {
  const int64_t num_chunks = (in.num_pairs + kChunk - 1) / kChunk;
  const RunChunk<T> run = run_chunk_of<T>(in.mode, in.demand != nullptr);
  std::array<T, kChunk> ones;
  ones.fill(T(1));
  std::vector<Sums> chunk_sums(num_chunks);
#pragma omp parallel for num_threads(num_threads) if (in.num_pairs >= kParallelPairs)
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t first = chunk * kChunk;
    chunk_sums[chunk] = run({in.margin + first, at(in.proxy_margin, first), at(in.demand, first),
                             in.weight ? in.weight + first : ones.data(), out.sfc + first, out.slope + first,
                             at(out.proxy_slope, first), std::min(kChunk, in.num_pairs - first), T(in.label_smoothing)});
  }
  Sums sums{};
  for (const Sums& chunk : chunk_sums) {
    for (int i = 0; i < kNumPairLossSums; ++i) sums[i] += chunk[i];
  }
  std::copy(sums.begin(), sums.end(), out.sums);
}

template void pair_loss_fwd_cpu(const PairLossInputs<float>&, const PairLossOutputs<float>&, int);
template void pair_loss_fwd_cpu(const PairLossInputs<double>&, const PairLossOutputs<double>&, int);

}  // namespace mmrm
