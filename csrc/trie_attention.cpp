#include "trie_attention.h"

// GCC 10 is the first that knows avx512bf16.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 10 && !defined(__clang__)
#define MMRM_HAS_AVX512 1
#include "trie_node.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"

namespace mmrm {

#ifdef MMRM_HAS_AVX512

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")

namespace {

constexpr int64_t kItemRows = 20 * kRows;  // of a forward work item
constexpr float kLog2E = 1.4426950408889634f;

template <typename T>
struct ForwardScratch {
  Scratch<T> keys, values, paired_values, queries, weights;
  Scratch<float> scores, out;
};

// Softmax over keys as they come: running maxima (of scores times log2(e)) and sums of each lane. Maxima begin finite,
// so that a block of keys that a lane does not see leaves it as it is.
template <int NV>
struct Softmax {
  __m512 max[NV], sum[NV];

  Softmax() {
    for (int n = 0; n < NV; ++n) {
      max[n] = _mm512_set1_ps(-3e38f);
      sum[n] = _mm512_setzero_ps();
    }
  }

  // Scores [count, lanes] to weights, as words of consecutive keys; scales what was summed before, `out` [size, lanes].
  template <typename T>
  MMRM_INLINE void update(const float* scores, int64_t count, float scale, T* weights, float* out, int64_t size) {
    constexpr int64_t lanes = NV * kVector;
    for (int n = 0; n < NV; ++n) {
      const float* column = scores + n * kVector;
      __m512 block_max = _mm512_loadu_ps(column);
      for (int64_t j = 1; j < count; ++j) block_max = _mm512_max_ps(block_max, _mm512_loadu_ps(column + j * lanes));
      const __m512 factor = _mm512_set1_ps(scale);
      const __m512 new_max = _mm512_max_ps(max[n], _mm512_mul_ps(block_max, factor));
      if (_mm512_cmp_ps_mask(new_max, max[n], _CMP_NEQ_UQ)) {
        rescale(n, exp2_negative(_mm512_sub_ps(max[n], new_max)), out, size);
      }
      max[n] = new_max;
      const auto weight = [&](int64_t j) {
        return exp2_negative(_mm512_fmsub_ps(_mm512_loadu_ps(column + j * lanes), factor, new_max));
      };
      __m512 total = _mm512_setzero_ps();  // of the block alone: long sums of rounded terms drift
      for (int64_t j = 0; j < count; j += 2) {
        const __m512 a = weight(j), b = j + 1 < count ? weight(j + 1) : _mm512_setzero_ps();
        total = _mm512_add_ps(total, _mm512_add_ps(a, b));
        store_steps(weights + (j * lanes + n * kVector * Word<T>::kValues), lanes, a, b);
      }
      sum[n] = _mm512_add_ps(sum[n], total);
    }
  }

