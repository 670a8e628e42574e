#include "cuda_ops.h"

namespace mmrm {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kNumWarps = kThreads / kWarp;
constexpr int64_t kChunk = 4 * kThreads;  // pairs summed by a block; fixed, so that sums do not depend on the device
constexpr int kRowLanes = 8;              // threads that share a reward; one of K responses is in K - 1 pairs
constexpr int kRowsPerBlock = kThreads / kRowLanes;
constexpr int64_t kMaxBlocks = 0x7fffffff;

// The first of `width` neighbouring lanes gets their sum, in an order that only depends on `width`.
template <int width, typename T>
__device__ T lane_sum(T value) {
#pragma unroll
  for (int distance = width / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kAllLanes, value, distance, width);
  }
  return value;
}

template <typename T>
__device__ PairTerms<T> load_terms(const PairLossInputs<T>& in, const PairLossOptions& options, int64_t pair) {
  const int64_t chosen = in.chosen[pair], rejected = in.rejected[pair];
  const bool has_proxy = in.proxy_rewards != nullptr, has_margin = in.margin != nullptr;
  PairValues<T> values{};
  values.difference = in.rewards[chosen] - in.rewards[rejected];
  values.total = in.rewards[chosen] + in.rewards[rejected];
  if (has_proxy) values.proxy_difference = in.proxy_rewards[chosen] - in.proxy_rewards[rejected];
  if (has_margin) values.margin = in.margin[pair];
  values.weight = in.weight ? in.weight[pair] : T(1);
  return pair_terms(values, has_proxy, has_margin, options, ShortcutFailure<T>(options));
}

// A chunk's sums, in float64 as on the CPU, and the SFC of its pairs.
template <typename T>
__device__ void sum_chunk(const PairLossInputs<T>& in, const PairLossOptions& options, const PairLossOutputs<T>& out,
                          double* chunk_sums, int64_t chunk, int64_t num_chunks) {
  MMRM_SHARED(double, warp_sums, kNumPairLossSums * kNumWarps);
  const int thread = threadIdx.x, warp = thread / kWarp;
  double sums[kNumPairLossSums] = {};
  const int64_t end = (chunk + 1) * kChunk < in.num_pairs ? (chunk + 1) * kChunk : in.num_pairs;
  for (int64_t pair = chunk * kChunk + thread; pair < end; pair += kThreads) {
    const PairTerms<T> terms = load_terms(in, options, pair);
    out.sfc[pair] = terms.sfc;
#pragma unroll
    for (int i = 0; i < kNumPairLossSums; ++i) sums[i] += terms.sums[i];
  }
#pragma unroll
  for (int i = 0; i < kNumPairLossSums; ++i) {
    const double sum = lane_sum<kWarp>(sums[i]);
    if (thread % kWarp == 0) warp_sums[i * kNumWarps + warp] = sum;
  }
  __syncthreads();
  if (thread >= kNumPairLossSums) return;
  double sum = 0;
  for (int i = 0; i < kNumWarps; ++i) sum += warp_sums[thread * kNumWarps + i];
  if (num_chunks == 1) {
    out.sums[thread] = T(sum);
  } else {
    chunk_sums[chunk * kNumPairLossSums + thread] = sum;
  }
}

// Gradients of rewards [first, first + kRowsPerBlock). The slopes of a pair are computed again for each of its ends:
// cheaper than a trip through memory, and every gradient is ready after one launch.
template <typename T>
__device__ void gather_rows(const PairLossInputs<T>& in, const PairLossOptions& options, const PairLossOutputs<T>& out,
                            int64_t first) {
  const int64_t row = first + threadIdx.x / kRowLanes;
  const int lane = threadIdx.x % kRowLanes;
  T main = 0, proxy = 0;
  if (row < in.num_rewards) {
    for (int64_t i = in.row_ptr[row] + lane; i < in.row_ptr[row + 1]; i += kRowLanes) {
      const int64_t entry = in.row_entry[i];
      const PairTerms<T> terms = load_terms(in, options, entry / 2);
      const bool is_chosen = entry % 2 == 0;
      main += terms.pull + (is_chosen ? terms.slope : -terms.slope);
      proxy += is_chosen ? terms.proxy_slope : -terms.proxy_slope;
    }
  }
  main = lane_sum<kRowLanes>(main);
  proxy = lane_sum<kRowLanes>(proxy);
  if (lane != 0 || row >= in.num_rewards) return;
  out.grad_rewards[row] = main;
  if (in.proxy_rewards) out.grad_proxy[row] = proxy;
}

// Blocks [0, num_chunks) take a chunk of pairs each, the others kRowsPerBlock rewards each.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pair_loss_fwd_kernel(PairLossInputs<T> in, PairLossOptions options, PairLossOutputs<T> out, double* chunk_sums,
                         int64_t num_chunks) {
  const int64_t block = blockIdx.x;
  if (block < num_chunks) {
    sum_chunk(in, options, out, chunk_sums, block, num_chunks);
  } else {
    gather_rows(in, options, out, (block - num_chunks) * kRowsPerBlock);
  }
}

// One block, one warp a sum, over the chunks in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kNumPairLossSums* kWarp)
    pair_loss_sum_kernel(const double* chunk_sums, int64_t num_chunks, T* sums) {
  const int i = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double sum = 0;
  for (int64_t chunk = lane; chunk < num_chunks; chunk += kWarp) sum += chunk_sums[chunk * kNumPairLossSums + i];
  sum = lane_sum<kWarp>(sum);
  if (lane == 0) sums[i] = T(sum);
}

// At least one, which writes the sums of no pairs.
int64_t count_chunks(int64_t num_pairs) { return num_pairs <= kChunk ? 1 : (num_pairs + kChunk - 1) / kChunk; }

}  // namespace

int64_t pair_loss_scratch_size(int64_t num_pairs) {
  const int64_t num_chunks = count_chunks(num_pairs);
  return num_chunks == 1 ? 0 : num_chunks * kNumPairLossSums;
}

template <typename T>
cudaError_t launch_pair_loss_fwd(const PairLossInputs<T>& in, const PairLossOptions& options,
                                 const PairLossOutputs<T>& out, double* scratch, cudaStream_t stream) {
  const int64_t num_chunks = count_chunks(in.num_pairs);
  const int64_t num_blocks = num_chunks + (in.num_rewards + kRowsPerBlock - 1) / kRowsPerBlock;
  if (num_blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  MMRM_LAUNCH(pair_loss_fwd_kernel<T>, unsigned(num_blocks), kThreads, stream, in, options, out, scratch, num_chunks);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || num_chunks == 1) return error;
  MMRM_LAUNCH(pair_loss_sum_kernel<T>, 1u, kNumPairLossSums * kWarp, stream, scratch, num_chunks, out.sums);
  return cudaGetLastError();
}

template cudaError_t launch_pair_loss_fwd(const PairLossInputs<float>&, const PairLossOptions&,
                                          const PairLossOutputs<float>&, double*, cudaStream_t);
template cudaError_t launch_pair_loss_fwd(const PairLossInputs<double>&, const PairLossOptions&,
                                          const PairLossOutputs<double>&, double*, cudaStream_t);

}  // namespace mmrm
