#pragma once

#include <cstdint>

#include "numeric.h"

namespace mmrm {

// T tokens of width D, R responses; sums and products are in compute_t<T>.
template <typename T>
struct RewardHeadInputs {
  const T* hidden;             // [T, D]
  const int64_t* last_index;   // [R], a token may be the last of several responses
  const compute_t<T>* weight;  // [D]
  int64_t num_tokens, num_responses, width;
};

// The meaning is that of reward_head_ref and _bwd_ref in mmrm_fast/ops/reward_head.py, the same bits for any
// num_threads. They throw std::out_of_range where an index is outside 0:T.
template <typename T>
void reward_head_fwd_cpu(const RewardHeadInputs<T>& in, compute_t<T>* rewards /* [R] */, int num_threads);

// grad: [R]; grad_hidden: [T, D]; grad_weight: [D].
template <typename T>
void reward_head_bwd_cpu(const RewardHeadInputs<T>& in, const compute_t<T>* grad, T* grad_hidden,
                         compute_t<T>* grad_weight, int num_threads);

}  // namespace mmrm
