#include "cuda_ops.h"

namespace mmrm {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kNumWarps = kThreads / kWarp;
constexpr int64_t kChunk = 4 * kThreads;  // pairs summed by a block; fixed, so that sums do not depend on the device
constexpr int64_t kMaxBlocks = 0x7fffffff;

// The first lane of a warp gets the sum, always in the same order.
__device__ double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kAllLanes, value, distance, kWarp);
  }
  return value;
}

template <typename T>
__device__ PairTerms<T> run_pair(const PairLossInputs<T>& in, const PairLossOutputs<T>& out, int64_t pair) {
  const T proxy_margin = in.proxy_margin ? in.proxy_margin[pair] : T(0);
  const T demand = in.demand ? in.demand[pair] : T(0), weight = in.weight ? in.weight[pair] : T(1);
  const PairTerms<T> terms = pair_terms(in.mode, in.margin[pair], proxy_margin, demand, in.demand != nullptr, weight,
                                        T(in.label_smoothing));
  out.sfc[pair] = terms.sfc;
  out.slope[pair] = terms.slope;
  if (in.proxy_margin) out.proxy_slope[pair] = terms.proxy_slope;
  return terms;
}

// A block takes a chunk of pairs; its sums in float64, as on the CPU.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pair_loss_fwd_kernel(PairLossInputs<T> in, PairLossOutputs<T> out, double* chunk_sums) {
  MMRM_SHARED(double, warp_sums, kNumPairLossSums * kNumWarps);
  const int thread = threadIdx.x, warp = thread / kWarp;
  const int64_t first = blockIdx.x * kChunk, end = first + kChunk < in.num_pairs ? first + kChunk : in.num_pairs;
  double sums[kNumPairLossSums] = {};
  for (int64_t pair = first + thread; pair < end; pair += kThreads) {
    const PairTerms<T> terms = run_pair(in, out, pair);
#pragma unroll
    for (int i = 0; i < kNumPairLossSums; ++i) sums[i] += terms.sums[i];
  }
#pragma unroll
  for (int i = 0; i < kNumPairLossSums; ++i) {
    const double sum = warp_sum(sums[i]);
    if (thread % kWarp == 0) warp_sums[i * kNumWarps + warp] = sum;
  }
  __syncthreads();
  if (thread >= kNumPairLossSums) return;
  double sum = 0;
  for (int i = 0; i < kNumWarps; ++i) sum += warp_sums[thread * kNumWarps + i];
  if (gridDim.x == 1) {
    out.sums[thread] = T(sum);
  } else {
    chunk_sums[blockIdx.x * int64_t(kNumPairLossSums) + thread] = sum;
  }
}

// One block, one warp a sum, over the chunks in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kNumPairLossSums* kWarp)
    pair_loss_sum_kernel(const double* chunk_sums, int64_t num_chunks, T* sums) {
  const int i = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double sum = 0;
  for (int64_t chunk = lane; chunk < num_chunks; chunk += kWarp) sum += chunk_sums[chunk * kNumPairLossSums + i];
  sum = warp_sum(sum);
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
cudaError_t launch_pair_loss_fwd(const PairLossInputs<T>& in, const PairLossOutputs<T>& out, double* scratch,
                                 cudaStream_t stream) {
  const int64_t num_chunks = count_chunks(in.num_pairs);
  if (num_chunks > kMaxBlocks) return cudaErrorInvalidConfiguration;
  MMRM_LAUNCH(pair_loss_fwd_kernel<T>, unsigned(num_chunks), kThreads, stream, in, out, scratch);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || num_chunks == 1) return error;
  MMRM_LAUNCH(pair_loss_sum_kernel<T>, 1u, kNumPairLossSums * kWarp, stream, scratch, num_chunks, out.sums);
  return cudaGetLastError();
}

template cudaError_t launch_pair_loss_fwd(const PairLossInputs<float>&, const PairLossOutputs<float>&, double*,
                                          cudaStream_t);
template cudaError_t launch_pair_loss_fwd(const PairLossInputs<double>&, const PairLossOutputs<double>&, double*,
                                          cudaStream_t);

}  // namespace mmrm