  MMRM_INLINE void rescale(int n, __m512 factor, float* out, int64_t size) {
    sum[n] = _mm512_mul_ps(sum[n], factor);
    for (int64_t e = 0; e < size; ++e) {
      float* values = out + e * NV * kVector + n * kVector;
      _mm512_storeu_ps(values, _mm512_mul_ps(_mm512_loadu_ps(values), factor));
    }
  }
};

// Rows [row, row + count) against all keys they see.
template <typename T, int NV>
void fwd_block(const Node<T>& node, int64_t row, int64_t count, const T* keys, const T* paired_values,
               ForwardScratch<T>& scratch, const HeadRows<T>& out, float* lse) {
  constexpr int64_t lanes = NV * kVector;
  const int64_t width = node.width(), words = node.words(), size = node.in.head_size;
  const Visible visible(node, row, count);
  const float scale = node.in.scale * kLog2E;
  T *queries = scratch.queries.get(width * lanes), *weights = scratch.weights.get((kKeys + 1) * lanes);
  float *scores = scratch.scores.get(kKeys * lanes), *sums = scratch.out.get(width * lanes);
  pack_lanes(node, node.in.q, row, count, lanes, queries);
  std::memset(sums, 0, width * lanes * sizeof(float));
  Softmax<NV> softmax;
  for (int64_t key = visible.first; key < visible.end; key += kKeys) {
    const int64_t num_keys = std::min(kKeys, visible.end - key);
    const int64_t steps = (num_keys + Word<T>::kValues - 1) / Word<T>::kValues;
    multiply<T, 8, NV, false>({as_words(keys + key * width), words, 1}, {as_words(queries), lanes}, num_keys, words,
                              scores, lanes);
    mask<NV>(visible, key, num_keys, scores);
    softmax.update(scores, num_keys, scale, weights, sums, width);
    multiply<T, 8, NV, true>({as_words(paired_values + key * width), 1, width}, {as_words(weights), lanes}, width,
                             steps, sums, lanes);
  }
  alignas(64) float max[lanes], sum[lanes];
  for (int n = 0; n < NV; ++n) {
    _mm512_store_ps(max + n * kVector, softmax.max[n]);
    _mm512_store_ps(sum + n * kVector, softmax.sum[n]);
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    write_row(sums, lane, lanes, size, 1 / sum[lane], node.at(out, row + lane));
    const double largest = double(max[lane]) / scale * node.in.scale;  // free of the rounding of `scale`
    lse[node.head(row + lane) * node.in.num_tokens + node.token(row + lane)] = float(largest + std::log(sum[lane]));
  }
}

// Rows [begin, end) of a node.
template <typename T>
void fwd_item(const Node<T>& node, int64_t begin, int64_t end, ForwardScratch<T>& scratch, const HeadRows<T>& out,
              float* lse) {
  const int64_t num_keys = node.end_key(end - 1), size = round_up(num_keys, kPadKeys) * node.width();
  T *keys = scratch.keys.get(size), *values = scratch.values.get(size);
  gather(node, node.in.k, num_keys, keys);
  gather(node, node.in.v, num_keys, values);
  const T* paired_values = pair_rows(values, round_up(num_keys, kPadKeys), node.width(), scratch.paired_values);
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t count = std::min(kRows, end - row);
    with_vectors(count, [&](auto vectors) {
      fwd_block<T, vectors.value>(node, row, count, keys, paired_values, scratch, out, lse);
    });
  }
}

template <typename T>
struct BackwardScratch {
  Scratch<T> keys, paired_keys, values, queries, grads, query_rows, grad_rows, paired_queries, paired_grads;
  Scratch<T> weights, slopes, paired_slopes;
  Scratch<float> scores, weight_grads, dq, dk, dv;
};

// Scores to weights and weight_grads [count, lanes] to score gradients, in T: of keys as left rows [count, lanes], and
// the latter also as words of consecutive keys. Rows up to a multiple of 6 are zero.
template <typename T, int NV>
MMRM_INLINE void bwd_weights(const float* scores, const float* weight_grads, int64_t count, float scale,
                             const float* lse, const float* delta, T* weights, T* slopes, T* paired_slopes) {
  constexpr int64_t lanes = NV * kVector;
  const __m512 factor = _mm512_set1_ps(scale), log2e = _mm512_set1_ps(kLog2E), zero = _mm512_setzero_ps();
  for (int n = 0; n < NV; ++n) {
    const __m512 log_sum = _mm512_loadu_ps(lse + n * kVector), mean = _mm512_loadu_ps(delta + n * kVector);
    const auto slope = [&](int64_t j) {
      const int64_t at = j * lanes + n * kVector;
      if (j >= count) {
        store(weights + at, zero);
        store(slopes + at, zero);
        return zero;
      }
      const __m512 log_weight = _mm512_fmsub_ps(_mm512_loadu_ps(scores + at), factor, log_sum);
      const __m512 weight = exp2_negative(_mm512_mul_ps(log_weight, log2e));
      const __m512 grad = _mm512_sub_ps(_mm512_loadu_ps(weight_grads + at), mean);
      const __m512 value = _mm512_mul_ps(_mm512_mul_ps(weight, grad), factor);
      store(weights + at, weight);
      store(slopes + at, value);
      return value;
    };
    for (int64_t j = 0; j < round_up(count, 6); j += 2) {
      const __m512 a = slope(j), b = slope(j + 1);
      store_steps(paired_slopes + (j * lanes + n * kVector * Word<T>::kValues), lanes, a, b);
    }
  }
}

// out[rows, width] += left[rows, steps] * right[steps, width].
template <typename T>
MMRM_INLINE void multiply_wide(const Left& left, const Right& right, int64_t rows, int64_t steps, int64_t width,
                               float* out) {
  int64_t column = 0;
  for (; column + 4 * kVector <= width; column += 4 * kVector) {
    multiply<T, 6, 4, true>(left, {right.words + column, right.step}, rows, steps, out + column, width);
  }
  for (; column < width; column += kVector) {
    multiply<T, 6, 1, true>(left, {right.words + column, right.step}, rows, steps, out + column, width);
  }
}

// A node's keys, values and the sums of their gradients.
template <typename T>
struct NodeKeys {
  const T *keys, *paired_keys, *values;
  float *dk, *dv;
};

template <typename T, int NV>
void bwd_block(const Node<T>& node, int64_t row, int64_t count, const NodeKeys<T>& path, BackwardScratch<T>& scratch,
               const TrieAttentionGrads<T>& grads) {
  constexpr int64_t lanes = NV * kVector;
  const int64_t width = node.width(), words = node.words(), size = node.in.head_size;
  const Visible visible(node, row, count);
  T *queries = scratch.queries.get(width * lanes), *lane_grads = scratch.grads.get(width * lanes);
  T *query_rows = scratch.query_rows.get(width * lanes), *grad_rows = scratch.grad_rows.get(width * lanes);
  pack_lanes(node, node.in.q, row, count, lanes, queries);
  pack_lanes(node, grads.grad, row, count, lanes, lane_grads);
  copy_rows(node, node.in.q, row, count, lanes, query_rows);
  copy_rows(node, grads.grad, row, count, lanes, grad_rows);
  const T* paired_queries = pair_rows(query_rows, lanes, width, scratch.paired_queries);
  const T* paired_grads = pair_rows(grad_rows, lanes, width, scratch.paired_grads);
  float lse[lanes], delta[lanes];
  for (int64_t lane = 0; lane < lanes; ++lane) {
    lse[lane] = INFINITY;  // a lane without a row has no weights
    delta[lane] = 0;
    if (lane >= count) continue;
    lse[lane] = grads.lse[node.head(row + lane) * node.in.num_tokens + node.token(row + lane)];
    const T *grad = node.at(grads.grad, row + lane), *out = node.at(grads.out, row + lane);
    for (int64_t e = 0; e < size; ++e) delta[lane] += convert<float>(grad[e]) * convert<float>(out[e]);
  }
  T *weights = scratch.weights.get(kKeys * lanes), *slopes = scratch.slopes.get(kKeys * lanes);
  T* paired_slopes = scratch.paired_slopes.get(kKeys * lanes);
  float *scores = scratch.scores.get(kKeys * lanes), *weight_grads = scratch.weight_grads.get(kKeys * lanes);
  float* dq = scratch.dq.get(width * lanes);
  std::memset(dq, 0, width * lanes * sizeof(float));
  for (int64_t key = visible.first; key < visible.end; key += kKeys) {
    const int64_t num_keys = std::min(kKeys, visible.end - key), row_words = lanes / Word<T>::kValues;
    const int64_t steps = (num_keys + Word<T>::kValues - 1) / Word<T>::kValues;
    multiply<T, 8, NV, false>({as_words(path.keys + key * width), words, 1}, {as_words(queries), lanes}, num_keys,
                              words, scores, lanes);
    multiply<T, 8, NV, false>({as_words(path.values + key * width), words, 1}, {as_words(lane_grads), lanes}, num_keys,
                              words, weight_grads, lanes);
    mask<NV>(visible, key, num_keys, scores);
    bwd_weights<T, NV>(scores, weight_grads, num_keys, node.in.scale, lse, delta, weights, slopes, paired_slopes);
    multiply_wide<T>({as_words(weights), row_words, 1}, {as_words(paired_grads), width}, num_keys, row_words, width,
                     path.dv + key * width);
    multiply_wide<T>({as_words(slopes), row_words, 1}, {as_words(paired_queries), width}, num_keys, row_words, width,
                     path.dk + key * width);
    multiply<T, 8, NV, true>({as_words(path.paired_keys + key * width), 1, width}, {as_words(paired_slopes), lanes},
                             width, steps, dq, lanes);
  }
  for (int64_t lane = 0; lane < count; ++lane) write_row(dq, lane, lanes, size, 1, node.at(grads.dq, row + lane));
}

template <typename T>
void bwd_node(const Node<T>& node, BackwardScratch<T>& scratch, const TrieAttentionGrads<T>& grads) {
  const int64_t width = node.width(), padded = round_up(node.num_keys, kPadKeys), size = padded * width;
  T *keys = scratch.keys.get(size), *values = scratch.values.get(size);
  gather(node, node.in.k, node.num_keys, keys);
  gather(node, node.in.v, node.num_keys, values);
  const NodeKeys<T> path{keys, pair_rows(keys, padded, width, scratch.paired_keys), values, scratch.dk.get(size),
                         scratch.dv.get(size)};
  std::fill_n(path.dk, size, 0.0f);
  std::fill_n(path.dv, size, 0.0f);
  for (int64_t row = 0; row < node.num_rows(); row += kRows) {
    const int64_t count = std::min(kRows, node.num_rows() - row);
    with_vectors(count, [&](auto vectors) { bwd_block<T, vectors.value>(node, row, count, path, scratch, grads); });
  }
  const int64_t head_size = node.in.head_size;
  for (int64_t j = 0; j < node.num_keys; ++j) {
    const int64_t at = (node.keys[j] * node.in.num_kv_heads + node.group) * head_size;
    for (int64_t e = 0; e < head_size; ++e) {
      grads.dk[at + e] += path.dk[j * width + e];
      grads.dv[at + e] += path.dv[j * width + e];
    }
  }
}

struct Range {
  int64_t begin, end;
};

// Runs of nodes that share no key with each other, the trees of the forest: all keys of one are before the next one's.
std::vector<Range> trees(const TriePlanView& plan) {
  std::vector<Range> runs;
  std::vector<int64_t> last_key(plan.num_nodes + 1, -1);  // of all nodes before
  for (int64_t node = 0; node < plan.num_nodes; ++node) {
    last_key[node + 1] = last_key[node];
    for (int64_t j = plan.cu_seqlens_k[node]; j < plan.cu_seqlens_k[node + 1]; ++j) {
      last_key[node + 1] = std::max(last_key[node + 1], plan.kv_index[j]);
    }
  }
  int64_t end = plan.num_nodes, first_key = INT64_MAX;
  for (int64_t node = plan.num_nodes - 1; node >= 0; --node) {
    for (int64_t j = plan.cu_seqlens_k[node]; j < plan.cu_seqlens_k[node + 1]; ++j) {
      first_key = std::min(first_key, plan.kv_index[j]);
    }
    if (node > 0 && first_key <= last_key[node]) continue;
    runs.push_back({node, end});
    end = node;
  }
  return runs;
}

void check_edges(const char* name, const int32_t* edges, int64_t num_nodes, int64_t end) {
  bool are_right = num_nodes >= 0 && edges[0] == 0 && edges[num_nodes] == end;
  for (int64_t node = 0; node < num_nodes; ++node) are_right = are_right && edges[node] <= edges[node + 1];
  if (!are_right) throw std::out_of_range(std::string(name) + " must increase from 0 to " + std::to_string(end));
}

template <typename T>
void check_plan(const TrieAttention<T>& in) {
  const TriePlanView& plan = in.plan;
  check_edges("cu_seqlens_q", plan.cu_seqlens_q, plan.num_nodes, in.num_tokens);
  check_edges("cu_seqlens_k", plan.cu_seqlens_k, plan.num_nodes, plan.num_keys);
  check_range("kv_index", plan.kv_index, plan.num_keys, 0, in.num_key_tokens);
  for (int64_t n = 0; in.causal && n < plan.num_nodes; ++n) {
    const Node<T> node(in, n, 0);
    if (node.num_tokens <= node.num_keys) continue;
    throw std::out_of_range("node " + std::to_string(n) + " has " + std::to_string(node.num_tokens) +
                            " queries, but " + std::to_string(node.num_keys) + " keys");
  }
}

}  // namespace

