#include "reward_head.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"
#include "memory.h"

namespace mmrm {
namespace {

constexpr int64_t kParallelSize = 1 << 17;  // values read; below this, starting threads costs more than it saves
constexpr int64_t kLanes = 64;     // partial sums of a dot product; fixed, so that the bits are the same on every CPU
constexpr int64_t kColumns = 256;  // of a thread's share of the weight's gradient
constexpr int64_t kChunk = 64;     // responses summed in a row, so that long sums of rounded terms do not drift
constexpr int64_t kBlockRows = 16;

template <typename T>
MMRM_CLONES compute_t<T> dot(const T* hidden, const compute_t<T>* weight, int64_t size) {
  using A = compute_t<T>;
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += convert<A>(hidden[i + lane]) * weight[i + lane];
  }
  for (int64_t lane = 0; i < size; ++i, ++lane) lanes[lane] += convert<A>(hidden[i]) * weight[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <typename T>
MMRM_CLONES void scale_row(const compute_t<T>* weight, compute_t<T> scale, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = convert<T>(scale * weight[i]);
}

// Columns [first, last) of the weight's gradient.
template <typename T>
MMRM_CLONES void sum_weight(const RewardHeadInputs<T>& in, const compute_t<T>* grad, int64_t first, int64_t last,
                            compute_t<T>* grad_weight) {
  using A = compute_t<T>;
  A totals[kColumns] = {};
  for (int64_t chunk = 0; chunk < in.num_responses; chunk += kChunk) {
    A sums[kColumns] = {};
    for (int64_t r = chunk; r < std::min(chunk + kChunk, in.num_responses); ++r) {
      const T* hidden = in.hidden + in.last_index[r] * in.width + first;
      for (int64_t k = 0; k < last - first; ++k) sums[k] += grad[r] * convert<A>(hidden[k]);
    }
    for (int64_t k = 0; k < last - first; ++k) totals[k] += sums[k];
  }
  std::copy_n(totals, last - first, grad_weight + first);
}

// Tokens that are read, increasing, each with the sum of its responses' gradients in index order.
template <typename T>
struct TokenGrads {
  std::vector<int64_t> tokens;
  std::vector<compute_t<T>> grads;

  TokenGrads(const RewardHeadInputs<T>& in, const compute_t<T>* grad) {
    std::vector<int64_t> order(in.num_responses);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return in.last_index[a] < in.last_index[b]; });
    for (const int64_t r : order) {
      if (tokens.empty() || tokens.back() != in.last_index[r]) {
        tokens.push_back(in.last_index[r]);
        grads.push_back(0);
      }
      grads.back() += grad[r];
    }
  }
};

// Rows [first, last) of the gradient of the hidden states.
template <typename T>
void write_rows(const RewardHeadInputs<T>& in, const TokenGrads<T>& read, int64_t first, int64_t last, T* grad_hidden) {
  int64_t next = std::lower_bound(read.tokens.begin(), read.tokens.end(), first) - read.tokens.begin();
  std::fill(grad_hidden + first * in.width, grad_hidden + last * in.width, T{});
  for (; next < int64_t(read.tokens.size()) && read.tokens[next] < last; ++next) {
    scale_row(in.weight, read.grads[next], in.width, grad_hidden + read.tokens[next] * in.width);
  }
}

}  // namespace

template <typename T>
void reward_head_fwd_cpu(const RewardHeadInputs<T>& in, compute_t<T>* rewards, [[maybe_unused]] int num_threads) {
  check_range("last_index", in.last_index, in.num_responses, 0, in.num_tokens);
#pragma omp parallel for num_threads(num_threads) if (in.num_responses * in.width >= kParallelSize)
  for (int64_t r = 0; r < in.num_responses; ++r) {
    rewards[r] = dot(in.hidden + in.last_index[r] * in.width, in.weight, in.width);
  }
}

template <typename T>
void reward_head_bwd_cpu(const RewardHeadInputs<T>& in, const compute_t<T>* grad, T* grad_hidden,
                         compute_t<T>* grad_weight, [[maybe_unused]] int num_threads) {
  check_range("last_index", in.last_index, in.num_responses, 0, in.num_tokens);
  use_huge_pages(grad_hidden, in.num_tokens * in.width * int64_t(sizeof(T)));
  const TokenGrads<T> read(in, grad);
  const int64_t num_blocks = (in.num_tokens + kBlockRows - 1) / kBlockRows;
#pragma omp parallel num_threads(num_threads) if ((in.num_tokens + in.num_responses) * in.width >= kParallelSize)
  {
#pragma omp for nowait
    for (int64_t block = 0; block < num_blocks; ++block) {
      write_rows(in, read, block * kBlockRows, std::min((block + 1) * kBlockRows, in.num_tokens), grad_hidden);
    }
#pragma omp for
    for (int64_t first = 0; first < in.width; first += kColumns) {
      sum_weight(in, grad, first, std::min(first + kColumns, in.width), grad_weight);
    }
  }
}

#define MMRM_INSTANTIATE(T)                                                             \
  template void reward_head_fwd_cpu(const RewardHeadInputs<T>&, compute_t<T>*, int);    \
  template void reward_head_bwd_cpu(const RewardHeadInputs<T>&, const compute_t<T>*, T*, compute_t<T>*, int);
MMRM_INSTANTIATE(float)
MMRM_INSTANTIATE(double)
MMRM_INSTANTIATE(bf16_t)
MMRM_INSTANTIATE(fp16_t)
#undef MMRM_INSTANTIATE

}  // namespace mmrm
