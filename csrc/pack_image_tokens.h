#pragma once

#include <cstdint>

#include "numeric.h"

namespace mmrm {

// T tokens of width D from V embeddings and F features; Bits is an unsigned integer of the elements' size.
template <typename Bits>
struct PackImageTokensFwd {
  const Bits* embedding;  // [V, D]
  const Bits* features;   // [F, D]
  const int64_t* source;  // [T], an embedding's row, or -1 - a feature's row
  Bits* out;              // [T, D]
  int64_t num_tokens, width;
};

template <typename T>
struct PackImageTokensBwd {
  const T* grad;                  // [T, D]
  const int64_t* order;           // [T], tokens by source
  const int64_t* segment_ptr;     // [U+1], order[segment_ptr[u]:segment_ptr[u+1]] are the tokens of segment_source[u]
  const int64_t* segment_source;  // [U], increasing
  T* grad_embedding;              // [V, D]
  T* grad_features;               // [F, D]
  int64_t num_segments, num_embeddings, num_features, width;  // U, V (0 where it is not needed), F, D
};

// The meaning is that of pack_image_tokens_ref and _bwd_ref in mmrm_fast/ops/pack_image_tokens.py. They throw
// std::out_of_range where an index is outside its array.
template <typename Bits>
void pack_image_tokens_fwd_cpu(const PackImageTokensFwd<Bits>& args, int64_t num_embeddings, int64_t num_features,
                               int num_threads);

// The same bits for any num_threads.
template <typename T>
void pack_image_tokens_bwd_cpu(const PackImageTokensBwd<T>& args, int64_t num_tokens, int num_threads);

}  // namespace mmrm
