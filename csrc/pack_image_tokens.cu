#include "cuda_ops.h"

namespace mmrm {
namespace {

constexpr int kThreads = 128;           // a block takes a row at a time
constexpr int64_t kMaxBlocks = 1 << 30;  // more rows than that share blocks

// 16 bytes of a row, in registers.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <typename T>
__device__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0;
}

// The first `count` values; the others stay unset. One 16-byte access where the address allows it.
template <typename T>
__device__ Vector<T> load(const T* values, int64_t count) {
  Vector<T> vector;
  if (count >= Vector<T>::kSize && is_aligned(values)) {
    const uint4 bits = *reinterpret_cast<const uint4*>(values);
    memcpy(&vector, &bits, sizeof(vector));
    return vector;
  }
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    if (i < count) vector.values[i] = values[i];
  }
  return vector;
}

template <typename T>
__device__ void store(T* values, int64_t count, const Vector<T>& vector) {
  if (count >= Vector<T>::kSize && is_aligned(values)) {
    uint4 bits;
    memcpy(&bits, &vector, sizeof(vector));
    *reinterpret_cast<uint4*>(values) = bits;
    return;
  }
#pragma unroll
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    if (i < count) values[i] = vector.values[i];
  }
}

// Row of the table, or of the features, that a source names.
template <typename T>
__device__ T* source_row(T* embedding, T* features, int64_t source, int64_t width) {
  return source >= 0 ? embedding + source * width : features + (-1 - source) * width;
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads) pack_image_tokens_fwd_kernel(PackImageTokensFwd<Bits> args) {
  constexpr int kSize = Vector<Bits>::kSize;
  for (int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
    const Bits* in = source_row(args.embedding, args.features, args.source[token], args.width);
    Bits* out = args.out + token * args.width;
    for (int64_t column = int64_t(threadIdx.x) * kSize; column < args.width; column += kThreads * kSize) {
      store(out + column, args.width - column, load(in + column, args.width - column));
    }
  }
}

// Position of the first source that is not below `source`.
__device__ int64_t lower_bound(const int64_t* sources, int64_t size, int64_t source) {
  int64_t first = 0;
  while (size > 0) {
    const int64_t half = size / 2;
    const bool is_below = sources[first + half] < source;
    first = is_below ? first + half + 1 : first;
    size = is_below ? size - half - 1 : half;
  }
  return first;
}

// Every row of both gradients is written once: the sum of its segment in index order, zeros where nothing reads it.
template <typename T>
__global__ void __launch_bounds__(kThreads) pack_image_tokens_bwd_kernel(PackImageTokensBwd<T> args) {
  using Sum = compute_t<T>;
  constexpr int kSize = Vector<T>::kSize;
  for (int64_t row = blockIdx.x; row < args.num_features + args.num_embeddings; row += gridDim.x) {
    const int64_t source = row - args.num_features;
    const int64_t segment = lower_bound(args.segment_source, args.num_segments, source);
    const bool is_read = segment < args.num_segments && args.segment_source[segment] == source;
    const int64_t begin = is_read ? args.segment_ptr[segment] : 0, end = is_read ? args.segment_ptr[segment + 1] : 0;
    T* out = source_row(args.grad_embedding, args.grad_features, source, args.width);
    for (int64_t column = int64_t(threadIdx.x) * kSize; column < args.width; column += kThreads * kSize) {
      const int64_t count = args.width - column;
      Sum sums[kSize] = {};
      for (int64_t i = begin; i < end; ++i) {
        const Vector<T> grad = load(args.grad + args.order[i] * args.width + column, count);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if (k < count) sums[k] += convert<Sum>(grad.values[k]);
        }
      }
      Vector<T> total;
#pragma unroll
      for (int k = 0; k < kSize; ++k) total.values[k] = convert<T>(sums[k]);
      store(out + column, count, total);
    }
  }
}

}  // namespace

template <typename Bits>
cudaError_t launch_pack_image_tokens_fwd(const PackImageTokensFwd<Bits>& args, cudaStream_t stream) {
  if (args.num_tokens == 0 || args.width == 0) return cudaSuccess;
  const unsigned num_blocks = unsigned(args.num_tokens < kMaxBlocks ? args.num_tokens : kMaxBlocks);
  MMRM_LAUNCH(pack_image_tokens_fwd_kernel<Bits>, num_blocks, kThreads, stream, args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_pack_image_tokens_bwd(const PackImageTokensBwd<T>& args, cudaStream_t stream) {
  const int64_t num_rows = args.num_features + args.num_embeddings;
  if (num_rows == 0 || args.width == 0) return cudaSuccess;
  const unsigned num_blocks = unsigned(num_rows < kMaxBlocks ? num_rows : kMaxBlocks);
  MMRM_LAUNCH(pack_image_tokens_bwd_kernel<T>, num_blocks, kThreads, stream, args);
  return cudaGetLastError();
}

template cudaError_t launch_pack_image_tokens_fwd(const PackImageTokensFwd<uint16_t>&, cudaStream_t);
template cudaError_t launch_pack_image_tokens_fwd(const PackImageTokensFwd<uint32_t>&, cudaStream_t);
template cudaError_t launch_pack_image_tokens_fwd(const PackImageTokensFwd<uint64_t>&, cudaStream_t);
template cudaError_t launch_pack_image_tokens_bwd(const PackImageTokensBwd<float>&, cudaStream_t);
template cudaError_t launch_pack_image_tokens_bwd(const PackImageTokensBwd<double>&, cudaStream_t);
template cudaError_t launch_pack_image_tokens_bwd(const PackImageTokensBwd<bf16_t>&, cudaStream_t);
template cudaError_t launch_pack_image_tokens_bwd(const PackImageTokensBwd<fp16_t>&, cudaStream_t);

}  // namespace mmrm
