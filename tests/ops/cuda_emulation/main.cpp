// Runs a launch of the CUDA kernels under emulation: emulate <op> <dtype> < arguments > results.
// Every argument and result is an int64 number of bytes and the bytes.

#include <cinttypes>
#include <string>

#include "cuda_ops.h"

namespace {

using mmrm::emulation::fail;

// Of exactly its size, so that every step outside is one into a red zone.
template <typename T>
struct Array {
  int64_t size;
  std::unique_ptr<T[]> memory;

  explicit Array(int64_t size) : size(size), memory(new T[size]) { std::memset(memory.get(), 0xff, size * sizeof(T)); }

  // Where element `offset` is the first one in memory: a large array of which only the end exists.
  T* from(int64_t offset) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory.get()) - offset * sizeof(T));
  }
  T* get() const { return size ? memory.get() : nullptr; }
};

template <typename T>
Array<T> read() {
  int64_t bytes = 0;
  if (std::fread(&bytes, sizeof(bytes), 1, stdin) != 1) fail("an argument is missing");
  Array<T> array(bytes / int64_t(sizeof(T)));
  if (std::fread(array.memory.get(), 1, bytes, stdin) != size_t(bytes)) fail("an argument is too short");
  return array;
}

template <typename T>
void write(const Array<T>& array) {
  const int64_t bytes = array.size * int64_t(sizeof(T));
  std::fwrite(&bytes, sizeof(bytes), 1, stdout);
  std::fwrite(array.memory.get(), 1, bytes, stdout);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) fail("the launch was refused");
}

// Only the blocks that take items [offset, offset + count) of a grid that begins with `first` other blocks.
void skip_to(int64_t offset, int64_t count, int64_t items_per_block, int64_t first) {
  if (offset == 0) return;
  for (int64_t block = 0; block < first; ++block) mmrm::emulation::only_blocks.push_back(unsigned(block));
  for (int64_t item = 0; item < count; item += items_per_block) {
    mmrm::emulation::only_blocks.push_back(unsigned(first + (offset + item) / items_per_block));
  }
}

// Pairs [0, offset) do not exist; with an offset the sums stay unset.
template <typename T>
void pair_loss() {
  const Array<T> margin = read<T>(), proxy = read<T>(), demand = read<T>(), weight = read<T>();
  const Array<int64_t> integers = read<int64_t>();
  const Array<double> smoothing = read<double>();
  const int64_t offset = integers.memory[0], P = margin.size, chunk = 1024, sums_per_chunk = mmrm::kNumPairLossSums;
  const auto from = [=](const Array<T>& array) { return array.size ? array.from(offset) : nullptr; };
  const Array<T> sums(sums_per_chunk), sfc(P), slope(P), proxy_slope(proxy.size);
  const Array<double> scratch(mmrm::pair_loss_scratch_size(offset + P) - offset / chunk * sums_per_chunk);
  const mmrm::PairLossInputs<T> in{from(margin), from(proxy), from(demand), from(weight), offset + P,
                                   mmrm::PairLossMode(integers.memory[1]), smoothing.memory[0]};
  const mmrm::PairLossOutputs<T> out{sums.get(), from(sfc), from(slope), from(proxy_slope)};
  skip_to(offset, P, chunk, 0);
  check(mmrm::launch_pair_loss_fwd(in, out, scratch.from(offset / chunk * sums_per_chunk), nullptr));
  write(sums), write(sfc), write(slope), write(proxy_slope);
}

// Rows [0, offset) of every array do not exist; `shift` elements come before the first row.
template <typename Bits>
void pack_fwd() {
  const Array<Bits> embedding = read<Bits>(), features = read<Bits>();
  const Array<int64_t> source = read<int64_t>(), integers = read<int64_t>();
  const int64_t width = integers.memory[0], offset = integers.memory[1], shift = integers.memory[2], T = source.size;
  const Array<Bits> out(shift + T * width);
  const mmrm::PackImageTokensFwd<Bits> args{embedding.from(offset * width) + shift,
                                            features.from(offset * width) + shift,
                                            source.from(offset),
                                            out.from(offset * width) + shift,
                                            offset + T,
                                            width};
  skip_to(offset, T, 1, 0);
  check(mmrm::launch_pack_image_tokens_fwd(args, nullptr));
  write(out);
}

// Tokens and embeddings [0, offset) do not exist.
template <typename T>
void pack_bwd() {
  const Array<T> grad = read<T>();
  const Array<int64_t> order = read<int64_t>(), segment_ptr = read<int64_t>(), segment_source = read<int64_t>();
  const Array<int64_t> integers = read<int64_t>();
  const int64_t width = integers.memory[0], V = integers.memory[1], F = integers.memory[2];
  const int64_t offset = integers.memory[3], shift = integers.memory[4];
  const Array<T> grad_embedding(shift + V * width), grad_features(shift + F * width);
  const mmrm::PackImageTokensBwd<T> args{grad.from(offset * width) + shift,
                                         order.get(),
                                         segment_ptr.get(),
                                         segment_source.get(),
                                         grad_embedding.from(offset * width) + shift,
                                         grad_features.get() + shift,
                                         segment_source.size,
                                         V ? offset + V : 0,
                                         F,
                                         width};
  skip_to(offset, V, 1, F);
  check(mmrm::launch_pack_image_tokens_bwd(args, nullptr));
  write(grad_embedding), write(grad_features);
}

// What the tests rely on: every thread's turn, barriers, poisoned shared memory, shuffles, atomics.
void self_test_kernel(int* counts, double* poison) {
  MMRM_SHARED(int, values, 64);
  MMRM_SHARED(double, untouched, 1);
  values[threadIdx.x] = int(blockIdx.x * blockDim.x + threadIdx.x);
  __syncthreads();
  atomicAdd(counts + values[blockDim.x - 1 - threadIdx.x], __shfl_down_sync(~0u, values[threadIdx.x], 1, 8));
  *poison = *untouched;
}

void self_test() {
  const Array<int> counts(128);
  std::memset(counts.get(), 0, 128 * sizeof(int));
  double poison = 0;
  MMRM_LAUNCH(self_test_kernel, 2u, 64u, nullptr, counts.get(), &poison);
  check(cudaGetLastError());
  for (int i = 0; i < 128; ++i) {
    const int reader = i / 64 * 64 + 63 - i % 64;
    if (counts.get()[i] != (reader % 8 == 7 ? reader : reader + 1)) fail("a shuffle or a barrier is wrong");
  }
  if (poison == poison) fail("shared memory is not poisoned");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) fail("usage: emulate <op> <dtype> [reversed]");
  const std::string name = std::string(argv[1]) + " " + argv[2];
  mmrm::emulation::reversed = argc > 3;
  if (name == "self_test int32") return self_test(), 0;
  if (name == "pair_loss float32") return pair_loss<float>(), 0;
  if (name == "pair_loss float64") return pair_loss<double>(), 0;
  if (name == "pack_fwd float16" || name == "pack_fwd bfloat16") return pack_fwd<uint16_t>(), 0;
  if (name == "pack_fwd float32") return pack_fwd<uint32_t>(), 0;
  if (name == "pack_fwd float64") return pack_fwd<uint64_t>(), 0;
  if (name == "pack_bwd bfloat16") return pack_bwd<mmrm::bf16_t>(), 0;
  if (name == "pack_bwd float16") return pack_bwd<mmrm::fp16_t>(), 0;
  if (name == "pack_bwd float32") return pack_bwd<float>(), 0;
  if (name == "pack_bwd float64") return pack_bwd<double>(), 0;
  fail("unknown op");
}