template <typename T>
void trie_attention_fwd_cpu(const TrieAttention<T>& in, HeadRows<T> out, float* lse,
                            [[maybe_unused]] int num_threads) {
  check_plan(in);
  struct Item {
    int64_t node, group, begin;
  };
  std::vector<Item> items;
  for (int64_t n = 0; n < in.plan.num_nodes; ++n) {
    const Node<T> node(in, n, 0);
    for (int64_t begin = (node.num_rows() - 1) / kItemRows * kItemRows; begin >= 0; begin -= kItemRows) {
      for (int64_t group = 0; group < in.num_kv_heads; ++group) items.push_back({n, group, begin});
    }
  }
#pragma omp parallel num_threads(num_threads)
  {
    ForwardScratch<T> scratch;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < items.size(); ++i) {
      const Node<T> node(in, items[i].node, items[i].group);
      const int64_t end = std::min(items[i].begin + kItemRows, node.num_rows());
      if (items[i].begin < end) fwd_item(node, items[i].begin, end, scratch, out, lse);
    }
  }
}

template <typename T>
void trie_attention_bwd_cpu(const TrieAttention<T>& in, const TrieAttentionGrads<T>& grads,
                            [[maybe_unused]] int num_threads) {
  check_plan(in);
  const std::vector<Range> runs = trees(in.plan);
  const int64_t num_items = int64_t(runs.size()) * in.num_kv_heads;
#pragma omp parallel num_threads(num_threads)
  {
    BackwardScratch<T> scratch;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < num_items; ++item) {
      const Range& run = runs[item / in.num_kv_heads];
      for (int64_t n = run.begin; n < run.end; ++n) bwd_node(Node<T>(in, n, item % in.num_kv_heads), scratch, grads);
    }
  }
}

bool has_trie_attention_cpu() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

#pragma GCC pop_options

#else

bool has_trie_attention_cpu() { return false; }

template <typename T>
void trie_attention_fwd_cpu(const TrieAttention<T>&, HeadRows<T>, float*, int) {
  throw std::logic_error("trie_attention was not compiled for this CPU");
}

template <typename T>
void trie_attention_bwd_cpu(const TrieAttention<T>&, const TrieAttentionGrads<T>&, int) {
  throw std::logic_error("trie_attention was not compiled for this CPU");
}

#endif

#define MMRM_INSTANTIATE(T)                                                                      \
  template void trie_attention_fwd_cpu(const TrieAttention<T>&, HeadRows<T>, float*, int);       \
  template void trie_attention_bwd_cpu(const TrieAttention<T>&, const TrieAttentionGrads<T>&, int);
MMRM_INSTANTIATE(float)
MMRM_INSTANTIATE(bf16_t)
#undef MMRM_INSTANTIATE

}  // namespace mmrm
