#pragma once

#include <cstdint>
#include <vector>

namespace mmrm {

// N sequences, S their tokens, T packed tokens, M trie nodes, K gathered keys.
struct TriePlan {
  std::vector<int64_t> token_index;   // [T]
  std::vector<int64_t> position_ids;  // [T]
  std::vector<int32_t> cu_seqlens_q;  // [M+1]
  std::vector<int64_t> kv_index;      // [K]
  std::vector<int32_t> cu_seqlens_k;  // [M+1]
  std::vector<int64_t> last_index;    // [N]
};

// keys: [S], int64. cu_seqlens: [N+1], int64, strictly increasing from 0 to S. min_shared >= 1.
// The meaning is that of plan_trie_ref in mmrm_fast/ops/plan_trie.py.
TriePlan plan_trie(const int64_t* keys, const int64_t* cu_seqlens, int64_t num_sequences, int64_t min_shared);

}  // namespace mmrm
