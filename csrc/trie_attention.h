#pragma once

#include <cstdint>

#include "numeric.h"

namespace mmrm {

// T queries, S tokens with a key, H query heads, G key/value heads, E head size, N nodes, K gathered keys.
struct TriePlanView {
  const int32_t* cu_seqlens_q;  // [N + 1]
  const int64_t* kv_index;      // [K]
  const int32_t* cu_seqlens_k;  // [N + 1]
  int64_t num_nodes, num_keys;
};

// [tokens, heads, E]; a head's E values are contiguous.
template <typename T>
struct HeadRows {
  T* data;
  int64_t token_stride, head_stride;

  T* row(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

template <typename T>
struct TrieAttention {
  TriePlanView plan;
  HeadRows<const T> q, k, v;
  int64_t num_tokens, num_heads, num_kv_heads, head_size, num_key_tokens;
  float scale;     // positive
  bool causal;     // bottom-right; otherwise every query of a node sees all of its keys
  int64_t window;  // keys that a query sees at most, the last of those that it could
};

template <typename T>
struct TrieAttentionGrads {
  HeadRows<const T> grad, out;
  const float* lse;  // [H, T]
  HeadRows<T> dq;    // [T, H, E]
  float *dk, *dv;    // [S, G, E], zeros
};

// The CPU has the instructions that the functions below are made of (AVX-512, BF16 among them).
bool has_trie_attention_cpu();

// The meaning is that of trie_attention_ref in mmrm_fast/ops/trie_attention.py: float, or bf16_t with float sums, where
// weights and their gradients are rounded to bf16 before they are multiplied. The same bits for any num_threads.
// They throw std::out_of_range where a key's index is outside 0:S, where edges do not increase from 0 to T and K, and
// where a causal node has fewer keys than queries.
template <typename T>
void trie_attention_fwd_cpu(const TrieAttention<T>& in, HeadRows<T> out, float* lse /* [H, T] */, int num_threads);

template <typename T>
void trie_attention_bwd_cpu(const TrieAttention<T>& in, const TrieAttentionGrads<T>& grads, int num_threads);

}  // namespace mmrm
